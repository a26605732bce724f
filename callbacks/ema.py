"""Exponential moving average of what is trained."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl

from muybridge.averaging import WeightAverage, warm_decay
from muybridge.errors import UsageError


class EMA(pl.Callback):
    """Keep an average of the trained weights, validate and sample with it, and save it in every checkpoint.

    ``a ← d a + (1 - d) w`` after an update of the weights, with ``d = min(decay, (1 + n)/(10 + n))`` after ``n`` of them.

    Args:
        decay: ``d``; 0.999 averages over about a thousand updates.
        start: Until this update the average is a copy of the weights.
        every: Updates between two steps of the average; ``decay`` is per step.
        warmup: Let the decay rise from 0.1, so that the average of a short run is not its first weights.
        use_for_validation: Validate, test and predict with the average.
    """

    def __init__(
        self, decay: float = 0.999, start: int = 0, every: int = 1, warmup: bool = True, use_for_validation: bool = True
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise UsageError(f"EMA decay is {decay}", "a number from 0 to below 1, such as 0.999")
        if start < 0 or every < 1:
            raise UsageError(f"EMA start is {start} and every is {every}", "start 0 or more, every 1 or more")
        self.decay, self.start, self.every = decay, start, every
        self.warmup, self.use_for_validation = warmup, use_for_validation
        self.steps = 0
        self._last = 0
        self._swapped = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module for the buffers, which must exist before the strategy sets up."""
        if not hasattr(pl_module, "average_requested"):
            raise UsageError(
                f"EMA was given {type(pl_module).__name__}",
                "a lightning_modules.DiffusionModule",
                "remove the callback",
            )
        pl_module.average_requested = True

    def _average(self, module: Any) -> WeightAverage:
        if module.average is None:
            raise RuntimeError("the module made no average in configure_model, although EMA asked for it")
        return module.average

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin with the weights that all ranks have now: DDP has given every rank the first one's, but no averages."""
        if pl_module.updates == 0:
            self._average(pl_module).update(pl_module, 0.0)

    # -- updates ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Count from where the run is, which after a resume is not 0."""
        self._last = pl_module.updates

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One step of the average per update of the weights; a micro-batch without one changes nothing."""
        updates = pl_module.updates
        if updates == self._last:
            return
        self._last = updates
        if updates <= self.start:
            self._average(pl_module).update(pl_module, 0.0)
        elif (updates - self.start) % self.every == 0:
            self._average(pl_module).update(pl_module, warm_decay(self.decay, self.steps, self.warmup))
            self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps; a plain integer, because checkpoints hold only plain types beside tensors."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The number of steps."""
        self.steps = state_dict["steps"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to save averages as if they were the weights."""
        if pl_module.average is not None and pl_module.average.swapped_in:
            raise RuntimeError(
                "a checkpoint was asked for while the averages are in the place of the weights: save after validation has"
                " ended (on_validation_end of a callback listed after EMA, as ModelCheckpoint does)"
            )

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _enter(self, module: Any) -> None:
        if self.use_for_validation:
            self._swapped.enter_context(self._average(module).swapped(module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages in."""
        self._enter(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages in."""
        self._enter(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages in."""
        self._enter(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights back."""
        self._swapped.close()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights back."""
        self._swapped.close()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights back."""
        self._swapped.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Weights back, so that whoever catches the error holds what was trained."""
        self._swapped.close()
