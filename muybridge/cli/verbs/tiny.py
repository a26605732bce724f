"""Something to try everything on, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from muybridge.errors import UsageError


def tiny(family: Optional[str] = None, out: Optional[str] = None, clips: Optional[str] = None, count: int = 8) -> None:
    """Write a tiny checkpoint with random weights (--family, --out), toy clips with captions (--clips), or both.

    Args:
        family: Which checkpoint: ``muybridge list tiny`` names them.
        out: Directory of the checkpoint; ``runs/tiny/<family>`` where not given.
        clips: Folder for the clips.
        count: Number of clips.
    """
    if family is None and clips is None:
        raise UsageError(
            "neither --family nor --clips is given",
            "one of them, or both",
            "muybridge tiny --family wan --clips runs/tiny/clips",
        )
    if family is None and out is not None:
        raise UsageError("--out without --family", "--family NAME --out DIR", "muybridge list tiny")
    if family is not None:
        from muybridge.tiny import write

        print(f"checkpoint: {write(family, Path(out or f'runs/tiny/{family}'))}")
    if clips is not None:
        from muybridge.toy_clips import write_clips

        print(f"clips: {len(write_clips(clips, count))} in {clips}")
