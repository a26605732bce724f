"""Stage 2 on ranks: DDP and FSDP2 train the causal student that one process trains, and it samples the same clips."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import trainer
from support.ranks import run_ranks
from support.strategies import Left, Watch, strategy
from support.trajectories import data, job, write
from torch import Tensor

from muybridge.backbones.adapters import LoRA
from muybridge.diffusion import keyed_noise

Tiny = Callable[[str], Path]


def train(path: str, kind: str, root: str, folder: str, lora: bool) -> tuple[Left, Tensor]:
    """Four updates on global batches of four; what they left, and a clip of the student."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = job(path, adapter=LoRA(rank=2) if lora else None)
    watch = Watch()
    runner = trainer(root, devices=world, strategy=strategy(kind), max_steps=4, limit_val_batches=0, callbacks=[watch])
    clips: list[Tensor] = []

    def sample(*_: Any) -> None:
        student = module.backbone
        noise = torch.stack([keyed_noise(student.latent_shape(9, 16, 16), 0, "clip")])
        text = module.text(data_batch, student)
        clips.append(student.sample(noise, text, [1000.0, 500.0], generator=torch.Generator().manual_seed(0)))

    loader = data(folder, batch_size=4 // world)
    loader.setup("fit")
    data_batch = loader.collate([loader.train_dataset()[0]])
    module.on_fit_end = sample  # type: ignore[method-assign]
    runner.fit(module, datamodule=loader)
    return watch.left, clips[0]


@pytest.mark.parametrize(("kind", "lora"), [("ddp", True), ("folder", False)])
def test_a_causal_student_is_the_same_under_every_strategy(
    kind: str, lora: bool, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    folder = str(write(path, tmp_path / "paths"))
    wanted, clip = train(path, "one", str(tmp_path / "one"), folder, lora)
    for found, made in run_ranks(train, path, kind, str(tmp_path / kind), folder, lora):
        assert found.losses == pytest.approx(wanted.losses, abs=1e-5)
        assert found.norms == pytest.approx(wanted.norms, abs=1e-5)
        assert found.weights.keys() == wanted.weights.keys()
        for name in wanted.weights:
            assert torch.allclose(found.weights[name], wanted.weights[name], rtol=0.0, atol=1e-5), name
        assert torch.allclose(made, clip, rtol=0.0, atol=1e-4)
