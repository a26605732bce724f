"""The motion-score job on shards: it trains, rates and continues clips as one process does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import latents_for, trainer
from support.ranks import run_ranks
from support.strategies import Left, Watch, steady, strategy

from lightning_modules import MotionScore, Rating, Sampling
from muybridge.backbones import Pretrained
from muybridge.diffusion.differences import Differences
from muybridge.losses import Denoising

Tiny = Callable[[str], Path]


def train(path: str, kind: str, root: str) -> tuple[Left, float]:
    """Three updates on global batches of four, and the rating of four clips."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = MotionScore(
        backbone=Pretrained(path, max_text_length=16),
        appearance=Pretrained(path, max_text_length=16),
        losses=[Denoising()],
        differences=Differences(context=1, scale=2.0),
        rating=Rating(steps=2),
        optimizer=steady,
        caption_dropout=0.0,
        sampling=Sampling(steps=2, guidance=1.0, frames=9, height=16, width=16, fps=8),
    )
    watch = Watch()
    settings: dict[str, Any] = dict(devices=world, callbacks=[watch])
    runner = trainer(root, strategy=strategy(kind), max_steps=3, limit_val_batches=0, **settings)
    data = latents_for(module, count=16, batch_size=4 // world)
    runner.fit(module, datamodule=data)
    data.test_dataloader = data.val_dataloader  # type: ignore[method-assign]
    [found] = runner.test(module, datamodule=data, verbose=False)
    return watch.left, float(found["test/motion_log_likelihood"])


def test_shards_train_and_rate_as_one_process_does(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = str(tiny_checkpoint("wan"))
    wanted, rating = train(path, "one", str(tmp_path / "one"))
    for found, other in run_ranks(train, path, "folder", str(tmp_path / "ranks")):
        assert found.losses == pytest.approx(wanted.losses, abs=1e-5)
        assert found.norms == pytest.approx(wanted.norms, abs=1e-5)
        assert all(torch.allclose(found.weights[n], wanted.weights[n], rtol=0.0, atol=1e-5) for n in wanted.weights)
        assert other == pytest.approx(rating, abs=1e-4)
