"""A small distillation on tiny checkpoints, and a toy whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.jobs import SHAPES

from datamodules.prompts import PromptData
from lightning_modules import Clips, Distillation
from muybridge.backbones import Backbone, Pretrained
from muybridge.losses import DistributionMatching

STEPS = [1000.0, 757.0, 522.0]


def opened(path: Path | str, name: str = "wan", **options: Any) -> Backbone:
    """A tiny backbone, not loaded; short texts where its family lets them be short."""
    if name.startswith("wan"):
        options = {"max_text_length": 16, **options}
    return Pretrained(str(path), **options)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Steps large enough to see, and an epsilon above rounding; in one pass over the weights, as the job's own."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5, fused=True)


def distillation(path: Path | str, name: str = "wan", **settings: Any) -> Distillation:
    """A distillation of a tiny checkpoint."""
    frames, height, width = SHAPES[name]
    return Distillation(
        **{
            "teacher": opened(path, name),
            "losses": [DistributionMatching()],
            "steps": STEPS,
            "guidance": 3.0,
            "update_ratio": 2,
            "student_optimizer": adam,
            "critic_optimizer": adam,
            "clips": Clips(frames=frames, height=height, width=width, fps=8),
            **settings,
        }
    )


def prompts(count: int = 8, batch_size: int = 2) -> PromptData:
    """Prompts without clips."""
    return PromptData(texts=[f"a dog number {i}" for i in range(count)], batch_size=batch_size)
