"""Real video files whose every frame carries its own number in its pixels, and real files that are broken.

A frame is a grid of 3 x 4 blocks. The first is red and the last blue, which tells which way up the picture is; the ten between
are the bits of the frame's number, black or white. Blocks of 16 pixels survive compression, scaling and 4:2:0 colour.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

import av
import numpy as np

ROWS, COLUMNS = 3, 4
HEIGHT, WIDTH = 48, 64


def numbered(count: int, start: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames number ``start`` to below ``start + count``."""
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    block = rows[:, None] * COLUMNS + columns[None]
    frames = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        bits = [255 * ((start + i) >> b & 1) for b in range(ROWS * COLUMNS - 2)]
        palette = np.array([(255, 0, 0), *((bit,) * 3 for bit in bits), (0, 0, 255)], np.uint8)
        frames[i] = palette[block]
    return frames


def number(frame: np.ndarray) -> int:
    """The number of an upright frame; an error where it is not upright."""
    height, width = frame.shape[:2]
    middles = [
        frame[int(height * (r + 0.5) / ROWS), int(width * (c + 0.5) / COLUMNS)].astype(int)
        for r in range(ROWS)
        for c in range(COLUMNS)
    ]
    red, blue = middles[0], middles[-1]
    assert red[0] > 150 > 100 > red[2], f"not upright: {red} where red should be"
    assert blue[2] > 150 > 100 > blue[0], f"not upright: {blue} where blue should be"
    return sum(int(m.mean() > 127) << b for b, m in enumerate(middles[1:-1]))


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """The number of every frame."""
    return [number(frame) for frame in frames]


def numbers_of(pixels: Any) -> list[int]:
    """The numbers in one clip of pixels (3, F, H, W) in [-1, 1]."""
    return numbers(((pixels.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8))


def write(
    path: str | Path,
    frames: np.ndarray,
    fps: float = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    milliseconds: Optional[Sequence[int]] = None,
    options: Optional[dict[str, str]] = None,
    container: Optional[dict[str, str]] = None,
    aspect: Optional[Fraction] = None,
) -> Path:
    """Encode frames.

    Args:
        path: Where to; the suffix chooses the container.
        frames: (F, H, W, 3), uint8.
        fps: Their rate.
        codec: Encoder.
        pixel_format: What is encoded.
        gop: Frames from key frame to key frame.
        b_frames: Frames in a row that depend on later ones.
        milliseconds: When each frame is shown, instead of at ``fps``.
        options: Of the encoder.
        container: Of the container.
        aspect: Width of a pixel over its height.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stream.options = {"preset": "ultrafast", "crf": "18", **(options or {})} if "26" in codec else (options or {})
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        base = Fraction(1, 1000)
        if milliseconds is not None:
            stream.codec_context.time_base = stream.time_base = base
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            if milliseconds is not None:
                picture.pts, picture.time_base = milliseconds[i], base
            for packet in stream.encode(picture):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return Path(path)


def uneven(count: int) -> list[int]:
    """Times of frames that come at changing intervals, in milliseconds."""
    return [int(t) for t in np.cumsum([0] + [(40, 20, 100, 33)[(i // 7) % 4] for i in range(count - 1)])]


def rotate(source: Path, out: Path, quarter_turns: int) -> Path:
    """A copy of an mp4 that says it is to be shown turned clockwise, as phones write them."""
    content = bytearray(source.read_bytes())
    a, b, c, d = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}[quarter_turns]
    # The matrix of the track header, in 16.16 and 2.30 fixed point.
    place = content.find(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    out.write_bytes(content)
    return out


def cut(source: Path, out: Path, first: int) -> Path:
    """The part of an mp4 from frame ``first`` on, without encoding it again: packets from the key frame before, hidden by an
    edit list up to the frame itself.
    """
    with av.open(str(source)) as old, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        begin = int(first / stream.average_rate / stream.time_base)
        old.seek(begin, stream=stream, backward=True)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
            new.mux(packet)
    return out


def sound(path: Path) -> Path:
    """A file with sound and no pictures."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return path


# -- the bad ones --------------------------------------------------------------------------------------------------


def _corrupt(path: Path) -> None:
    content = bytearray(write(path, numbered(40), container={"movflags": "faststart"}).read_bytes())
    begin = content.find(b"mdat") + 4
    third = (len(content) - begin) // 3
    noise = np.random.default_rng(0).integers(0, 256, third, dtype=np.uint8).tobytes()
    content[begin + third : begin + 2 * third] = noise
    path.write_bytes(content)


def _truncated(path: Path, movflags: str) -> None:
    content = write(path, numbered(40), container={"movflags": movflags} if movflags else None).read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])


def _turned(path: Path) -> None:
    upright = np.rot90(numbered(20), 1, axes=(1, 2))
    rotate(write(path.with_suffix(".plain.mp4"), upright), path, 1)
    path.with_suffix(".plain.mp4").unlink()


def _not_utf8(path: Path) -> None:
    write(path, numbered(20))
    path.with_suffix(".txt").write_bytes("un chien à l'eau".encode("latin-1"))


BAD: dict[str, tuple[Callable[[Path], Any], Optional[str]]] = {
    "corrupt": (_corrupt, "damaged"),
    "truncated": (lambda p: _truncated(p, ""), "no video"),
    "truncated after its index": (lambda p: _truncated(p, "faststart"), "truncated"),
    "empty": (lambda p: p.touch(), "empty"),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(1).bytes(4000)), "no video"),
    "an error page": (lambda p: p.write_text("<html>404 Not Found</html>\n" * 40), "no video"),
    "audio only": (sound, "no video"),
    "one frame": (lambda p: write(p, numbered(1)), "too short"),
    "a folder": (lambda p: p.mkdir(), "unreadable"),
    "a pipe": (lambda p: os.mkfifo(p), "unreadable"),
    "a link to nowhere": (lambda p: p.symlink_to("nowhere.mp4"), "missing"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "unreadable"),
    "caption not UTF-8": (_not_utf8, "caption"),
    "variable rate": (lambda p: write(p, numbered(20), milliseconds=uneven(20)), None),
    "10 bits": (lambda p: write(p, numbered(20), pixel_format="yuv420p10le"), None),
    "10 bits, open GOP": (
        lambda p: write(p, numbered(20), codec="libx265", pixel_format="yuv420p10le", options=QUIET),
        None,
    ),
    "rotated": (_turned, None),
    "huge": (lambda p: write(p, numbered(9, height=2160, width=3840), b_frames=0), None),
}
"""Name: how it is made, and what kind of reason it is skipped for; ``None`` where it must be read."""

QUIET = {"x265-params": "log-level=none"}


def make_bad(name: str, folder: Path, stem: Optional[str] = None) -> Path:
    """One of ``BAD``, with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem or name.replace(' ', '-').replace(',', '')}.mp4"
    path.with_suffix(".txt").write_text(f"{name}", encoding="utf-8")
    BAD[name][0](path)
    return path


def folder_of(folder: Path, count: int = 4, frames: int = 20, **options: Any) -> Path:
    """A folder of good clips with captions; clip ``i`` begins at frame number ``100 i``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write(folder / f"clip-{i}.mp4", numbered(frames, 100 * i), **options)
        (folder / f"clip-{i}.txt").write_text(f"clip number {i}", encoding="utf-8")
    return folder


def copy_into(folder: Path, *files: Path) -> None:
    """Files with the captions beside them."""
    for file in files:
        for path in (file, file.with_suffix(".txt")):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.is_symlink() or path.is_file():
                shutil.copy2(path, folder / path.name, follow_symlinks=False)
