"""Slots that no sample fills count for nothing: over an epoch every sample is there once, whatever the source and the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.caches import make_cache, make_clips
from support.clips import folder_of, make_bad, numbered, write
from support.jobs import finetuning, latents_for, trainer
from support.ranks import run_ranks
from support.strategies import steady
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import ResumableData
from datamodules.filling import FilledSet
from datamodules.latents import LatentData
from datamodules.prompts import PromptData, PromptDataset
from datamodules.trajectories import TrajectoryData
from datamodules.video import VideoData
from muybridge.backbones import load
from muybridge.batch import Batch
from muybridge.data.buckets import Bucket
from muybridge.data.trajectories import TrajectoryWriter
from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses import Loss

Seen = list[tuple[str, bool]]

# -- the set alone -----------------------------------------------------------------------------------------------------


def test_a_fill_is_the_same_sample_marked_as_absent() -> None:
    data = FilledSet(PromptDataset(["a", "b"], ["x", "y"]))
    fill = data[~1]
    assert (fill.ids, fill.prompts) == (["b"], ["y"])
    assert fill.present.tolist() == [False]
    assert data[1].present is None
    one, other = data.__getitems__([0, ~0])
    assert (one.present, other.present.tolist()) == (None, [False])


class Together(Dataset[Batch]):
    """Gives several samples in one batch; the second could not be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Batch]:
        there = [index != 1 for _, index in keys]
        ids = [f"{epoch}/{index}" for epoch, index in keys]
        return [Batch(ids, present=torch.tensor(there), remarks=["" if t else "empty" for t in there])]


def test_samples_that_come_together_are_marked_one_by_one_and_fills_have_no_remark() -> None:
    [batch] = FilledSet(Together()).__getitems__([(7, 0), (7, 1), (7, ~1), (7, ~2)])
    assert batch.ids == ["7/0", "7/1", "7/1", "7/2"]
    assert batch.present.tolist() == [True, False, False, False]
    assert batch.remarks == ["", "empty", "", ""]
    assert FilledSet(Together())[7, ~1].remarks is None


class Plain(Dataset[Tensor]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(1)


class PlainData(ResumableData):
    def train_dataset(self) -> Dataset[Tensor]:
        return Plain()


def test_samples_that_cannot_be_marked_are_refused_at_the_first_one() -> None:
    with pytest.raises(UsageError, match="a Tensor can't be marked"):
        next(iter(PlainData(batch_size=2, num_workers=0).train_dataloader()))
    plain = PlainData(batch_size=2, num_workers=0, drop_last=True)
    plain.collate = torch.cat  # type: ignore[assignment]
    assert len(list(plain.train_dataloader())) == 1


def test_an_epoch_that_is_mostly_fills_is_said() -> None:
    with pytest.warns(UserWarning, match="of the 8 slots of an epoch 7 have no sample and train nothing"):
        PromptData(texts=["a dog"], batch_size=8).train_dataloader()


# -- every source, on two ranks ----------------------------------------------------------------------------------------


class Watcher(pl.LightningModule):
    """Remembers the samples of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: Seen = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        there = batch.present.tolist() if batch.present is not None else [True] * len(batch)
        self.seen += zip(batch.ids, there, strict=True)
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def sources(folder: str) -> dict[str, ResumableData]:
    root, videos = Path(folder), str(Path(folder) / "videos")
    small: dict[str, Any] = dict(frames=5, height=16, width=16, num_workers=0, max_bad_fraction=1.0)
    buckets: dict[str, Any] = dict(buckets=[Bucket(5, 48, 64), Bucket(5, 64, 48)], num_workers=0, max_bad_fraction=1.0)
    prompts = [f"prompt {i}" for i in range(5)]
    return {
        "video": VideoData(videos, batch_size=2, **small),
        "video with workers": VideoData(videos, batch_size=2, **{**small, "num_workers": 1}),
        "buckets": VideoData(videos, batch_size=2, **buckets),
        "latents": LatentData(str(root / "cache"), batch_size=2, num_workers=0),
        "prompts": PromptData(texts=prompts, batch_size=3),
        "trajectories": TrajectoryData(str(root / "t"), batch_size=2, num_workers=0),
    }


def an_epoch(folder: str) -> dict[str, Seen]:
    found = {}
    for name, data in sources(folder).items():
        watcher = Watcher()
        trainer(folder, devices=2, strategy="ddp", max_epochs=2).fit(watcher, data)
        found[name] = watcher.seen
    return found


def test_two_ranks_train_on_every_sample_of_every_source_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    videos = folder_of(tmp_path / "videos", 3, frames=5)
    write(videos / "high.mp4", numbered(20, height=64, width=48))
    (videos / "high.txt").write_text("high", encoding="utf-8")
    make_bad("truncated", videos, "a-bad-one")
    make_cache(
        tmp_path / "cache", load(str(tiny_checkpoint("wan")), max_text_length=16), make_clips(tmp_path / "clips", 5)
    )
    with TrajectoryWriter(tmp_path / "t", {}) as writer:
        for i in range(3):
            writer.add(f"t{i}", "a dog", [1000.0, 0.0], torch.zeros(2, 1, 1, 2, 2))
    clips = ["clip-0", "clip-1", "clip-2", "high"]
    wanted = {
        "video": clips,
        "video with workers": clips,
        "buckets": clips,
        "latents": [f"clip-{i}" for i in range(5)],
        "prompts": PromptData(texts=[f"prompt {i}" for i in range(5)]).ids,
        "trajectories": ["t0", "t1", "t2"],
    }
    ranks = run_ranks(an_epoch, str(tmp_path))
    for name, ids in wanted.items():
        first, second = (rank[name] for rank in ranks)
        assert len(first) == len(second)
        counts = Counter(i for i, there in [*first, *second] if there)
        # Two epochs.
        assert counts == Counter(dict.fromkeys(ids, 2)), name
        assert len(first) + len(second) > 2 * len(ids), f"{name}: nothing was filled up"


# -- what a loss sees --------------------------------------------------------------------------------------------------


class Tally(Loss):
    """A loss that counts samples, by their ids' first latent value."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[float] = Counter()

    def forward(self, step: DenoisingStep) -> Tensor:
        there = torch.ones(len(step.clean), dtype=torch.bool) if step.present is None else step.present
        self.counted.update(step.clean[there].flatten(1)[:, 0].tolist())
        # What is not there may say anything.
        return step.prediction.flatten(1).mean(1) * 0 + torch.where(there, 1.0, 1e6)


def test_a_loss_that_counts_samples_counts_each_once(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tally = Tally()
    job = finetuning(tiny_checkpoint("wan"), losses=[tally])
    losses: list[float] = []

    class Collect(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[Collect()]).fit(
        job, latents_for(job, count=5, batch_size=4)
    )
    assert sorted(tally.counted.values()) == [2] * 5
    assert losses == [1.0] * 4


def test_an_update_with_fills_is_that_of_a_batch_without_them(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three clips in one batch of four, and in one of three."""
    left = []
    for size in (4, 3):
        job = finetuning(tiny_checkpoint("wan"), optimizer=steady)
        run = trainer(tmp_path / str(size), max_steps=1, limit_val_batches=0)
        run.fit(job, latents_for(job, count=3, batch_size=size))
        left.append((run.callback_metrics["train/loss"], job.state_dict()))
    torch.testing.assert_close(left[0], left[1], rtol=1e-5, atol=1e-5)
