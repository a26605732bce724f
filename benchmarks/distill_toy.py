"""Distillation where the answer is known: a teacher whose score is that of a Gaussian, in closed form.

    python benchmarks/distill_toy.py

A student of one step begins as a still clip, every frame nearly the same, and learns a Gaussian whose neighbouring frames
correlate at 0.95: what changes between frames has a fortieth of the variance. Distribution matching alone, and with motion
score matching, at the same number of updates, over 5 seeds; how far the covariance of the frames and that of their differences
are from the teacher's. Writes benchmarks/results/distill_toy.json. Takes a few minutes on one core.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import ResumableData
from lightning_modules import Clips, Distillation
from muybridge.batch import Batch
from muybridge.diffusion import Conditioning, FlowSchedule, NoiseSchedule, Uniform, keyed_noise
from muybridge.losses import DistributionMatching, Loss, MotionScoreMatching
from muybridge.toy_scores import Generator, Mixture, correlated, gaussian, places, toy

ROOT = Path(__file__).parent.parent
FRAMES, CORRELATION = 8, 0.95
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Nothing(Dataset[Batch]):
    """Prompts that say nothing."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Batch:
        return Batch(ids=[str(index)], prompts=[""], conditioning=Conditioning(torch.zeros(1, 1, 1)))


class Nothings(ResumableData):
    """A datamodule of them."""

    def train_dataset(self) -> Dataset[Batch]:
        return Nothing()


def adam(rate: float) -> Optimizer:
    """Adam as distillation uses it, without a first moment."""
    return lambda p: torch.optim.Adam(p, lr=rate, betas=(0.0, 0.99))


def plain(rate: float) -> Optimizer:
    """Steps along the gradient."""
    return lambda p: torch.optim.SGD(p, lr=rate)


def distil(
    teacher: Mixture,
    student: Generator,
    iterations: int,
    losses: list[Loss],
    optimizer: Optimizer,
    schedule: NoiseSchedule | None = None,
    seed: int = 0,
    side: int = 16,
    ratio: int = 5,
) -> Tensor:
    """Draws of a student that was distilled by the real job, (16384, F)."""
    schedule = schedule if schedule is not None else FlowSchedule(1.0)
    steps = [999.0]
    job = Distillation(
        teacher=toy(teacher, schedule),
        student=toy(student, schedule),
        losses=losses,
        steps=steps,
        guidance=1.0,
        update_ratio=ratio,
        student_optimizer=optimizer,
        critic_optimizer=adam(1e-2),
        clips=Clips(frames=teacher.means.shape[1], height=side, width=side),
        score_times=Uniform(clamp=[20.0, 980.0]),
        student_clip=None,
        critic_clip=None,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            max_steps=iterations,
            default_root_dir=folder,
        )
        run.fit(job, datamodule=Nothings(batch_size=2, num_workers=0, seed=seed))
    shape = (1, 1, teacher.means.shape[1], 128, 128)
    noise = keyed_noise(shape, seed, "answer")
    return places(job.student.sample(noise, Conditioning(torch.zeros(1, 1, 1)), steps=steps))


def still(frames: int) -> Generator:
    """A student whose frames are nearly the same: it moves too little."""
    student = Generator(frames)
    with torch.no_grad():
        student.linear.copy_(torch.full((frames, frames), 0.35 / frames**0.5) + 0.1 * torch.eye(frames))
    return student


def differences(frames: int) -> Tensor:
    """The frame difference as a matrix."""
    return torch.eye(frames)[1:] - torch.eye(frames)[:-1]


def off(draws: Tensor, covariance: Tensor) -> tuple[float, float]:
    """How far the covariance is from what it should be, relative to it: of the frames, and of their differences."""
    d = differences(covariance.shape[0])
    pairs = ((draws.T.cov(), covariance), ((draws @ d.T).T.cov(), d @ covariance @ d.T))
    frames, motion = (float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    return frames, motion


def losses(weight: float, normalizer: Any = "shared") -> list[Loss]:
    """Distribution matching, and motion score matching where it has a weight."""
    extra: list[Loss] = [MotionScoreMatching(weight=weight, normalizer=normalizer)] if weight else []
    return [DistributionMatching(), *extra]


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    covariance = correlated(FRAMES, CORRELATION)
    rows = []
    for how, optimizer, iterations in (("SGD 0.2", plain(0.2), 150), ("Adam 5e-3", adam(5e-3), 150)):
        for name, weight, normalizer in (
            ("DMD", 0.0, "shared"),
            ("DMD + 1 MSM", 1.0, "shared"),
            ("DMD + 4 MSM", 4.0, "shared"),
            ("DMD + 1 MSM, own normalizer", 1.0, "own"),
        ):
            start, found = time.perf_counter(), []
            for seed in range(5):
                teacher = gaussian(torch.zeros(FRAMES), covariance)
                draws = distil(teacher, still(FRAMES), iterations, losses(weight, normalizer), optimizer, seed=seed)
                found.append(off(draws, covariance))
            row: dict[str, Any] = {"optimizer": how, "losses": name, "iterations": iterations, "seeds": 5}
            for index, what in enumerate(("frames", "differences")):
                values = [f[index] for f in found]
                row[what] = {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows.append(row)
            print(row, flush=True)
    (ROOT / "benchmarks/results/distill_toy.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
