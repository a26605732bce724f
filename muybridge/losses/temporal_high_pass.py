"""The denoising loss of what changes over time."""

from __future__ import annotations

from torch import Tensor

from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample


class TemporalHighPass(Loss):
    """``mean ((p̂ - p) - mean_f(p̂ - p))²``: the denoising loss without what is the same in all frames."""

    def forward(self, step: DenoisingStep) -> Tensor:
        error = step.prediction.float() - step.target.float()
        if error.shape[2] < 2:
            raise UsageError(
                "TemporalHighPass was given clips of 1 latent frame",
                "at least 2: of one frame nothing is left",
                "longer clips",
            )
        return per_sample((error - error.mean(2, keepdim=True)) ** 2)
