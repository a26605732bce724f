"""Frames of video files by number: exact whatever the file, or an error that says why not.

The packets of a file are listed first, without decoding them (:class:`Index`): that gives every frame its time, which no
average rate does, and tells whether decord can be trusted with the file. decord finds a frame by counting from a key frame,
and miscounts wherever pictures that are shown before a key frame are stored after it (open GOPs: x265's default, most
broadcast material). Those files, and containers without an index, are read by PyAV, which looks at every frame's own time.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Protocol

import numpy as np

from muybridge.data.account import BadVideo
from muybridge.data.memory import Memory
from muybridge.video import Frames

Size = tuple[int, int]
"""Height and width."""
Decoder = Literal["auto", "decord", "av"]

GRID, NARROW = 64, 192
"""Pixels that decord pads rows to, and below which it may miscalculate the shape of what it returns."""


LARGE = 2**28
"""Bytes from which on ``auto`` reads by PyAV: decord reads a file from end to end whenever it opens it."""


class VideoReader(Protocol):
    """A video file, open for reading frames by number."""

    times: np.ndarray
    size: Size
    rate: float
    remark: str

    def __len__(self) -> int: ...

    def frames(self, indices: Sequence[int], size: Optional[Size] = None) -> Frames:
        """The frames asked for, in the order asked for, scaled to ``size`` where given."""
        ...


# -- what a file holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """What a file holds, read off its packets.

    Args:
        times: Seconds from the first frame to each, in the order they are shown.
        stamps: The times as the file has them; ``None`` where it has none that are usable, and frames can only be counted.
        keys: Which frames decoding can begin at.
        stored: Size of a frame as stored.
        size: Size of a frame as shown: upright, with square pixels.
        turns: Quarter turns clockwise that bring a stored frame upright.
        rate: Frames per second, on average.
        reason: Why decord would not be exact; empty where it is.
    """

    times: np.ndarray
    stamps: Optional[np.ndarray]
    keys: np.ndarray
    stored: Size
    size: Size
    turns: int
    rate: float
    reason: str

    @property
    def nbytes(self) -> int:
        """About how much memory it takes: 16 bytes a frame, and what is not in arrays."""
        arrays = [a for a in (self.times, self.stamps, self.keys) if a is not None]
        return sum(a.nbytes for a in arrays) + 1024


_indices: Memory[Index] = Memory(2**28, lambda index: index.nbytes)
"""Those this process used last: of short clips a hundred thousand, of films of two hours some ninety."""


def check_file(path: Path) -> os.stat_result:
    """Refuse what no decoder should be let near: opening a pipe, for one, blocks for ever."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        link = f": a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else ""
        raise BadVideo(f"missing{link}") from error
    except OSError as error:
        raise BadVideo(f"unreadable: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise BadVideo("unreadable: a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise BadVideo("unreadable: not a regular file")
    if not os.access(path, os.R_OK):
        raise BadVideo("unreadable: permission denied")
    if status.st_size == 0:
        raise BadVideo("empty: the file has 0 bytes")
    return status


def read_index(path: str | Path) -> Index:
    """The index of a file; kept as long as the file does not change."""
    status = check_file(Path(path))
    return _indices.get((str(path), status.st_mtime_ns, status.st_size), lambda: _index(str(path)))


def _index(path: str) -> Index:
    av = _av()
    try:
        # Names of tracks and the like are never read here, so theirs may be in any encoding.
        with av.open(path, metadata_errors="replace") as container:
            return _list_packets(container)
    except (av.error.FFmpegError, ValueError) as error:
        raise BadVideo(f"no video: {_said(error)} (truncated, damaged, or another kind of file)") from error


def _list_packets(container: Any) -> Index:
    import av

    stream = _picture_stream(container)
    stamps, keys, first, damage, demuxed = [], [], None, "", 0
    early, key = False, None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        demuxed += 1
        if first is None:
            try:
                first = next(iter(packet.decode()), None)
            except av.error.FFmpegError as error:
                damage = _said(error)
        if packet.is_discard:
            # Before the start of what an edit list shows: needed for decoding, never shown.
            early = True
            continue
        if packet.is_keyframe:
            key = packet.pts
            keys.append(packet.pts)
        early = early or None in (packet.pts, key) or packet.pts < key
        stamps.append(packet.pts)
    if first is None:
        # Few packets, all of them still in the decoder.
        first = next(iter(stream.codec_context.decode(None)), None)
    if first is None:
        raise BadVideo(f"damaged: no frame can be decoded ({damage or 'no packets'})")
    container_names = container.format.name.split(",")
    listed = len(stream.index_entries) if "mp4" in container_names else 0
    if listed > demuxed:
        raise BadVideo(f"truncated: {demuxed} of {listed} frames are there")
    # AVI has no times of its own: those FFmpeg gives are in the order of storage.
    timed = "avi" not in container_names and None not in stamps and len(set(stamps)) == len(stamps)
    stated = float(stream.average_rate or stream.guessed_rate or 25)
    if timed:
        shown = np.sort(np.array(stamps, dtype=np.int64))
        times = (shown - shown[0]) * float(stream.time_base)
        rate = (len(times) - 1) / times[-1] if len(times) > 1 else stated
        begins = np.searchsorted(shown, np.array(sorted(keys), dtype=np.int64))
    else:
        shown, times, rate = None, np.arange(len(stamps)) / stated, stated
        begins = np.zeros(1, dtype=np.int64)
    turns = round(-first.rotation / 90) % 4
    aspect = float(stream.sample_aspect_ratio or 1)
    height, width = first.height, max(round(first.width * aspect), 1)
    reason = ""
    if not timed:
        reason = "the file has no frame times"
    elif not {"mp4", "matroska", "webm"} & set(container_names):
        reason = f"decord is not exact in {container.format.long_name} files"
    elif early:
        reason = (
            "frames are stored after a later key frame (open GOP, or cut without re-encoding), where decord miscounts"
        )
    return Index(
        times=times,
        stamps=shown,
        keys=begins,
        stored=(first.height, first.width),
        size=(width, height) if turns % 2 else (height, width),
        turns=turns,
        rate=float(rate),
        reason=reason,
    )


def _picture_stream(container: Any) -> Any:
    """The video to read (cover art is none), to be decoded in this thread: loaders have their own processes."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise BadVideo("no video: " + ("audio only" if container.streams.audio else "no stream of pictures"))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise BadVideo("no video: no decoder for its codec")
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def _said(error: Exception) -> str:
    """The core of a library's message, without its addresses, times and own file names."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).strip().splitlines()[0].rpartition("] ")[2][:160]


# -- readers -------------------------------------------------------------------------------------------------------


class _Reader:
    """What both readers take from the index."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = read_index(path)
        self.times, self.size, self.rate = self.index.times, self.index.size, self.index.rate
        self.remark = ""

    def __len__(self) -> int:
        return len(self.times)

    def _check(self, indices: Sequence[int]) -> None:
        wrong = [i for i in indices if not 0 <= i < len(self)]
        if wrong:
            raise IndexError(f"frame {wrong[0]} of {self.path}, which has {len(self)}")


class DecordReader(_Reader):
    """decord, for the files it is exact on.

    Its frames come upright and scaled by the decoder. (It pads rows to 64 pixels, and where a padded row is a multiple of the
    row itself takes it for one of four or more channels. Only narrow rows can be so: these are asked for in a width that needs
    no padding, and narrowed afterwards.)

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.index.reason:
            raise BadVideo(f"not exact: {self.index.reason}")

    def frames(self, indices: Sequence[int], size: Optional[Size] = None) -> Frames:
        """See :class:`VideoReader`."""
        self._check(indices)
        decord = _decord()
        height, width = size or self.size
        wide = -(-width // GRID) * GRID if width < NARROW else width
        try:
            video = decord.VideoReader(str(self.path), num_threads=1, width=wide, height=height)
            if len(video) != len(self):
                raise BadVideo(f"damaged: decord counts {len(video)} frames, its packets say {len(self)}")
            frames = video.get_batch(list(indices)).asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError, UnicodeEncodeError) as error:
            # (The last: it takes no file name that is not UTF-8.)
            raise BadVideo(f"damaged: decord can't read it ({_said(error)})") from error
        return frames if wide == width else resize(frames, (height, width))


class AvReader(_Reader):
    """PyAV: every frame is recognised by its own time, so none can be taken for another.

    Args:
        path: The file.
    """

    def frames(self, indices: Sequence[int], size: Optional[Size] = None) -> Frames:
        """See :class:`VideoReader`."""
        self._check(indices)
        av = _av()
        height, width = size or self.size
        turned = self.index.turns % 2
        found: dict[int, np.ndarray] = {}
        try:
            for number, frame in self._walk(sorted(set(indices))):
                if frame.is_corrupt:
                    raise BadVideo(f"damaged: frame {number} can't be decoded whole")
                scaled = frame.reformat(
                    width=height if turned else width, height=width if turned else height, format="rgb24"
                )
                found[number] = np.rot90(scaled.to_ndarray(), -self.index.turns)
        except (av.error.FFmpegError, ValueError) as error:
            raise BadVideo(f"damaged: {_said(error)}, at frame {max(found, default=min(indices))} or after") from error
        return np.stack([found[i] for i in indices])

    def _walk(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """The wanted frames in order, decoding as little as the file's key frames allow."""
        keys = self.index.keys if self.index.stamps is not None else np.zeros(1, dtype=np.int64)
        for key, run in runs(wanted, keys):
            done = 0
            try:
                for number, frame in self._run(key, run):
                    done += 1
                    yield number, frame
            except _Missed:
                # The container led past the key frame (it has no index), or what follows the key needs what is before it.
                yield from self._run(0, run[done:])

    def _run(self, key: int, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """The wanted frames, decoding from one key frame."""
        import av

        stamps, place, number = self.index.stamps, 0, -1
        with av.open(str(self.path), metadata_errors="replace") as container:
            stream = _picture_stream(container)
            if key:
                assert stamps is not None
                container.seek(int(stamps[key]), stream=stream, backward=True)
            for frame in container.decode(stream):
                if stamps is None:
                    number += 1
                else:
                    number = int(np.searchsorted(stamps, frame.pts if frame.pts is not None else stamps[0] - 1))
                    if number == len(stamps) or stamps[number] != frame.pts:
                        continue
                if number > wanted[place]:
                    break
                if number == wanted[place]:
                    yield number, frame
                    place += 1
                    if place == len(wanted):
                        return
        if key:
            raise _Missed
        raise BadVideo(f"damaged: frame {wanted[place]} of {len(self)} is not there")


class _Missed(Exception):
    """A wanted frame did not come after the key frame that decoding began at."""


class AutoReader(_Reader):
    """decord where it is exact and can read the file, PyAV otherwise; ``remark`` then says why.

    Args:
        path: The file.
    """

    def frames(self, indices: Sequence[int], size: Optional[Size] = None) -> Frames:
        """See :class:`VideoReader`."""
        why = self.index.reason
        if not why and os.path.getsize(self.path) > LARGE:
            why = "large file, all of which decord would read for each clip"
        if not why:
            try:
                return DecordReader(self.path).frames(indices, size)
            except BadVideo as error:
                why = str(error)
        frames = AvReader(self.path).frames(indices, size)
        self.remark = f"read by av: {why}"
        return frames


READERS: dict[str, type[_Reader]] = {"auto": AutoReader, "decord": DecordReader, "av": AvReader}


def open_video(path: str | Path, decoder: Decoder = "auto") -> VideoReader:
    """A reader of a file.

    Args:
        path: The file.
        decoder: ``decord`` (fast, refuses files that it would not be exact on), ``av`` (reads all that FFmpeg reads), or
            ``auto``: the first where it can, else the second.

    Raises:
        BadVideo: Where it can't be read.
    """
    return READERS[decoder](path)  # type: ignore[return-value]


# -- helpers -------------------------------------------------------------------------------------------------------

FAR = 16
"""From how many frames on it is quicker to seek to a key frame than to decode up to it."""


def runs(wanted: Sequence[int], keys: np.ndarray) -> list[tuple[int, list[int]]]:
    """Sorted frame numbers, cut where a later key frame lets decoding skip more than a few frames.

    Returns:
        The key frame to begin each run at (0 is the file's start), and its frames.
    """
    found: list[tuple[int, list[int]]] = []
    for number in wanted:
        before = int(np.searchsorted(keys, number, side="right")) - 1
        key = int(keys[before]) if before >= 0 else 0
        if not found or key - found[-1][1][-1] > FAR:
            found.append((key, []))
        found[-1][1].append(number)
    return found


def resize(frames: Frames, size: Size) -> Frames:
    """Frames scaled to a height and width: averaging where they shrink, bicubic where they grow."""
    import cv2

    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    shrinks = height * width < frames.shape[1] * frames.shape[2]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        cv2.resize(np.ascontiguousarray(frame), (width, height), dst=target, interpolation=method)
    return out


@functools.cache
def _decord() -> Any:
    """decord, which would otherwise write FFmpeg's messages to stderr."""
    import decord

    if int(decord.__version__.split(".")[0]) < 3:
        raise ImportError(f"decord {decord.__version__} is the old distribution: install decord2, and uninstall decord")
    decord.logging.set_level(decord.logging.QUIET)
    return decord


@functools.cache
def _av() -> Any:
    """PyAV, likewise."""
    import av

    av.logging.set_level(None)
    return av
