"""The losses of held-out clips are those of the trained weights, whoever computes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.jobs import finetuning, latents_for, trainer
from support.ranks import run_ranks
from support.strategies import strategy

from callbacks import ClipLosses
from muybridge.diffusion import Boundary, keyed_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.errors import UsageError
from muybridge.losses import Denoising, MotionWeightedDenoising

Tiny = Callable[[str], Path]


def train(path: str, root: str, batch_size: int = 2, kind: str = "one") -> Any:
    module = finetuning(path, trainable=r"transformer\..*attn1.*")
    clips = latents_for(module, count=4, batch_size=batch_size)
    losses = [Denoising(), MotionWeightedDenoising("ones", per_frame=False)]
    watch = ClipLosses(f"{root}/losses.parquet", losses, [Boundary(0.3, "sigma"), Boundary(0.8, "sigma")], seed=3)
    world = int(os.environ.get("WORLD_SIZE", 1))
    runner = trainer(
        root,
        max_steps=2,
        devices=world,
        strategy=strategy(kind),
        limit_val_batches=0,
        callbacks=[watch],
    )
    runner.fit(module, clips)
    return None if world > 1 else (module, clips)


def table(root: Path) -> dict[str, list[Any]]:
    return pq.read_table(root / "losses.parquet").to_pydict()


def test_losses_are_those_of_the_trained_weights(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = str(tiny_checkpoint("wan"))
    module, clips = train(path, str(tmp_path / "a"))
    assert module.training, "it is left as it was"
    found = table(tmp_path / "a")
    assert list(found) == ["id", "Denoising", "MotionWeightedDenoising"]
    assert found["id"] == [f"clip-{i:03d}" for i in range(4)]
    # With weights of one, the weighted loss is the plain one.
    assert found["MotionWeightedDenoising"] == pytest.approx(found["Denoising"], rel=1e-6)
    backbone = module.backbone.eval()
    clip = clips.train_dataset()[1]
    values = []
    for sigma in (0.3, 0.8):
        t = Boundary(sigma, "sigma").resolve(backbone.schedule)
        for draw in range(2):
            noise = keyed_noise(tuple(clip.latents.shape[1:]), 3, "clip losses", clip.ids[0], f"{t:g}", draw)[None]
            with torch.no_grad():
                text = module.text(clip, backbone)
                step = denoising_step(backbone, backbone.schedule, clip.latents, noise, torch.tensor([t]), text)
            values.append(float((step.prediction - step.target).square().mean()))
    assert found["Denoising"][1] == pytest.approx(sum(values) / 4, rel=1e-4)
    # Two ranks train on the same batches and share the clips between them.
    run_ranks(train, path, str(tmp_path / "b"), 1, "ddp")
    assert table(tmp_path / "b")["id"] == found["id"]
    assert table(tmp_path / "b")["Denoising"] == pytest.approx(found["Denoising"], rel=1e-4)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"ends in \.parquet"):
        ClipLosses("losses.csv")
    with pytest.raises(UsageError, match="two of one class"):
        ClipLosses("losses.parquet", [Denoising(), Denoising()])
    with pytest.raises(UsageError, match="draws is 0"):
        ClipLosses("losses.parquet", draws=0)
