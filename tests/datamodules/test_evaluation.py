"""Validation, test and predict: every sample counts once, and ranks take equally many steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.clips import folder_of, make_bad, numbered, write
from support.jobs import finetuning, trainer
from support.ranks import run_ranks

from callbacks.samples import Samples
from datamodules.evaluation import EvaluationSampler
from datamodules.prompts import PromptData
from datamodules.video import VideoData
from muybridge.data.buckets import Bucket
from muybridge.errors import UsageError

Seen = list[tuple[list[str], list[bool]]]

# -- the sampler alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch", "ranks"),
    [
        ([6], 2, 3),
        ([3], 1, 2),
        ([1], 1, 2),
        ([1], 4, 8),
        ([7], 2, 3),
        ([5, 1, 4], 2, 2),
        ([5, 0, 4], 3, 1),
        ([9], 4, 1),
    ],
)
def test_each_counts_once_and_every_rank_has_the_same_batches(sizes: list[int], batch: int, ranks: int) -> None:
    total = sum(sizes)
    groups = [part.tolist() for part in torch.arange(total).split(sizes)]
    group_of = {i: g for g, group in enumerate(groups) for i in group}
    rows = [list(EvaluationSampler(groups, batch, ranks, rank)) for rank in range(ranks)]
    assert len({len(row) for row in rows}) == 1
    assert sorted(i for row in rows for i in row if i >= 0) == list(range(total))
    steps = [[row[k : k + batch] for row in rows] for k in range(0, len(rows[0]), batch)]
    for step in steps:
        # One shape at a time, on all ranks, and never more steps than it takes.
        assert len({group_of[max(i, ~i)] for part in step for i in part}) == 1
        assert any(i >= 0 for part in step for i in part)
    if ranks == 1 and len(sizes) == 1:
        assert rows[0] == list(range(total)), "one process gets what there is and nothing else"


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing to evaluate"):
        EvaluationSampler([[], []])


# -- through Lightning -------------------------------------------------------------------------------------------------


class Watcher(pl.LightningModule):
    """Remembers the batches of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: Seen = []

    def _see(self, batch: Any, batch_idx: int) -> None:
        assert batch.present is None or batch.present.dtype == torch.bool
        self.seen.append((batch.ids, batch.present.tolist() if batch.present is not None else [True] * len(batch)))

    validation_step = test_step = predict_step = _see


def evaluate(verb: str, data: Any, root: str, **settings: Any) -> tuple[Seen, Any]:
    watcher, runner = Watcher(), trainer(root, **settings)
    getattr(runner, verb)(watcher, data)
    return watcher.seen, runner


def on_ranks(verb: str, kind: str, source: str, root: str) -> Seen:
    data: Any
    if kind == "prompts":
        data = PromptData(source, batch_size=2)
    else:
        data = VideoData(source, source, frames=5, height=16, width=16, num_workers=0)
    return evaluate(verb, data, root, devices=2, strategy="ddp")[0]


@pytest.mark.parametrize(
    ("verb", "count"), [("validate", 3), ("validate", 1), ("test", 3), ("predict", 3), ("predict", 1)]
)
def test_two_ranks_see_every_clip_once(verb: str, count: int, tmp_path: Path) -> None:
    videos = folder_of(tmp_path / "videos", count, frames=5)
    check(run_ranks(on_ranks, verb, "videos", str(videos), str(tmp_path)), [f"clip-{i}" for i in range(count)])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_two_ranks_predict_every_prompt_once(count: int, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(count)), encoding="utf-8")
    wanted = PromptData(str(file)).ids
    check(run_ranks(on_ranks, "predict", "prompts", str(file), str(tmp_path)), wanted)


def predicted(path: str, source: str, root: str) -> None:
    runner = trainer(root, devices=2, strategy="ddp", callbacks=[Samples()])
    runner.predict(finetuning(path), PromptData(source))


def test_two_ranks_write_a_video_of_every_prompt(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\n", encoding="utf-8")
    run_ranks(predicted, str(tiny_checkpoint("wan")), str(file), str(tmp_path))
    assert sorted(p.name for p in tmp_path.rglob("*.mp4")) == ["0000-a.mp4", "0001-b.mp4", "0002-c.mp4"]


def validated(path: str, source: str, root: str, devices: int) -> float:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if devices == 2 else {}
    data = VideoData(source, source, frames=5, height=16, width=16, num_workers=0)
    [found] = trainer(root, **options).validate(finetuning(path), data, verbose=False)
    return found["val/loss"]


def test_the_validation_loss_is_that_of_one_process(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Three clips on two ranks: were the repeat counted, the mean would be another."""
    path, videos = str(tiny_checkpoint("wan")), str(folder_of(tmp_path / "videos", 3, frames=5))
    alone = validated(path, videos, str(tmp_path), 1)
    assert run_ranks(validated, path, videos, str(tmp_path), 2) == pytest.approx([alone, alone], rel=1e-5)


def check(found: list[Seen], wanted: list[str]) -> None:
    first, second = found
    assert [len(ids) for ids, _ in first] == [len(ids) for ids, _ in second]
    slots = [slot for seen in found for ids, present in seen for slot in zip(ids, present, strict=True)]
    assert sorted(name for name, there in slots if there) == sorted(wanted)
    assert {name for name, _ in slots} == set(wanted)


def test_one_process_sees_plain_batches(tmp_path: Path) -> None:
    videos = str(folder_of(tmp_path / "videos", 3, frames=5))
    data = VideoData(videos, videos, frames=5, height=16, width=16, batch_size=2, num_workers=0)
    for verb in ("validate", "test", "predict"):
        assert evaluate(verb, data, str(tmp_path))[0] == [(["clip-0", "clip-1"], [True] * 2), (["clip-2"], [True])]
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert all(batch.present is None for batch in loader)


def test_what_fills_a_buckets_batches_counts_for_nothing(tmp_path: Path) -> None:
    """3 wide clips and 1 high one in pairs, on one process: the wide ones' last pair is filled up."""
    videos = folder_of(tmp_path / "videos", 3)
    write(videos / "high.mp4", numbered(20, height=64, width=48))
    (videos / "high.txt").write_text("high", encoding="utf-8")
    buckets = [Bucket(5, 48, 64), Bucket(5, 64, 48)]
    options: dict[str, Any] = dict(buckets=buckets, batch_size=2, num_workers=0, max_bad_fraction=1.0)
    data = VideoData(str(videos), str(videos), **options)
    seen, _ = evaluate("validate", data, str(tmp_path))
    assert [len(ids) for ids, _ in seen] == [2, 2, 1]
    there = Counter(name for ids, present in seen for name, p in zip(ids, present, strict=True) if p)
    assert there == Counter(["clip-0", "clip-1", "clip-2", "high"])


def counted(source: str, root: str) -> tuple[Seen, int, int]:
    """What one rank saw, and what its account says of all of them."""
    data = VideoData(source, source, frames=5, height=16, width=16, num_workers=0, max_bad_fraction=1.0)
    sums: list[tuple[int, int]] = []

    class Account(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            found = data._watcher.accounts["validation"]  # type: ignore[union-attr]
            sums.append((found.seen, found.skipped))

    seen, _ = evaluate("validate", data, root, devices=2, strategy="ddp", callbacks=[Account()])
    return seen, *sums[0]


def test_repeats_are_not_in_the_account_of_clips(tmp_path: Path) -> None:
    """Three clips on two ranks, the first bad, which is also the one that is repeated: 3 seen and 1 skipped."""
    videos = folder_of(tmp_path / "videos", 2, frames=5)
    make_bad("truncated", videos, "a-bad-one")
    first, second = run_ranks(counted, str(videos), str(tmp_path))
    assert [len(first[0]), len(second[0])] == [2, 2]
    assert (first[1] + second[1], first[2] + second[2]) == (3, 1)
