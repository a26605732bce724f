"""A small stage 2 on a tiny Wan: a causal student, and its teacher's trajectories as they come from the real verb's function."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from datamodules.trajectories import TrajectoryData
from lightning_modules import Sampling, TrajectoryDistillation
from muybridge.backbones import Causal, Pretrained, load
from muybridge.data.cache import Share
from muybridge.data.teaching import TeacherPath, kept_times, write_trajectories
from muybridge.losses import TrajectoryRegression
from muybridge.progress import Progress

SIZE = (9, 16, 16)
STEPS = [1000.0, 750.0, 500.0]
PATH = TeacherPath(steps=4, shift=1.0, guidance=3.0)


def steady(parameters: Any) -> torch.optim.Optimizer:
    """Adam with an epsilon above rounding, see support.strategies."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def write(checkpoint: Path | str, out: Path, count: int = 8, path: TeacherPath = PATH, **options: Any) -> Path:
    """Trajectories of so many prompts."""
    teacher = load(str(checkpoint), max_text_length=16)
    prompts = {f"t{i:02d}": f"a dog number {i % 3}" for i in range(count)}
    settings: dict[str, Any] = {"share": Share(), "dtype": "float32", **options}
    write_trajectories(
        out,
        teacher,
        prompts,
        path,
        SIZE,
        kept_times(teacher, path, STEPS),
        teacher.encode_text,
        teacher.unconditional(),
        watch=lambda what, total: contextlib.nullcontext(Progress(what, total, show=False)),
        **settings,
    )
    return out


def job(checkpoint: Path | str, block: int | None = 1, **settings: Any) -> TrajectoryDistillation:
    """A stage-2 job."""
    causal = None if block is None else Causal(block)
    return TrajectoryDistillation(
        **{
            "student": Pretrained(str(checkpoint), max_text_length=16, causal=causal, gradient_checkpointing=True),
            "steps": STEPS,
            "losses": [TrajectoryRegression()],
            "path": PATH,
            "optimizer": steady,
            "sampling": Sampling(steps=STEPS, guidance=1.0, frames=SIZE[0], height=SIZE[1], width=SIZE[2], fps=8),
            **settings,
        }
    )


def data(folder: Path | str, batch_size: int = 4) -> TrajectoryData:
    """What it trains on."""
    return TrajectoryData(str(folder), batch_size=batch_size, num_workers=0)
