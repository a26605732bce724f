"""The plain denoising loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from muybridge.diffusion.schedules import broadcast_time
from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample


class Denoising(Loss):
    """``mean (prediction - target)²`` in the family's own kind, optionally weighted by the signal-to-noise ratio.

    Args:
        weighting: ``none``, or ``min_snr`` for ``min(SNR, γ)/SNR`` of Hang et al. 2023 (divided by ``SNR + 1`` instead of
            ``SNR`` for v and flow targets), which is made for the variance-preserving families.
        gamma: The γ of ``min_snr``.
    """

    def __init__(self, weighting: Literal["none", "min_snr"] = "none", gamma: float = 5.0) -> None:
        super().__init__()
        if weighting not in ("none", "min_snr"):
            raise UsageError(f"Denoising weighting is {weighting!r}", "none or min_snr")
        if not gamma > 0:
            raise UsageError(f"Denoising gamma is {gamma}", "a number above 0")
        self.weighting, self.gamma = weighting, gamma

    def forward(self, step: DenoisingStep) -> Tensor:
        squared = (step.prediction.float() - step.target.float()) ** 2
        if self.weighting == "min_snr":
            snr = step.schedule.logsnr(step.t.double()).exp()
            below = snr if step.schedule.prediction == "epsilon" else snr + 1.0
            weight = snr.clamp(max=self.gamma) / below.clamp(min=1e-12)
            squared = squared * broadcast_time(weight.float(), squared)
        return per_sample(squared)
