"""From a clip's record to its frames: decoding, windows and framing put together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

from muybridge.data.account import BadVideo
from muybridge.data.buckets import Bucket, assign
from muybridge.data.clips import Clip, part
from muybridge.data.decoding import Decoder, open_video, read_index
from muybridge.data.framing import Framing, apply, decode_size, place
from muybridge.data.windows import Windows, available, centres, check_span, cover, drawn, pick, starts
from muybridge.video import Frames


@dataclass(frozen=True)
class Reading:
    """How clips are made of videos: all that their pixels depend on, besides the video and the bucket.

    Args:
        windows: Which stretches become clips.
        framing: How a picture is brought to a clip's size.
        decoder: What reads the files.
        seed: Random windows are a function of this seed, the epoch and the clip.
    """

    windows: Windows = field(default_factory=Windows)
    framing: Framing = "crop"
    decoder: Decoder = "auto"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What pixels depend on, as plain values: a cache made under other settings is another cache."""
        seed = self.seed if self.windows.mode == "random" else None
        return {**asdict(self.windows), "framing": self.framing, "decoder": self.decoder, "seed": seed}


@dataclass(frozen=True)
class Taken:
    """A clip that was read.

    Args:
        id: Its id; where the window is drawn at random, that of the window.
        frames: The frames (F, H, W, 3).
        fps: Their rate.
        remark: What there is to say of the file; mostly nothing.
    """

    id: str
    frames: Frames
    fps: float
    remark: str = ""


def read_clip(clip: Clip, bucket: Bucket, reading: Reading, epoch: int = 0, draw: int = 0) -> Taken:
    """The frames of a clip.

    Args:
        clip: Its record.
        bucket: Its shape.
        reading: How it is made.
        epoch: Random windows differ from epoch to epoch,
        draw: and between occurrences of a clip in one.

    Raises:
        BadVideo: Where it can't be used.
    """
    if clip.problem is not None:
        raise BadVideo(clip.problem)
    windows = reading.windows
    video = open_video(clip.path, reading.decoder)
    first, _ = check_span(video.times, bucket.frames, windows, clip.span)
    name = clip.id
    if windows.mode == "random":
        start = drawn(video.times, bucket.frames, windows, (epoch, clip.id, draw), reading.seed, clip.span)
    elif clip.span == cover(pick(video.times, first, bucket.frames, windows)):
        start = first
    else:
        start = centres(video.times, bucket.frames, replace(windows, count=1), clip.span)[0]
    picked = pick(video.times, start, bucket.frames, windows)
    if windows.mode == "random":
        name = part(clip.name, *cover(picked))
    placement = place(video.size, bucket.size, reading.framing, _region(clip, video.size))
    frames = apply(video.frames(picked, decode_size(video.size, placement)), placement)
    return Taken(name, frames, windows.fps or video.rate / windows.stride, video.remark)


def _region(clip: Clip, size: tuple[int, int]) -> Optional[tuple[int, int, int, int]]:
    if clip.crop is None:
        return None
    _, right, _, bottom = clip.crop
    if right > size[1] or bottom > size[0]:
        raise BadVideo(f"crop: {list(clip.crop)} reaches beyond the picture, {size[0]}x{size[1]}")
    return clip.crop


# -- looking into files before a run -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What a look into a clip's file tells.

    Args:
        clips: The clip, or one for every window; with the reason in ``problem`` where it can't be used.
        bucket: Where they go; ``None`` with a problem.
        enlarged: Whether the picture is smaller than the bucket.
    """

    clips: tuple[Clip, ...]
    bucket: Optional[int]
    enlarged: bool = False


def survey(clip: Clip, buckets: list[Bucket], reading: Reading) -> Survey:
    """The bucket and the windows of a clip; reads the file's packets, decodes next to nothing."""
    try:
        if clip.problem is not None:
            raise BadVideo(clip.problem)
        index, windows = read_index(clip.path), reading.windows
        region = _region(clip, index.size)
        shortest = min(b.frames for b in buckets)
        check_span(index.times, shortest, windows, clip.span)
        length = available(index.times, windows, clip.span)
        bucket = assign(buckets, length, index.size, reading.framing, region)
        assert bucket is not None
        frames = buckets[bucket].frames
        placement = place(index.size, buckets[bucket].size, reading.framing, region)
        enlarged = placement.scaled[0] > index.size[0] or placement.scaled[1] > index.size[1]
        if not windows.needs_lengths:
            return Survey((clip,), bucket, enlarged)
        spans = [cover(pick(index.times, s, frames, windows)) for s in starts(index.times, frames, windows, clip.span)]
        return Survey(tuple(replace(clip, id=part(clip.name, *s), span=s) for s in spans), bucket, enlarged)
    except BadVideo as error:
        return Survey((replace(clip, problem=str(error)),), None)
