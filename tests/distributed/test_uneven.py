"""Ranks that hold different things still do one job: skipped clips, a clip on every rank, samples, prompts left over."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.jobs import LatentClips, Latents, finetuning, trainer
from support.ranks import run_ranks
from support.strategies import Left, Watch, steady, strategy

from callbacks.samples import Samples
from datamodules.prompts import PromptData
from muybridge.batch import Batch

Tiny = Callable[[str], Path]


class Gaps(Latents):
    """Latents of which some could not be read."""

    absent: tuple[int, ...] = ()
    same = False

    def __getitem__(self, index: int) -> Batch:
        clip = super().__getitem__(0 if self.same else index)
        if index not in self.absent:
            return replace(clip, present=torch.tensor([True]))
        assert clip.latents is not None
        return replace(clip, latents=torch.zeros_like(clip.latents), present=torch.tensor([False]))


class GapClips(LatentClips):
    """A datamodule of :class:`Gaps`."""

    def __init__(self, *args: object, absent: tuple[int, ...] = (), same: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.shuffle, self.absent, self.same = False, absent, same

    def train_dataset(self) -> Gaps:
        clips = Gaps(self.shape, self.count)
        clips.absent, clips.same = self.absent, self.same
        return clips


def uneven(
    path: str,
    kind: str,
    root: str,
    count: int,
    absent: tuple[int, ...],
    prompts: tuple[str, ...] = (),
    same: bool = False,
) -> Left:
    """Two updates of global batches of four."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    job, watch = finetuning(path, optimizer=steady), Watch()
    shape = job.backbone.latent_shape(9, 16, 16)
    data = GapClips(shape, count=count, batch_size=4 // world, absent=absent, same=same)
    callbacks = [watch, *([Samples(prompts=prompts, every=1)] if prompts else [])]
    run = trainer(root, max_steps=2, limit_val_batches=0, strategy=strategy(kind), devices=world, callbacks=callbacks)
    run.fit(job, data)
    return watch.left


def agree(found: Left, wanted: Left) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-4)
    for name, value in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], value, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", ["ddp", "folder"])
def test_a_clip_skipped_on_one_rank_leaves_the_mean_over_the_others(
    tiny_checkpoint: Tiny, tmp_path: Path, kind: str
) -> None:
    path = str(tiny_checkpoint("wan"))
    # With ranks taking turns, both absent clips of the first batch are the second rank's.
    wanted = uneven(path, "one", str(tmp_path / "one"), 8, (1, 3))
    found, _ = run_ranks(uneven, path, kind, str(tmp_path / kind), 8, (1, 3), world=2)
    agree(found, wanted)


def test_one_clip_on_every_rank_is_noised_on_each_anew(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = str(tiny_checkpoint("wan"))
    wanted = uneven(path, "one", str(tmp_path / "one"), 8, (), (), True)
    found, _ = run_ranks(uneven, path, "ddp", str(tmp_path / "ddp"), 8, (), (), True, world=2)
    agree(found, wanted)


@pytest.mark.parametrize("kind", ["ddp", "folder"])
def test_clips_that_do_not_go_round_are_trained_on_once(tiny_checkpoint: Tiny, tmp_path: Path, kind: str) -> None:
    """Five clips: a whole global batch, and one of a single clip, so that the second rank's share is nothing but fills."""
    path = str(tiny_checkpoint("wan"))
    wanted = uneven(path, "one", str(tmp_path / "one"), 5, ())
    found, _ = run_ranks(uneven, path, kind, str(tmp_path / kind), 5, (), world=2)
    agree(found, wanted)
    # And what fills is as good as not there: with batches of five all are in the first update.
    assert uneven(path, "one", str(tmp_path / "again"), 8, (5, 6, 7)).losses == pytest.approx(wanted.losses, rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "folder"])
def test_samples_are_made_by_all_ranks_and_written_by_one(tiny_checkpoint: Tiny, tmp_path: Path, kind: str) -> None:
    run_ranks(uneven, str(tiny_checkpoint("wan")), kind, str(tmp_path), 4, (), ("a dog", "a cat"), world=2)
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*") if "samples" in p.parts)
    assert written == [f"samples/update-000000{u}/{name}" for u in (1, 2) for name in ("00.mp4", "01.mp4", "sheet.png")]


def predicted(path: str, kind: str, root: str, prompts: list[str]) -> None:
    """Videos of some prompts."""
    job, world = finetuning(path), int(os.environ.get("WORLD_SIZE", "1"))
    run = trainer(root, strategy=strategy(kind), devices=world, callbacks=[Samples()])
    run.predict(job, PromptData(texts=prompts), return_predictions=False)


@pytest.mark.parametrize("kind", ["ddp", "folder"])
def test_prompts_need_not_fill_the_ranks(tiny_checkpoint: Tiny, tmp_path: Path, kind: str) -> None:
    prompts = ["one", "two", "three"]
    run_ranks(predicted, str(tiny_checkpoint("wan")), kind, str(tmp_path), prompts, world=2)
    assert sorted(p.name for p in tmp_path.rglob("*.mp4")) == ["0000-one.mp4", "0001-two.mp4", "0002-three.mp4"]
