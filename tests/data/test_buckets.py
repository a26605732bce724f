"""Which bucket a clip goes to, what is said of it, and the order of an epoch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from support.clips import folder_of, make_bad, numbered, numbers_of, write
from support.jobs import finetuning, trainer
from support.ranks import run_ranks

from datamodules import VideoData
from datamodules.clips import ClipSampler
from muybridge.data.account import read
from muybridge.data.buckets import Bucket, BucketBatches, assign, kept, rows, show
from muybridge.errors import UsageError

WIDE, TALL, SQUARE, LONG = Bucket(9, 48, 80), Bucket(9, 80, 48), Bucket(9, 64, 64), Bucket(17, 48, 80)
BUCKETS = [WIDE, TALL, SQUARE, LONG]


def test_what_is_kept_counts_what_is_seen_and_at_what_scale() -> None:
    assert kept((48, 80), (48, 80)) == pytest.approx(1.0)
    assert kept((48, 80), (96, 160)) == kept((48, 80), (24, 40)) == pytest.approx(0.5)
    assert kept((48, 48), (48, 96)) == pytest.approx(0.5)
    assert kept((48, 48), (48, 96), "letterbox") == pytest.approx(0.5)
    assert kept((48, 48), (96, 384)) == pytest.approx(0.125)
    assert kept((48, 80), (100, 200), region=(0, 80, 0, 48)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("frames", "size", "bucket"),
    [
        (9, (480, 800), WIDE),
        (16, (480, 854), WIDE),
        (17, (480, 854), LONG),
        (500, (1080, 1920), LONG),
        (9, (1920, 1080), TALL),
        (500, (1920, 1080), TALL),
        (12, (720, 700), SQUARE),
        (12, (40, 40), SQUARE),
    ],
)
def test_a_clip_goes_where_most_of_its_picture_stays(frames: int, size: tuple[int, int], bucket: Bucket) -> None:
    chosen = assign(BUCKETS, frames, size)
    assert chosen is not None
    assert BUCKETS[chosen] == bucket


def test_several_resolutions() -> None:
    buckets = [Bucket(49, 480, 832), Bucket(49, 720, 1280)]
    assert [assign(buckets, 60, size) for size in ((360, 640), (480, 854), (720, 1280), (1080, 1920))] == [0, 0, 1, 1]


def test_a_video_too_short_for_all_goes_nowhere() -> None:
    assert assign(BUCKETS, 8, (480, 854)) is None


def random_buckets(seed: int, count: int = 203) -> list[int | None]:
    rng = random.Random(seed)
    return [rng.choice([0, 0, 0, 1, 2, None]) for _ in range(count)]


@pytest.mark.parametrize("leftover", ["pad", "drop"])
@pytest.mark.parametrize("step", [1, 2, 6])
def test_every_step_is_of_one_bucket_and_every_clip_comes_once(leftover: str, step: int) -> None:
    bucket_of = random_buckets(step)
    batches = BucketBatches(bucket_of, step, leftover, seed=5)  # type: ignore[arg-type]
    for epoch in range(3):
        order = batches.order(epoch)
        assert len(order) == len(batches)
        steps = [order[i : i + step] for i in range(0, len(order), step)]
        assert all(len({bucket_of[max(s, ~s)] for s in part}) == 1 for part in steps)
        assert None not in {bucket_of[max(s, ~s)] for s in order}
        counts = Counter(s for s in order if s >= 0)
        for bucket in (0, 1, 2):
            members = [s for s, b in enumerate(bucket_of) if b == bucket]
            held = [counts[s] for s in members]
            assert set(held) <= ({1} if leftover == "pad" else {0, 1})
            assert len(members) - sum(held) == (0 if leftover == "pad" else len(members) % step)
            fills = sum(s < 0 and bucket_of[~s] == bucket for s in order)
            assert fills == (-len(members) % step if leftover == "pad" else 0)
        assert sum(s < 0 for s in order) == batches.fills


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    bucket_of = random_buckets(0)
    one = BucketBatches(bucket_of, 4, seed=1)
    assert one.order(3) == BucketBatches(bucket_of, 4, seed=1).order(3)
    assert one.order(3) != one.order(4)
    assert one.order(3) != BucketBatches(bucket_of, 4, seed=2).order(3)
    still = BucketBatches(bucket_of, 1, shuffle=False)
    assert still.order(0) == sorted(
        (s for s, b in enumerate(bucket_of) if b is not None), key=lambda s: (bucket_of[s], s)
    )


def test_ranks_share_an_epoch_and_a_resumed_one_goes_on_where_it_was() -> None:
    bucket_of = random_buckets(9)
    whole = BucketBatches(bucket_of, 6, seed=1)

    def sampler(rank: int) -> ClipSampler:
        batches = BucketBatches(bucket_of, 6, seed=1)
        return ClipSampler(len(bucket_of), batches, batch_size=3, num_replicas=2, rank=rank, seed=1)

    ranks = [list(sampler(rank)) for rank in range(2)]
    assert [pair for both in zip(*ranks, strict=True) for pair in both] == [(0, s) for s in whole.order(0)]
    again = sampler(1)
    again.enter(4, 60)
    assert list(again) == [(4, s) for s in whole.order(4)[61::2]]
    assert list(again) == [(5, s) for s in whole.order(5)[1::2]]


def test_weights_share_an_epoch_between_buckets_and_within_them() -> None:
    bucket_of: list[int | None] = [0] * 50 + [1] * 50
    weights = [1.0] * 50 + [3.0] * 25 + [0.0] * 25
    batches = BucketBatches(bucket_of, 2, weights=weights)
    counts: Counter[int] = Counter()
    for epoch in range(200):
        order = batches.order(epoch)
        assert all(bucket_of[a] == bucket_of[b] for a, b in zip(order[::2], order[1::2], strict=True))
        counts.update(order)
    assert sum(counts[s] for s in range(75, 100)) == 0
    # A bucket's steps are whole batches, so that 40 and 60 are exact; within a bucket, 160 and 480 with deviations of 13, 22.
    assert sum(counts[s] for s in range(50)) == 40 * 200
    assert sum(counts[s] for s in range(50, 75)) == 60 * 200
    assert all(abs(counts[s] - 160) < 5 * math.sqrt(160) for s in range(50))
    assert all(abs(counts[s] - 480) < 5 * math.sqrt(480) for s in range(50, 75))


def test_the_account_adds_up() -> None:
    bucket_of = random_buckets(4)
    enlarged = [s % 7 == 0 for s in range(len(bucket_of))]
    for leftover in ("pad", "drop"):
        batches = BucketBatches(bucket_of, 8, leftover)  # type: ignore[arg-type]
        table = rows([WIDE, TALL, SQUARE, LONG], bucket_of, batches, enlarged)
        assert sum(row.clips for row in table) == sum(b is not None for b in bucket_of)
        assert sum(row.clips + row.empty - row.dropped for row in table) == len(batches)
        assert table[3].clips == table[3].batches == 0
        assert sum(row.enlarged for row in table) == sum(
            e and b is not None for e, b in zip(enlarged, bucket_of, strict=True)
        )
    text = show(table, ["too short: 3 frames", "too short: 4 frames", "no video: audio only"])
    assert "9x48x80" in text
    assert "left out: 2, too short" in text
    assert "left out: 1, no video" in text
    assert "left out: none" in show(table, [])


def test_nothing_but_leftovers_is_an_error() -> None:
    with pytest.raises(UsageError, match="no bucket holds the 4 clips"):
        BucketBatches([0, 0, 1, 1], 4, "drop")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three wide clips, two tall ones, one long, and two that go nowhere."""
    folder = folder_of(tmp_path / "clips", 3, 12)
    for i, (height, width, frames) in enumerate([(64, 48, 12), (64, 48, 12), (48, 64, 30)]):
        write(folder / f"other-{i}.mp4", numbered(frames, 100 * i, height, width))
        (folder / f"other-{i}.txt").write_text("another", encoding="utf-8")
    make_bad("one frame", folder)
    make_bad("audio only", folder)
    return folder


def test_a_datamodule_yields_batches_of_one_shape_and_leaves_out_what_fits_nowhere(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    buckets = [Bucket(9, 48, 64), Bucket(9, 64, 48), Bucket(25, 48, 64)]
    data = VideoData(
        str(mixed), str(mixed), buckets=buckets, batch_size=2, num_workers=0, max_bad_fraction=0.3, caption=None
    )
    data.setup("fit")
    assert data.clip_sizes == [(9, 48, 64), (9, 64, 48), (25, 48, 64)]
    loader = data.train_dataloader()
    seen: Counter[str] = Counter()
    slots = 0
    for batch in loader:
        assert batch.pixels is not None
        assert tuple(batch.pixels.shape[2:]) in data.clip_sizes
        there = batch.present.tolist() if batch.present is not None else [True] * len(batch)
        seen.update(name for name, present in zip(batch.ids, there, strict=True) if present)
        slots += len(batch)
        for clip in batch.pixels:
            found = numbers_of(clip)
            assert found == list(range(found[0], found[0] + len(found)))
    names = {f"clip-{i}" for i in range(3)} | {f"other-{i}" for i in range(3)}
    assert seen == Counter(names)
    # 3 wide ones and 1 long one do not fill pairs.
    assert slots == len(loader) * 2 == 8
    shapes = [tuple(b.pixels.shape[2:]) for b in data.val_dataloader()]
    assert shapes == [(9, 48, 64)] * 2 + [(9, 64, 48), (25, 48, 64)]
    with pytest.raises(UsageError, match=r"2 of 8 clips skipped \(25.0%\): 1 no video, 1 too short"):
        VideoData(str(mixed), buckets=buckets, max_bad_fraction=0.2).setup("fit")
    assert sorted(e["id"] for e in read(tmp_path / "bad_videos.jsonl")) == ["audio-only", "one-frame"]
    with pytest.raises(UsageError, match="on_error is raise"):
        VideoData(str(mixed), buckets=buckets, on_error="raise").setup("fit")


def test_all_windows_of_long_videos_are_clips_of_their_own(mixed: Path) -> None:
    data = VideoData(str(mixed), frames=9, height=48, width=64, window="all", num_workers=0, max_bad_fraction=0.3)
    data.setup("fit")
    ids = [clip.id for clip in data.train_dataset().clips]
    assert [i for i in ids if i.startswith("other-2")] == ["other-2@0-9", "other-2@9-18", "other-2@18-27"]
    assert [i for i in ids if i.startswith("clip-0")] == ["clip-0@0-9"]
    # What can't be used keeps one slot.
    assert [i for i in ids if "@" not in i] == ["audio-only", "one-frame"]
    batches = {b.ids[0]: b for b in data.train_dataloader()}
    assert numbers_of(batches["other-2@9-18"].pixels[0]) == list(range(209, 218))
    assert batches["audio-only"].present.tolist() == [False]
    assert batches["audio-only"].remarks == ["no video: audio only"]


class Seen(pl.Callback):
    """Which clips a rank trained on, in what shape; and a checkpoint after every step, as a preempted run leaves."""

    def __init__(self, save: str = "") -> None:
        self.steps: list[tuple[list[str], tuple[int, ...]]] = []
        self.save = save

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / self.save)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((list(batch.ids), tuple(batch.pixels.shape[2:])))


def _shapes(folder: Path) -> Path:
    """Nine clips of two shapes and two lengths, and one that no bucket takes."""
    for i, (height, width, frames) in enumerate([(16, 32, 12)] * 4 + [(32, 16, 12)] * 3 + [(16, 32, 20)] * 2):
        folder.mkdir(exist_ok=True)
        write(folder / f"clip-{i}.mp4", numbered(frames, 100 * i, height, width))
        (folder / f"clip-{i}.txt").write_text("a clip", encoding="utf-8")
    make_bad("one frame", folder)
    return folder


def _fit(checkpoint: Path, folder: Path, root: Path, workers: int, **run: Any) -> Any:
    seen, batch_size = Seen(run.pop("save", "")), run.pop("batch_size", 2)
    ckpt = run.pop("ckpt_path", None)
    ranks = dict(devices=2, strategy="ddp") if run.pop("ranks", 1) == 2 else {}
    fit = trainer(root, callbacks=[seen], **{"max_epochs": 1, **run, **ranks})
    data = VideoData(
        str(folder),
        buckets=[Bucket(9, 16, 32), Bucket(9, 32, 16), Bucket(17, 16, 32)],
        window="random",
        batch_size=1 if ranks else batch_size,
        num_workers=workers,
        max_bad_fraction=0.5,
    )
    fit.fit(finetuning(checkpoint), data, ckpt_path=ckpt)
    return seen.steps if ranks else (seen.steps, fit)


def _ranks_of_buckets(checkpoint: Path, folder: Path, root: Path) -> Any:
    return _fit(checkpoint, folder, root, 0, ranks=2)


def test_two_ranks_share_the_looking_and_every_step_has_one_shape(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = _shapes(tmp_path / "clips")
    one, other = run_ranks(_ranks_of_buckets, tiny_checkpoint("wan"), folder, tmp_path)
    assert [shape for _, shape in one] == [shape for _, shape in other]
    assert len({shape for _, shape in one}) == 3
    alone, _ = _fit(tiny_checkpoint("wan"), folder, tmp_path, 0)
    assert [(a[0] + b[0], a[1]) for a, b in zip(one, other, strict=True)] == alone
    names = Counter(name.partition("@")[0] for ids, _ in alone for name in ids)
    assert set(names) == {f"clip-{i}" for i in range(9)}
    # Three of a bucket do not fill pairs.
    assert sorted(names.values()) == [1] * 8 + [2]
    assert [e["id"] for e in read(tmp_path / "bad_videos.jsonl")] == ["one-frame"]


def test_an_interrupted_epoch_of_buckets_goes_on_with_the_same_windows_of_the_clips_that_are_left(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = _shapes(tmp_path / "clips")
    whole, _ = _fit(tiny_checkpoint("wan"), folder, tmp_path / "a", 0, max_epochs=2)
    assert len(whole) == 10
    begun, _ = _fit(tiny_checkpoint("wan"), folder, tmp_path / "b", 1, max_steps=7, max_epochs=2, save="stopped.ckpt")
    stopped = str(tmp_path / "b" / "stopped.ckpt")
    rest, _ = _fit(tiny_checkpoint("wan"), folder, tmp_path / "b", 0, max_epochs=2, ckpt_path=stopped)
    assert begun + rest == whole
    with pytest.raises(UsageError, match="global batches of 2 clips"):
        _fit(tiny_checkpoint("wan"), folder, tmp_path / "b", 0, batch_size=3, max_epochs=2, ckpt_path=stopped)
