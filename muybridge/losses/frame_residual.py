"""Frame residuals (VMC): what changes from frame to frame should point the way it really does."""

from __future__ import annotations

from typing import Literal, Optional

import torch.nn.functional as F
from torch import Tensor

from muybridge.diffusion.predictions import Prediction
from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample


class FrameResidual(Loss):
    """``mean_f 1 - cos(Δp̂_f, Δp_f)`` between the frame differences of the prediction and of the truth (VMC).

    Args:
        kind: What the two are compared as. VMC compares noise; where not given that is so for networks that predict noise, and
            for others the clean estimate is compared, since their noise estimate is hardly the network's own near pure noise.
        mode: ``vector`` is the paper's: one cosine for each pair of frames. ``released`` is what its code does: the absolute
            difference of differences, and a cosine along the frames at every place.
    """

    def __init__(self, kind: Optional[Prediction] = None, mode: Literal["vector", "released"] = "vector") -> None:
        super().__init__()
        if kind not in (None, "epsilon", "x0", "flow", "v"):
            raise UsageError(f"FrameResidual kind is {kind!r}", "epsilon, x0, flow or v")
        if mode not in ("vector", "released"):
            raise UsageError(f"FrameResidual mode is {mode!r}", "vector or released")
        self.kind, self.mode = kind, mode

    def forward(self, step: DenoisingStep) -> Tensor:
        if step.clean.shape[2] < 2:
            raise UsageError(
                "FrameResidual was given clips of 1 latent frame",
                "at least 2: a residual lies between two",
                "longer clips",
            )
        schedule = step.schedule
        kind = self.kind or ("epsilon" if schedule.prediction == "epsilon" else "x0")
        predicted, true = (
            schedule.to_kind(p, step.noisy, step.t, kind).float().diff(dim=2) for p in (step.prediction, step.target)
        )
        if self.mode == "released":
            return per_sample(1.0 - F.cosine_similarity(predicted.abs(), true.abs(), dim=2))
        found, wanted = (x.movedim(2, 1).flatten(2) for x in (predicted, true))
        return (1.0 - F.cosine_similarity(found, wanted, dim=2)).mean(1)
