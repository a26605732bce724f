"""How far a run is: one line for all of its updates, on a terminal and in the log of a cluster's job."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Optional

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from muybridge.errors import UsageError
from muybridge.progress import Progress

LOG = logging.getLogger("lightning.pytorch")


def finite(count: float) -> Optional[int]:
    """None for what never ends."""
    return int(count) if math.isfinite(count) and count >= 0 else None


def total(counts: int | float | Sequence[int | float]) -> Optional[int]:
    """Batches of all loaders."""
    return finite(sum(counts) if isinstance(counts, Sequence) else counts)


def metrics(values: dict[str, Any]) -> str:
    """``train/loss 0.412, val/loss 0.398``."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())


class ProgressLine(ProgressBar):
    """``updates 120 of 2000, 1.3 s each, 41 min left, train/loss 0.412``; the command's jobs have it by default.

    It counts updates up to the run's last one, as ``max_steps`` does, and not the batches of an epoch: jobs here end after so
    many updates. A run that is gone on with begins where it was, and its pace is that of its own updates. On a terminal the
    line is rewritten in place; into a file, such as the log of a SLURM job, one is written every so often.

    Args:
        every: Seconds between two lines of a log.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        if every <= 0:
            raise UsageError(f"ProgressLine every is {every}", "a number of seconds, above 0")
        self.every = every
        self.shown = True
        self._training: Optional[Progress] = None
        self._checking: Optional[Progress] = None

    # -- what Lightning asks of a progress bar ---------------------------------------------------------------------------

    def enable(self) -> None:
        """Say something."""
        self.shown = True

    def disable(self) -> None:
        """Say nothing, as on all ranks but the first."""
        self.shown = False

    def print(self, *args: Any, **options: Any) -> None:
        """Print where the line was."""
        self.clear()
        print(*args, **options)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make way for what Lightning logs."""
        super().setup(trainer, pl_module, stage)
        for handler in LOG.handlers:
            handler.addFilter(self.clear)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The log is Lightning's again."""
        for handler in LOG.handlers:
            handler.removeFilter(self.clear)

    def clear(self, record: object = None) -> bool:
        """Take the line off the terminal; it comes back with the next update."""
        for line in (self._training, self._checking):
            if line is not None:
                line.clear()
        return True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What is said of it begins a line; there is no teardown after it."""
        self.clear()
        self._training = self._checking = None
        self.teardown(trainer, pl_module, "")

    # -- training --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where the run is."""
        steps = finite(trainer.max_steps) if trainer.max_steps >= 0 else finite(trainer.estimated_stepping_batches)
        self._training = Progress("updates", steps, self.shown, self.every, done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing new while gradients add up."""
        line = self._training
        if line is not None and trainer.global_step > line.done:
            if line.due:
                # Reading a metric waits for the GPU.
                line.note = metrics(trainer.progress_bar_metrics)
            line.advance(trainer.global_step - line.done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how long it took."""
        if self._training is not None:
            self._training.close()
        self._training = None

    # -- everything else -------------------------------------------------------------------------------------------------

    def _begin(self, label: str, counts: Any, ends: bool = True) -> None:
        self.clear()
        self._checking = Progress(label, total(counts), self.shown, self.every, ends=ends)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Inside a training it comes and goes."""
        alone = trainer.state.fn != TrainerFn.FITTING
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("validation batches", counts, ends=alone)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count its batches."""
        self._begin("test batches", trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count its batches."""
        self._begin("batches", trainer.num_predict_batches)

    def on_validation_batch_end(self, *arguments: Any, **options: Any) -> None:
        """One more."""
        if self._checking is not None:
            self._checking.advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """That was all."""
        if self._checking is not None:
            self._checking.close()
        self._checking = None

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end
