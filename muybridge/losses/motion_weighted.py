"""The denoising loss where things move."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample


class MotionWeightedDenoising(Loss):
    """``1/F mean_{f,h,w} W(f, h, w) mean_c (prediction - target)²`` (eq. 9): what attribution takes gradients of.

    Args:
        weights: ``motion`` takes the weights that come with the clips; ``ones`` is the whole clip, the control.
        per_frame: The factor 1/F, F being the latent frames. It cancels in a cosine; what removes the bias towards long clips is
            bringing clips to one length.
    """

    def __init__(self, weights: Literal["motion", "ones"] = "motion", per_frame: bool = True) -> None:
        super().__init__()
        if weights not in ("motion", "ones"):
            raise UsageError(f"MotionWeightedDenoising weights is {weights!r}", "motion or ones")
        self.weights, self.per_frame = weights, per_frame

    def forward(self, step: DenoisingStep) -> Tensor:
        squared = (step.prediction.float() - step.target.float()) ** 2
        if self.weights == "motion":
            if step.weights is None:
                raise UsageError(
                    "MotionWeightedDenoising was given clips without motion weights",
                    "a cache with a column weights, and motion_weights: true in the data",
                    "run `muybridge cache` with --motion DIS, or set the loss's weights to ones for the whole clip",
                )
            wanted = (squared.shape[0], 1, *squared.shape[2:])
            if tuple(step.weights.shape) != wanted:
                raise UsageError(f"motion weights of shape {tuple(step.weights.shape)}", f"{wanted}, as the latents")
            squared = squared * step.weights.float()
        value = per_sample(squared)
        return value / squared.shape[2] if self.per_frame else value
