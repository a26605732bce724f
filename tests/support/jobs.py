"""Small jobs on tiny checkpoints: what tests of modules, callbacks and strategies train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from datamodules.collate import collate
from lightning_modules import Finetuning, Sampling
from muybridge.backbones import Pretrained
from muybridge.batch import Batch
from muybridge.diffusion import keyed_noise
from muybridge.losses import Denoising

SHAPES = {
    # frames, height, width that each tiny model takes
    "wan": (9, 16, 16),
    "wan22": (9, 16, 16),
    "cogvideox": (9, 16, 16),
    "latte": (4, 64, 64),
    "unet3d": (4, 64, 64),
}


class Latents(Dataset[Batch]):
    """Latents that are a function of their id, with captions."""

    def __init__(self, shape: tuple[int, ...], count: int, prompt: str | None = None) -> None:
        self.shape, self.count, self.prompt = shape, count, prompt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        name = f"clip-{index:03d}"
        latents = keyed_noise(self.shape, 0, name)
        prompt = self.prompt if self.prompt is not None else f"a dog number {index % 3}"
        return Batch(ids=[name], latents=latents[None], prompts=[prompt])


class LatentClips(ResumableData):
    """A datamodule of :class:`Latents`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        count: int = 8,
        batch_size: int = 2,
        num_workers: int = 0,
        prompt: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=0)
        self.shape, self.count, self.prompt = shape, count, prompt

    def train_dataset(self) -> Latents:
        return Latents(self.shape, self.count, self.prompt)

    def val_dataloader(self) -> Any:
        return DataLoader(Latents(self.shape, 4), batch_size=self.batch_size, collate_fn=collate)

    def predict_dataloader(self) -> Any:
        return DataLoader(Latents(self.shape, 2), batch_size=1, collate_fn=collate)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose step is large enough to see."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def finetuning(path: Path | str, name: str = "wan", **settings: Any) -> Finetuning:
    """A finetuning job on a tiny checkpoint."""
    frames, height, width = SHAPES[name]
    return Finetuning(
        **{
            "backbone": Pretrained(str(path), max_text_length=16 if name.startswith("wan") else None),
            "losses": [Denoising()],
            "optimizer": sgd,
            "sampling": Sampling(steps=2, guidance=3.0, frames=frames, height=height, width=width, fps=8),
            **settings,
        }
    )


def latents_for(job: Finetuning, name: str = "wan", **settings: Any) -> LatentClips:
    """Clips of the right shape for a job."""
    return LatentClips(job.backbone.latent_shape(*SHAPES[name]), **settings)


def trainer(root: Path | str, **settings: Any) -> pl.Trainer:
    """A quiet one-process trainer."""
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(root),
            **settings,
        }
    )
