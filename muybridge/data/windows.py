"""Which frames of a video make a clip: resampled by the frames' own times, one window or several.

A window begins at a source frame; its ``k``-th frame is the source frame nearest to ``start + k / fps`` (the earlier of two
equally near). Without a target rate it is every ``stride``-th source frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import torch

from muybridge.data.account import BadVideo
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError

Span = tuple[int, int]
"""Source frames from the first to below the second."""

SLACK = 1e-6
"""Seconds within which two times are equal, so that rounding never decides between two frames."""


@dataclass(frozen=True)
class Windows:
    """Which stretches of a video become clips.

    Args:
        mode: ``centre``: evenly spread, one in the middle. ``random``: drawn anew every epoch. ``all``: one after another.
        count: How many of a video; ``all`` takes as many as there are.
        step: Frames of a clip from one window of ``all`` to the next; the clip's length, so that none overlap, where not given.
        fps: Frames per second of a clip; the video's own where not given.
        stride: Take every so many source frames, where no ``fps`` is given.
    """

    mode: Literal["centre", "random", "all"] = "centre"
    count: int = 1
    step: Optional[int] = None
    fps: Optional[float] = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.stride < 1 or (self.step is not None and self.step < 1):
            raise UsageError(
                f"clips_per_video is {self.count}, stride is {self.stride}, window_step is {self.step}", "1 or more"
            )
        if self.fps is not None and self.fps <= 0:
            raise UsageError(f"fps is {self.fps}", "above 0")
        if self.fps is not None and self.stride > 1:
            raise UsageError(f"both fps ({self.fps:g}) and stride ({self.stride}) are given", "one of them")
        if self.step is not None and self.mode != "all":
            raise UsageError(f"window_step is given and the window is {self.mode}", "window_step goes with window: all")
        if self.count > 1 and self.mode == "all":
            raise UsageError(
                f"clips_per_video is {self.count} and the window is all", "all takes every window", "leave it out"
            )

    @property
    def needs_lengths(self) -> bool:
        """Whether videos must be looked into before it is known how many clips there are."""
        return self.mode == "all" or (self.mode == "centre" and self.count > 1)


def interval(times: np.ndarray) -> float:
    """The usual time from one frame to the next."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of the sorted times is nearest to each wanted one; the earlier where two are."""
    after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    earlier = wanted - times[after - 1] <= times[after] - wanted + SLACK
    return np.where(earlier, after - 1, after)


def pick(times: np.ndarray, start: int, frames: int, windows: Windows) -> list[int]:
    """The source frames of the window that begins at ``start``."""
    if windows.fps is None:
        return list(range(start, start + (frames - 1) * windows.stride + 1, windows.stride))
    picked = nearest(times, times[start] + np.arange(frames) / windows.fps)
    return [int(i) for i in picked]


def last_start(times: np.ndarray, frames: int, windows: Windows, span: Optional[Span] = None) -> int:
    """The last source frame that a window can begin at; ``first - 1`` where there is none."""
    first, stop = span or (0, len(times))
    if windows.fps is None:
        return max(stop - 1 - (frames - 1) * windows.stride, first - 1)
    latest = _end(times, stop) - (frames - 1) / windows.fps + SLACK
    return int(np.searchsorted(times[first:stop], latest, side="right")) + first - 1


def available(times: np.ndarray, windows: Windows, span: Optional[Span] = None) -> int:
    """How many frames the longest clip of a video could have."""
    first, stop = span or (0, len(times))
    if windows.fps is None:
        return (stop - first - 1) // windows.stride + 1
    return int((_end(times, stop) - times[first] + SLACK) * windows.fps) + 1


def _end(times: np.ndarray, stop: int) -> float:
    """Until when the frame before ``stop`` is nearer than the next one."""
    return float((times[stop - 1] + times[stop]) / 2 if stop < len(times) else times[-1] + interval(times) / 2)


def check_span(times: np.ndarray, frames: int, windows: Windows, span: Optional[Span]) -> tuple[int, int]:
    """First and last start of a window, or why there is none."""
    first, stop = span or (0, len(times))
    if not 0 <= first < stop <= len(times):
        raise BadVideo(f"too short: frames {first} to {stop} are asked for and it has {len(times)}")
    last = last_start(times, frames, windows, (first, stop))
    if last < first:
        there = "1 frame" if stop - first == 1 else f"{stop - first} frames at {1 / interval(times):.4g} per second"
        needed = f"{frames} frames"
        if windows.fps is not None:
            needed += f" at {windows.fps:g} per second ({(frames - 1) / windows.fps:.2f} s)"
        elif windows.stride > 1:
            needed += f", every {windows.stride}th"
        raise BadVideo(f"too short: {there}, and a clip takes {needed}")
    return first, last


def centres(times: np.ndarray, frames: int, windows: Windows, span: Optional[Span] = None) -> list[int]:
    """Starts of up to ``count`` evenly spread windows; fewer where more would overlap, and always one."""
    first, last = check_span(times, frames, windows, span)
    length = (frames - 1) / windows.fps if windows.fps else float((frames - 1) * windows.stride)
    gap = 1 / windows.fps if windows.fps else float(windows.stride)
    clock = times if windows.fps else np.arange(len(times), dtype=np.float64)
    room = float(clock[last] - clock[first])
    count = min(windows.count, int((room + SLACK) // (length + gap)) + 1)
    wanted = clock[first] + room * (np.linspace(0, 1, count) if count > 1 else np.array([0.5]))
    return [int(i) for i in nearest(clock, wanted).clip(first, last)]


def every(times: np.ndarray, frames: int, windows: Windows, span: Optional[Span] = None) -> list[int]:
    """Starts of all windows, one after another."""
    first, last = check_span(times, frames, windows, span)
    step = windows.step or frames
    if windows.fps is None:
        return list(range(first, last + 1, step * windows.stride))
    count = int((times[last] - times[first] + SLACK) * windows.fps // step) + 1
    starts = nearest(times, times[first] + np.arange(count) * step / windows.fps).clip(first, last)
    return [int(i) for i in dict.fromkeys(starts.tolist())]


def drawn(
    times: np.ndarray, frames: int, windows: Windows, key: Sequence[str | int], seed: int, span: Optional[Span] = None
) -> int:
    """Start of a window that is a function of the seed and the key, each possible one as likely as another."""
    first, last = check_span(times, frames, windows, span)
    return int(torch.randint(first, last + 1, (), generator=keyed_generator(seed, "window", *key)))


def starts(times: np.ndarray, frames: int, windows: Windows, span: Optional[Span] = None) -> list[int]:
    """Starts of the windows that do not depend on the epoch."""
    return every(times, frames, windows, span) if windows.mode == "all" else centres(times, frames, windows, span)


def cover(picked: Sequence[int]) -> Span:
    """The stretch of source frames that a window lies in."""
    return picked[0], picked[-1] + 1
