"""Which frames make a clip, at constant and at changing rates."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from support.clips import numbered, numbers, uneven, write

from muybridge.data.account import BadVideo
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.data.reading import Reading, read_clip, survey
from muybridge.data.windows import (
    Windows,
    available,
    centres,
    check_span,
    cover,
    drawn,
    every,
    last_start,
    nearest,
    pick,
)
from muybridge.errors import UsageError

STEADY = np.arange(240) / 24.0


def random_times(seed: int, count: int = 120) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).uniform(0.01, 0.12, count))


def test_nearest_is_the_nearest_by_brute_force() -> None:
    for seed in range(5):
        times = random_times(seed)
        wanted = np.random.default_rng(seed + 100).uniform(times[0], times[-1], 50)
        assert (nearest(times, wanted) == np.abs(times[None] - wanted[:, None]).argmin(1)).all()
    assert nearest(np.array([0.0, 1.0]), np.array([0.5])).tolist() == [0]
    assert nearest(np.array([3.0]), np.array([0.0, 9.0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (Windows(), [10, 11, 12, 13, 14]),
        (Windows(stride=3), [10, 13, 16, 19, 22]),
        (Windows(fps=24), [10, 11, 12, 13, 14]),
        (Windows(fps=8), [10, 13, 16, 19, 22]),
        (Windows(fps=16), [10, 11, 13, 14, 16]),
        (Windows(fps=48), [10, 10, 11, 11, 12]),
    ],
)
def test_frames_of_a_steady_video(windows: Windows, expected: list[int]) -> None:
    assert pick(STEADY, 10, 5, windows) == expected


def test_frames_of_an_uneven_video_follow_its_times_and_not_its_average_rate() -> None:
    times = np.array(uneven(60)) / 1000
    picked = pick(times, 0, 20, Windows(fps=10))
    assert np.abs(times[picked] - np.arange(20) / 10).max() <= 0.05 + 1e-9
    rate = (len(times) - 1) / times[-1]
    assert picked != [round(i * rate / 10) for i in range(20)]


@pytest.mark.parametrize("windows", [Windows(), Windows(stride=4), Windows(fps=8), Windows(fps=11.7), Windows(fps=30)])
@pytest.mark.parametrize("span", [None, (13, 101)])
def test_windows_lie_inside_and_the_last_start_is_the_last(windows: Windows, span: tuple[int, int] | None) -> None:
    for times in (STEADY, random_times(3, 240)):
        first, stop = span or (0, len(times))
        last = last_start(times, 17, windows, span)
        for start in range(first, last + 1):
            assert cover(pick(times, start, 17, windows))[1] <= stop
        if windows.fps is None:
            assert last + 16 * windows.stride == stop - 1
        else:
            # Within what its last frame stands for; a start later, and it is not.
            following = times[stop] if stop < len(times) else times[-1] + np.median(np.diff(times))
            end = (times[stop - 1] + following) / 2
            assert times[last] + 16 / windows.fps <= end + 1e-5
            assert times[last + 1] + 16 / windows.fps > end


def test_a_video_of_exactly_the_clip_s_length_fits_and_one_frame_less_does_not() -> None:
    for windows, needed in ((Windows(), 81), (Windows(stride=2), 161), (Windows(fps=16), 121), (Windows(fps=24), 81)):
        assert check_span(STEADY[:needed], 81, windows, None) == (0, 0)
        with pytest.raises(
            BadVideo, match=f"too short: {needed - 1} frames at 24 per second, and a clip takes 81 frames"
        ):
            check_span(STEADY[: needed - 1], 81, windows, None)
    with pytest.raises(BadVideo, match="frames 10 to 300 are asked for and it has 240"):
        check_span(STEADY, 9, Windows(), (10, 300))


def test_available_is_the_longest_clip_that_fits() -> None:
    for windows in (Windows(), Windows(stride=3), Windows(fps=10), Windows(fps=29.97)):
        for times in (STEADY, random_times(1)):
            longest = available(times, windows)
            assert last_start(times, longest, windows) >= 0
            assert last_start(times, longest + 1, windows) == -1


def test_the_centre_is_in_the_middle() -> None:
    for windows in (Windows(), Windows(stride=2), Windows(fps=8)):
        (start,) = centres(STEADY, 17, windows)
        first, stop = cover(pick(STEADY, start, 17, windows))
        assert abs(first - (240 - stop)) <= 1
    (start,) = centres(STEADY, 17, Windows(), (100, 140))
    assert abs((start - 100) - (140 - start - 17)) <= 1


def test_several_centres_are_spread_and_do_not_overlap() -> None:
    for windows in (Windows(count=4), Windows(count=4, fps=12)):
        starts = centres(STEADY, 17, windows)
        spans = [cover(pick(STEADY, s, 17, windows)) for s in starts]
        assert len(spans) == 4
        assert spans[0][0] == 0
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert spans[-1][1] >= 239
    assert len(centres(STEADY[:40], 17, Windows(count=4))) == 2
    assert len(centres(STEADY[:20], 17, Windows(count=4))) == 1


def test_all_windows_come_one_after_another() -> None:
    assert every(STEADY, 17, Windows("all")) == list(range(0, 224, 17))
    assert every(STEADY, 17, Windows("all", stride=2)) == list(range(0, 208, 34))
    assert every(STEADY, 17, Windows("all", step=4)) == list(range(0, 224, 4))
    assert every(STEADY, 17, Windows("all", fps=12))[:3] == [0, 34, 68]
    assert every(STEADY, 9, Windows("all"), (100, 130)) == [100, 109, 118]


def test_random_windows_are_a_function_of_seed_and_key_and_reach_every_start() -> None:
    windows = Windows("random")
    times = STEADY[:20]
    draws = [drawn(times, 17, windows, (epoch, "clip", 0), 0) for epoch in range(200)]
    assert draws == [drawn(times, 17, windows, (epoch, "clip", 0), 0) for epoch in range(200)]
    assert set(draws) == {0, 1, 2, 3}
    counts = np.bincount(draws)
    # 200 draws of 4: a standard deviation of 6.1 around 50.
    assert np.abs(counts - 50).max() < 25
    for other in (
        [drawn(times, 17, windows, (epoch, "other", 0), 0) for epoch in range(200)],
        [drawn(times, 17, windows, (epoch, "clip", 1), 0) for epoch in range(200)],
        [drawn(times, 17, windows, (epoch, "clip", 0), 1) for epoch in range(200)],
    ):
        assert other != draws
    assert {drawn(STEADY, 17, windows, (e, "x", 0), 0, (50, 68)) for e in range(40)} == {50, 51}


@pytest.mark.parametrize(
    "windows", [Windows("all"), Windows("all", fps=12), Windows(count=3), Windows(count=3, fps=20)]
)
def test_a_clip_known_by_its_part_is_read_as_it_was_cut(windows: Windows, tmp_path: Path) -> None:
    for name, times in (("steady", None), ("uneven", uneven(60))):
        path = write(tmp_path / f"{name}.mp4", numbered(60), milliseconds=times)
        bucket = Bucket(9, 48, 64)
        found = survey(Clip(name, path), [bucket], Reading(windows))
        assert len(found.clips) >= 3
        for clip in found.clips:
            assert clip.span is not None
            assert clip.id == f"{name}@{clip.span[0]}-{clip.span[1]}"
            taken = read_clip(clip, bucket, Reading(windows))
            assert taken.id == clip.id
            assert cover(numbers(taken.frames)) == clip.span
            assert clip.name == name


def test_a_random_window_is_named_by_what_it_took_and_changes_with_the_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", numbered(60))
    reading, bucket = Reading(Windows("random", fps=12), seed=3), Bucket(5, 48, 64)
    taken = [read_clip(Clip("a", path), bucket, reading, epoch) for epoch in range(4)]
    for t in taken:
        found = numbers(t.frames)
        assert found == list(range(found[0], found[0] + 9, 2))
        assert t.id == f"a@{found[0]}-{found[-1] + 1}"
        assert t.fps == 12
    assert len({t.id for t in taken}) > 1
    part = read_clip(Clip("a@20-31", path, span=(20, 31)), bucket, reading)
    assert part.id.startswith("a@2")
    assert min(numbers(part.frames)) >= 20
    assert max(numbers(part.frames)) < 31


def test_settings_that_contradict_one_another_are_refused() -> None:
    for wrong in (dict(fps=8.0, stride=2), dict(step=3), dict(mode="all", count=2), dict(count=0), dict(fps=-1.0)):
        with pytest.raises(UsageError):
            Windows(**wrong)  # type: ignore[arg-type]
