"""Frames to files and back: H.264 mp4, GIF, contact sheet; frame-exact reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.whole import whole

if TYPE_CHECKING:
    from muybridge.data.decoding import VideoReader

Frames = np.ndarray
"""(F, H, W, 3), uint8, RGB."""


def to_frames(pixels: Tensor) -> Frames:
    """One clip (3, F, H, W) in [-1, 1] as uint8 frames."""
    if pixels.ndim != 4 or pixels.shape[0] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}: expected one clip, (3, F, H, W)")
    scaled = ((pixels.detach().float().cpu() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.byte().permute(1, 2, 3, 0).contiguous().numpy()


def to_pixels(frames: Frames) -> Tensor:
    """uint8 frames as one clip (3, F, H, W) in [-1, 1]."""
    from torch import from_numpy

    # In place: a clip's worth of floats is large, and each further copy of it costs as much as decoding many frames.
    planar = from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).contiguous()
    return planar.float().div_(127.5).sub_(1.0)


def write_video(path: str | Path, frames: Frames, fps: float = 16.0, crf: int = 18, exact: bool = False) -> Path:
    """An H.264 mp4 that browsers play, written whole or not at all.

    Args:
        path: Where to; the suffix should be ``.mp4``.
        frames: uint8 RGB frames. Odd sides get their last row or column doubled, since 4:2:0 colour needs even ones.
        fps: Frames per second.
        crf: x264's quality, 0 (lossless) to 51.
        exact: The same bytes on every run and machine, at a fraction of the speed. x264's bytes depend on how many threads it
            has, and by its assembly and macroblock tree on what lay in memory before.
    """
    from fractions import Fraction

    import av

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(
            f"frames of shape {frames.shape} and dtype {frames.dtype}: expected (F, H, W, 3), uint8, F > 0"
        )
    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with whole(path, suffix=True) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.options = {"crf": str(crf)}
        if exact:
            stream.codec_context.thread_count = 1
            stream.options = {**stream.options, "x264-params": "threads=1:asm=0:mbtree=0"}
        for frame in even:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return Path(path)


def write_gif(path: str | Path, frames: Frames, fps: float = 8.0) -> Path:
    """A looping GIF, for pages that play no video."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    with whole(path, suffix=True) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return Path(path)


def contact_sheet(clips: Sequence[Frames], columns: int = 8, gap: int = 2) -> np.ndarray:
    """Clips under one another, each a row of ``columns`` frames spread evenly over its length; (H, W, 3), uint8."""
    height, width = max(c.shape[1] for c in clips), max(c.shape[2] for c in clips)
    sheet = np.full((len(clips) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        for column, frame in enumerate(clip[picks]):
            y, x = gap + row * (height + gap), gap + column * (width + gap)
            sheet[y : y + frame.shape[0], x : x + frame.shape[1]] = frame
    return sheet


def write_image(path: str | Path, image: np.ndarray) -> Path:
    """A PNG or JPEG."""
    from PIL import Image

    with whole(path, suffix=True) as temporary:
        Image.fromarray(image).save(temporary)
    return Path(path)


def frame_count(path: str | Path) -> int:
    """Number of frames of a video file."""
    return len(_reader(path))


def read_frames(path: str | Path, indices: Sequence[int]) -> Frames:
    """Exactly the frames asked for, in the order asked for."""
    with _readable(path):
        return _reader(path).frames(list(indices))


def frame_rate(path: str | Path) -> float:
    """Average frames per second of a video file."""
    return _reader(path).rate


def _reader(path: str | Path) -> VideoReader:
    from muybridge.data.decoding import open_video

    with _readable(path):
        return open_video(path)


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """A file that can't be read is the user's to mend."""
    from muybridge.data.account import BadVideo

    try:
        yield
    except BadVideo as error:
        raise UsageError(
            f"{path}: {error}", "a complete video file", "check the path; remove or re-encode the file"
        ) from error
