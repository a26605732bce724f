"""Frames by number, read off the pixels: every decoder, container, codec and way of asking."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.clips import QUIET, cut, number, numbered, numbers, rotate, uneven, write

from muybridge.data import decoding
from muybridge.data.account import BadVideo
from muybridge.data.decoding import AvReader, DecordReader, open_video, read_index, runs
from muybridge.data.memory import Memory
from muybridge.errors import UsageError
from muybridge.video import frame_count, frame_rate, read_frames

COUNT = 40
FRAMES = numbered(COUNT)


def _turned(path: Path, turns: int) -> Path:
    return rotate(write(path.with_suffix(".plain.mp4"), np.rot90(FRAMES, turns, axes=(1, 2))), path, turns)


# name: (how it is made, number of its first frame, whether decord is exact on it)
FILES: dict[str, tuple[Callable[[Path], Path], int, bool]] = {
    "h264.mp4": (lambda p: write(p, FRAMES), 0, True),
    "no-b.mkv": (lambda p: write(p, FRAMES, b_frames=0), 0, True),
    "vfr.mp4": (lambda p: write(p, FRAMES, milliseconds=uneven(COUNT)), 0, True),
    "vfr.mkv": (lambda p: write(p, FRAMES, milliseconds=uneven(COUNT)), 0, True),
    "late.mkv": (lambda p: write(p, FRAMES, milliseconds=[700 + 40 * i for i in range(COUNT)]), 0, True),
    "10-bit.mp4": (lambda p: write(p, FRAMES, pixel_format="yuv420p10le"), 0, True),
    "vp9.webm": (lambda p: write(p, FRAMES, codec="libvpx-vp9"), 0, True),
    "fragments.mp4": (lambda p: write(p, FRAMES, container={"movflags": "frag_keyframe+empty_moov"}), 0, True),
    "odd.mp4": (lambda p: write(p, numbered(COUNT, height=51, width=67), pixel_format="yuv444p"), 0, True),
    "turned-1.mp4": (lambda p: _turned(p, 1), 0, True),
    "turned-2.mp4": (lambda p: _turned(p, 2), 0, True),
    "turned-3.mp4": (lambda p: _turned(p, 3), 0, True),
    "hevc.mp4": (lambda p: write(p, FRAMES, codec="libx265", options=QUIET), 0, False),
    "open-gop.mp4": (
        lambda p: write(p, FRAMES, b_frames=3, options={"preset": "medium", "x264-params": "open-gop=1:keyint=12"}),
        0,
        False,
    ),
    "cut.mp4": (lambda p: cut(write(p.with_suffix(".whole.mp4"), FRAMES), p, 17), 17, False),
    "mpeg4.avi": (lambda p: write(p, FRAMES, codec="mpeg4"), 0, False),
    "h264.avi": (lambda p: write(p, FRAMES), 0, False),
    "transport.ts": (lambda p: write(p, FRAMES), 0, False),
    "program.mpg": (lambda p: write(p, FRAMES, codec="mpeg2video"), 0, False),
    "bare.h264": (lambda p: write(p, FRAMES), 0, False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("files")

    def get(name: str) -> Path:
        return folder / name if (folder / name).exists() else FILES[name][0](folder / name)

    return get


@pytest.mark.parametrize("name", FILES)
def test_every_frame_asked_for_is_the_one_that_comes(name: str, files: Callable[[str], Path]) -> None:
    path, (_, first, by_decord) = files(name), FILES[name]
    rng = random.Random(0)
    for decoder in ("auto", "av", "decord") if by_decord else ("auto", "av"):
        video = open_video(path, decoder)
        count = COUNT - first
        assert len(video) == count
        for wanted in (
            list(range(count)),
            list(range(1, count, 3)),
            [count - 1],
            [rng.randrange(count) for _ in range(8)],
            [5, 5, 4],
            *([rng.randrange(count)] for _ in range(6)),
        ):
            assert numbers(video.frames(wanted)) == [first + i for i in wanted], (decoder, wanted)
            assert numbers(video.frames(wanted, (30, 44))) == [first + i for i in wanted], (decoder, wanted, "scaled")
        assert bool(video.remark) == (decoder == "auto" and not by_decord)


@pytest.mark.parametrize("name", [name for name, (_, _, exact) in FILES.items() if not exact])
def test_decord_refuses_the_files_it_would_miscount(name: str, files: Callable[[str], Path]) -> None:
    with pytest.raises(BadVideo, match="not exact"):
        open_video(files(name), "decord")


def test_of_a_large_file_only_what_is_wanted_is_read(
    files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muybridge.data.decoding.LARGE", 1000)
    video = open_video(files("h264.mp4"))
    assert numbers(video.frames([30, 2])) == [30, 2]
    assert "large file" in video.remark


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_times_are_the_frames_own(name: str, files: Callable[[str], Path]) -> None:
    video = open_video(files(name))
    assert np.allclose(video.times, np.array(uneven(COUNT)) / 1000, atol=1e-3)
    assert video.rate == pytest.approx((COUNT - 1) / video.times[-1])
    late = open_video(files("late.mkv"))
    assert np.allclose(late.times, np.arange(COUNT) * 0.04, atol=1e-3)


@pytest.mark.parametrize("name", ["h264.mp4", "10-bit.mp4", "odd.mp4", "turned-1.mp4", "turned-2.mp4", "turned-3.mp4"])
def test_both_decoders_give_the_same_picture_in_the_same_place(name: str, files: Callable[[str], Path]) -> None:
    path = files(name)
    one, other = DecordReader(path), AvReader(path)
    assert one.size == other.size == ((51, 67) if name == "odd.mp4" else (48, 64))
    for size in (None, one.size, (24, 32), (24, 33), (31, 50), (40, 16), (96, 130), (108, 144)):
        a, b = one.frames([3, 30], size), other.frames([3, 30], size)
        assert a.shape == b.shape == (2, *(size or one.size), 3)
        # Scalers differ by a few levels at edges; a row or column out of place would differ by hundreds.
        assert np.abs(a.astype(int) - b).mean() < 6.0, size


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path) -> None:
    path = write(tmp_path / "wide.mp4", FRAMES[:9], aspect=Fraction(3, 2))
    for reader in (DecordReader(path), AvReader(path)):
        assert reader.size == (48, 96)
        assert reader.frames([4]).shape == (1, 48, 96, 3)
        assert number(reader.frames([4])[0]) == 4


def test_a_number_beyond_the_end_is_an_error_and_not_another_frame(files: Callable[[str], Path]) -> None:
    for decoder in ("decord", "av"):
        for wrong in (COUNT, -1):
            with pytest.raises(IndexError, match=f"frame {wrong}"):
                open_video(files("h264.mp4"), decoder).frames([0, wrong])


def test_a_file_that_changes_is_looked_into_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", FRAMES[:10])
    assert len(read_index(path).times) == 10
    write(path, FRAMES[:20])
    os.utime(path, ns=(1, 1))
    assert len(open_video(path)) == 20


def test_indices_are_kept_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{i}.mp4", FRAMES[:20]) for i in range(3)]
    one = read_index(paths[0]).nbytes
    assert one >= 20 * 16
    monkeypatch.setattr(decoding, "_indices", Memory(2 * one, lambda index: index.nbytes))
    first, second = read_index(paths[0]), read_index(paths[1])
    assert read_index(paths[0]) is first
    assert read_index(paths[2]) is read_index(paths[2])
    assert read_index(paths[0]) is first, "it was used after the second"
    assert len(decoding._indices) == 2
    assert decoding._indices.size <= decoding._indices.limit == 2 * one
    assert read_index(paths[1]) is not second


def test_the_memory_keeps_what_was_used_last() -> None:
    made: list[str] = []

    def make(value: str) -> str:
        made.append(value)
        if value == "bad":
            raise OSError(value)
        return value

    memory: Memory[str] = Memory(5, len)
    for value in ("aa", "bb", "aa", "cc", "aa", "bb"):
        assert memory.get(value, lambda value=value: make(value)) == value
    assert made == ["aa", "bb", "cc", "bb"]
    with pytest.raises(OSError, match="bad"):
        memory.get("bad", lambda: make("bad"))
    assert memory.get("longer than all", lambda: make("longer than all")) == "longer than all"
    assert (len(memory), memory.size) == (1, 15)
    assert memory.get("d", lambda: make("d")) == "d"
    assert (len(memory), memory.size) == (1, 1)


def test_runs_begin_at_the_last_key_frame_that_saves_decoding() -> None:
    keys = np.array([0, 48, 96, 144])
    assert runs([3, 40], keys) == [(0, [3, 40])]
    assert runs([3, 40, 100], keys) == [(0, [3, 40]), (96, [100])]
    assert runs([46, 49], keys) == [(0, [46, 49])]
    assert runs([150], keys) == [(144, [150])]
    rng = random.Random(1)
    for _ in range(50):
        wanted = sorted(rng.sample(range(200), 9))
        cut_up = runs(wanted, keys)
        assert [i for _, run in cut_up for i in run] == wanted
        assert all(key <= run[0] and key in keys for key, run in cut_up)


def test_reading_a_video_for_people_says_what_is_wrong(tmp_path: Path, files: Callable[[str], Path]) -> None:
    assert frame_count(files("cut.mp4")) == COUNT - 17
    assert frame_rate(files("h264.mp4")) == pytest.approx(24.0)
    assert numbers(read_frames(files("hevc.mp4"), [9, 2, 21])) == [9, 2, 21]
    with pytest.raises(UsageError, match="missing"):
        frame_count(tmp_path / "nothing.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UsageError, match="0 bytes"):
        read_frames(tmp_path / "empty.mp4", [0])
