"""Customization on ranks: DDP and FSDP2 train the adapter that one process trains, under every loss that runs the base too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.jobs import latents_for, trainer
from support.ranks import run_ranks
from support.strategies import Left, Watch, steady, strategy
from torch import Tensor

from lightning_modules import MotionCustomization, Sampling
from muybridge.backbones import Pretrained
from muybridge.batch import Batch
from muybridge.customization.tau import Tau
from muybridge.diffusion import DenoisingStep
from muybridge.losses import (
    AppearanceDebiased,
    AttentionMotionFlow,
    Denoising,
    FrameResidual,
    MotionFeatureMatching,
    MotionFeatures,
    SpaceTimeFeatures,
    TemporalHighPass,
)

Tiny = Callable[[str], Path]


class Noted(Denoising):
    """Keeps the times of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, step: DenoisingStep) -> Tensor:
        self.times += step.t.tolist()
        return super().forward(step)


def train(path: str, kind: str, root: str) -> tuple[Left, list[Tensor], list[float]]:
    """Three updates on two clips each: what they left, a clip's latents at every step on both sides of τ, and the times."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    noted = Noted()
    losses = [
        noted,
        MotionFeatureMatching(),
        FrameResidual(),
        AppearanceDebiased(),
        TemporalHighPass(),
        SpaceTimeFeatures(),
        MotionFeatures(),
        AttentionMotionFlow(),
    ]
    module = MotionCustomization(
        backbone=Pretrained(path, max_text_length=16, gradient_checkpointing=True),
        losses=losses,
        tau=Tau(300.0),
        captions="free",
        optimizer=steady,
        sampling=Sampling(steps=4, guidance=1.0, frames=9, height=16, width=16, fps=8),
    )
    watch, seen = Watch(), []

    def sample(*_: Any) -> None:
        module.make_videos(
            Batch(ids=["a"], prompts=["a dog"]), module.sampling, lambda i, n, t, z: seen.append(z.clone())
        )

    module.on_fit_end = sample  # type: ignore[method-assign]
    runner = trainer(root, devices=world, strategy=strategy(kind), max_steps=3, limit_val_batches=0, callbacks=[watch])
    runner.fit(module, datamodule=latents_for(module, count=16, batch_size=2 // world))
    # Exporting is a single process's work; here each rank gets a folder of its own.
    module.export(str(Path(root) / f"adapter-{runner.global_rank}"))
    return watch.left, seen, noted.times


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Left, list[Tensor], Path]:
    """What one process leaves, and where."""
    root = tmp_path_factory.mktemp("one")
    left, clip, _ = train(str(tiny_checkpoint("wan")), "one", str(root))
    assert left.updates == 3
    assert len(clip) == 4
    return left, clip, root


@pytest.mark.parametrize("kind", ["ddp", "folder"])
def test_ranks_teach_the_adapter_that_one_process_teaches(
    kind: str, alone: tuple[Left, list[Tensor], Path], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path, (wanted, clip, root) = str(tiny_checkpoint("wan")), alone
    ranks = run_ranks(train, path, kind, str(tmp_path / "ranks"))
    # Losses that run the base count from 500 on: of one rank's clip alone in some updates.
    assert any((a > 500.0) is not (b > 500.0) for a, b in zip(*(times for *_, times in ranks), strict=True))
    for found, made, _ in ranks:
        assert found.losses == pytest.approx(wanted.losses, abs=1e-4)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-3)
        assert found.weights.keys() == wanted.weights.keys()
        for name, weight in wanted.weights.items():
            assert torch.allclose(found.weights[name], weight, rtol=0.0, atol=2e-5), name
        for one, other in zip(clip, made, strict=True):
            assert torch.allclose(other, one, rtol=0.0, atol=1e-4)
    ours, theirs = (run / "adapter-0/adapter.safetensors" for run in (root, tmp_path / "ranks"))
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        assert json.loads(b.metadata()["muybridge"])["t_min"] == 300.0
        assert set(a.keys()) == set(b.keys())
        for key in a.keys():  # noqa: SIM118 - no dictionary
            assert torch.allclose(a.get_tensor(key), b.get_tensor(key), rtol=0.0, atol=2e-5), key
