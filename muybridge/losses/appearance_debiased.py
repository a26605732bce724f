"""The denoising loss with less weight on what is the same in all frames (MotionDirector)."""

from __future__ import annotations

from torch import Tensor

from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample


class AppearanceDebiased(Loss):
    """``mean (p̂ - p)² + mean (φ(p̂) - φ(p))²`` with ``φ(x)_f = √(β² + 1) x_f - β x_k`` (MotionDirector).

    The anchor frame ``k`` is drawn at random there; here the mean over all anchors is taken, in closed form. With ``d = p̂ - p``,
    ``m = mean d²`` and ``s = mean (mean_f d)²`` the second term is ``(2 β² + 1) m - 2 β √(β² + 1) s``, which weighs what is
    the same in all frames less than what changes.

    Args:
        beta: ``β``; 0 is twice the denoising loss.
        plain_weight: Weight of the first term; 0 leaves the debiased one alone.
    """

    def __init__(self, beta: float = 1.0, plain_weight: float = 1.0) -> None:
        super().__init__()
        if not beta >= 0 or not plain_weight >= 0:
            raise UsageError(f"AppearanceDebiased beta is {beta}, plain_weight is {plain_weight}", "0 or more")
        self.beta, self.plain_weight = beta, plain_weight

    def forward(self, step: DenoisingStep) -> Tensor:
        error = step.prediction.float() - step.target.float()
        mean, same = per_sample(error**2), per_sample(error.mean(2) ** 2)
        b = self.beta
        debiased = (2.0 * b**2 + 1.0) * mean - 2.0 * b * (b**2 + 1.0) ** 0.5 * same
        return self.plain_weight * mean + debiased
