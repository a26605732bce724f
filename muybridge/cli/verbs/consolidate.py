"""Sharded checkpoints as one file."""

from __future__ import annotations

from pathlib import Path

from muybridge.errors import UsageError


def consolidate(path: str, *, out: str) -> None:
    """Turn the folder of a sharded checkpoint into one file, which every strategy resumes.

    Args:
        path: The checkpoint folder.
        out: The file to write.
    """
    if not Path(path).is_dir():
        raise UsageError(
            f"checkpoint folder {path} does not exist",
            "a folder that a run with FullyShard wrote",
            f"looked up from {Path.cwd()}",
        )
    if Path(out).exists():
        raise UsageError(f"{out} exists", "a new file", "choose another --out, or remove it first")
    from lightning_modules.parallel import consolidate as write

    print(write(path, out))
