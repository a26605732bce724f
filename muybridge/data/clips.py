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
        span: The part of the video it is, source frames from ``start`` to below ``stop``; all of it where not given.
        crop: The part of the picture that may be used, (left, right, top, bottom) in source pixels; all of it where not given.
        problem: Why it can't be used, where the source alone tells (such as a caption that is not UTF-8).
        extra: Further columns of the source, as text.
    """

    id: str
    path: Path
    caption: Optional[str] = None
    span: Optional[tuple[int, int]] = None
    crop: Optional[tuple[int, int, int, int]] = None
    problem: Optional[str] = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The id of the whole video."""
        return self.id.rpartition("@")[0] if self.span is not None else self.id


def part(name: str, start: int, stop: int) -> str:
    """The id of the source frames from ``start`` to below ``stop`` of a video."""
    return f"{name}@{start}-{stop}"
