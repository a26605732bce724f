"""The face of every loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """From one step to one number per sample.

    A loss reads the step and never the trainer, so the same class serves training, validation, attribution and tests. The
    job weighs several losses, averages over the samples and does everything else.
    """

    @abstractmethod
    def forward(self, step: Any) -> Tensor:
        """The loss of each sample, shape (B,).

        Args:
            step: A :class:`~muybridge.diffusion.DenoisingStep`, or a :class:`~muybridge.diffusion.ScoreStep` for losses of
                distillation.
        """


def per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32."""
    return x.float().flatten(1).mean(1)
