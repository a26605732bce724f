"""A run that records which samples each step was given: a linear layer in place of a network, numbers in place of clips."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from muybridge.batch import joined_presence

QUIET: dict[str, Any] = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
)

for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Some:
    """A batch of numbers."""

    numbers: torch.Tensor
    present: Optional[torch.Tensor] = None

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, *args: Any, **kwargs: Any) -> Some:
        return self

    @property
    def there(self) -> torch.Tensor:
        """Those that count."""
        return self.numbers if self.present is None else self.numbers[self.present]


class Indices(Dataset[Some]):
    def __init__(self, size: int, ids: Optional[Sequence[str]] = None) -> None:
        self.size, self.ids = size, ids

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Some:
        assert 0 <= index < self.size
        return Some(torch.tensor([index]))


class Numbers(ResumableData):
    """The numbers below ``size``."""

    def __init__(
        self, size: int, validation: bool = False, ids: Optional[Sequence[str]] = None, **options: Any
    ) -> None:
        super().__init__(**{"num_workers": 0, **options})
        self.size, self.validation, self.ids = size, validation, ids

    def train_dataset(self) -> Dataset[Some]:
        return Indices(self.size, self.ids)

    @staticmethod
    def collate(clips: Sequence[Some]) -> Some:
        return Some(torch.cat([c.numbers for c in clips]), joined_presence(clips))

    def val_dataloader(self) -> Any:
        return DataLoader(Indices(4), batch_size=2, collate_fn=self.collate) if self.validation else []


class Recorder(pl.LightningModule):
    """Records the samples of each step on this rank, without those that only fill up."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Some, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.there.tolist())
        return self.layer(batch.numbers[:, None].float() / 100).square().mean()

    def validation_step(self, batch: Some, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(len(self.seen))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveAt(pl.Callback):
    """Save once, at one of Lightning's hooks, when so many steps are done; then stop where asked."""

    def __init__(self, hook: str, step: int, path: str) -> None:
        self.hook, self.step, self.path, self.saved_after = hook, step, path, -1

    def _at(self, hook: str, trainer: pl.Trainer, module: Any) -> None:
        if hook == self.hook and trainer.global_step == self.step and self.saved_after < 0:
            trainer.save_checkpoint(self.path)
            self.saved_after = len(module.seen)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        self._at("batch", trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._at("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._at("epoch", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._at("end", trainer, pl_module)


class Kick(pl.Callback):
    """Send this rank a signal in the middle of a step."""

    def __init__(self, rank: int, step: int, name: str) -> None:
        self.rank, self.step, self.name = rank, step, name

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.name))


def count(
    data: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: Sequence[pl.Callback] = (),
    ckpt_path: Optional[str] = None,
) -> Recorder:
    """Run, and return the record."""
    torch.manual_seed(0)
    module = Recorder()
    runner = pl.Trainer(
        **{**QUIET, "devices": int(os.environ.get("WORLD_SIZE", 1)), **trainer}, callbacks=list(callbacks)
    )
    runner.fit(module, datamodule=Numbers(**data), ckpt_path=ckpt_path)
    return module
