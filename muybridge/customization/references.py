"""Reference clips: one file, a folder or a table, each with a caption whose subject and motion are kept apart by a bar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.customization.tau import KNOWN
from muybridge.data.account import BadVideo
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.data.reading import Reading, read_clip
from muybridge.data.sources import list_clips
from muybridge.data.windows import Windows
from muybridge.errors import UsageError
from muybridge.proving_ground.captions import BAR, split_caption
from muybridge.video import to_pixels


@dataclass(frozen=True)
class Reference:
    """One clip that shows a motion.

    Args:
        id: Its name.
        caption: ``a man | runs to the left``.
        pixels: (3, F, H, W) in [-1, 1].
        fps: Frames per second.
    """

    id: str
    caption: str
    pixels: Tensor
    fps: float

    @property
    def subject(self) -> str:
        """``a man``."""
        return split_caption(self.caption)[0]

    @property
    def motion(self) -> str:
        """``runs to the left``."""
        return split_caption(self.caption)[1]


def spoken(caption: str, keep_bar: bool = False) -> str:
    """A caption as the text encoder is given it: without its bar, which no model but that of the proving ground has seen.

    Args:
        caption: With or without a bar.
        keep_bar: Leave it as it is.
    """
    return caption if keep_bar else caption.replace(BAR, " ")


def clip_size(
    backbone: Backbone, frames: Optional[int] = None, height: Optional[int] = None, width: Optional[int] = None
) -> tuple[int, int, int]:
    """Frames, height and width: those given, and for the others those that the model or its family was trained for; checked."""
    family = KNOWN[backbone.family].clip if backbone.family in KNOWN else (None, None, None)
    published = backbone.trained_clip or family
    size = [given or usual for given, usual in zip((frames, height, width), published, strict=True)]
    if any(n is None for n in size):
        raise UsageError(f"{backbone.family} has no usual clip size", "--frames, --height and --width")
    found = (int(size[0] or 0), int(size[1] or 0), int(size[2] or 0))
    backbone.check_clip(*found)
    return found


def list_references(source: str | Path, caption: Optional[str] = None) -> list[Clip]:
    """The clips of a source; refuses captions without a subject and a motion, before anything is decoded.

    Args:
        source: A video, a folder of videos with .txt captions beside them, or a table.
        caption: The caption, where the source is one video.
    """
    if caption is not None:
        split_caption(caption)
    clips = list_clips(source, caption=caption)
    if not clips:
        raise UsageError(f"{source} holds no clip", "a video, or a folder of videos with captions")
    for clip in clips:
        split_caption(clip.caption or "")
    return clips


def read_reference(clip: Clip, size: tuple[int, int, int], fps: Optional[float] = None) -> Reference:
    """Decode one clip; a video shorter than the clip is refused.

    Args:
        clip: Its record.
        size: Frames, height and width.
        fps: Frames per second of the clip; the video's own where not given.
    """
    try:
        taken = read_clip(clip, Bucket(*size), Reading(Windows(fps=fps)))
    except BadVideo as error:
        raise UsageError(
            f"the reference {clip.path} can't be used: {error}",
            f"a video with {size[0]} frames" + (f" at {fps:g} a second" if fps else ""),
            "give a longer clip, a smaller --frames, or a higher --fps",
        ) from error
    return Reference(taken.id, clip.caption or "", to_pixels(taken.frames), taken.fps)


def read_references(
    source: str | Path, size: tuple[int, int, int], caption: Optional[str] = None, fps: Optional[float] = None
) -> Iterator[Reference]:
    """All clips of a source, one after another."""
    for clip in list_references(source, caption):
        yield read_reference(clip, size, fps)
