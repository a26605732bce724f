"""The record of one clip: what a source lists, before anything is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional


@dataclass(frozen=True)
class Clip:
    """One clip of one video file.

    Args:
        id: Its name on every machine: the video's path relative to the source's root, without suffix, and ``@start-stop`` in
            source frames where the clip is a part of the video. Influence scores, selections, caches and noise refer to it.
        path: The file.
        caption: Its text; ``None`` where the source has none for it.
        frames: Source frame numbers to decode, in order; ``None`` until the file's length is known.
        extra: Further columns of the source, as text.
    """

    id: str
    path: Path
    caption: Optional[str] = None
    frames: Optional[tuple[int, ...]] = None
    extra: Mapping[str, str] = field(default_factory=dict)
