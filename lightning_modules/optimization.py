"""Learning rates over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Optional

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muybridge.errors import UsageError


@dataclass
class LearningRate:
    """The factor on the optimizer's learning rate, per update.

    Args:
        shape: ``constant``, ``cosine`` from 1 down to ``floor``, or ``trapezoid``: constant, and a straight line down to
            ``floor`` at the end. A trapezoid's constant part is the same whatever the number of updates, so a run can be made
            longer from any checkpoint before its end.
        warmup: Updates of linear rise from 0 at the start.
        updates: Where the shape ends; the Trainer's number of updates where not given.
        floor: Factor at the end.
        falling: Share of the updates that the trapezoid's last part takes.
    """

    shape: Literal["constant", "cosine", "trapezoid"] = "constant"
    warmup: int = 0
    updates: Optional[int] = None
    floor: float = 0.0
    falling: float = 0.3

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UsageError(f"warmup is {self.warmup}", "a number of updates, 0 or more")
        if not 0.0 <= self.floor <= 1.0:
            raise UsageError(f"floor is {self.floor}", "a factor from 0 to 1")
        if not 0.0 < self.falling <= 1.0:
            raise UsageError(f"falling is {self.falling}", "a share of the updates, above 0 and up to 1")

    def factor(self, update: int, total: float) -> float:
        """The factor for update number ``update`` (counted from 0) of ``total``."""
        rise = min(1.0, (update + 1) / (self.warmup + 1))
        if self.shape == "constant":
            return rise
        if self.shape == "trapezoid":
            left = max(0.0, min(1.0, (total - update) / max(1.0, self.falling * total)))
            return rise * (self.floor + (1.0 - self.floor) * left)
        span = max(1.0, total - self.warmup)
        done = min(max((update - self.warmup) / span, 0.0), 1.0)
        return rise * (self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done)))

    def schedule(self, optimizer: Optimizer, total: float) -> LambdaLR:
        """A scheduler to be stepped once per update.

        Args:
            optimizer: What it scales.
            total: The Trainer's number of updates, used where ``updates`` is not given; infinite for open-ended runs.
        """
        end = float(self.updates) if self.updates is not None else total
        if self.shape != "constant" and not math.isfinite(end):
            raise UsageError(
                f"a {self.shape} learning rate in a run without an end",
                "trainer.max_steps, or model.learning_rate.updates",
                "set one of them",
            )
        return LambdaLR(optimizer, lambda update: self.factor(update, end))
