"""Files that others may read: safetensors writes its files for the owner alone, whatever the umask says."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def usual_mode(folder: Path) -> int:
    """The permissions of a new file in a folder, as the process's umask has them.

    (A file is made to see: asking for the umask itself would change it for a moment, and for other threads.)
    """
    probe = folder / f".mode.{os.getpid()}"
    with open(probe, "wb"):
        mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def as_usual(path: Path) -> None:
    """Give a safetensors file, or all of them below a folder, the permissions of other new files."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if files:
        mode = usual_mode(files[0].parent)
        for file in files:
            file.chmod(mode)
