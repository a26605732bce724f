"""Regression of a few-step student on its teacher's trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from muybridge.diffusion.steps import TrajectoryStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss


class TrajectoryRegression(Loss):
    """``mean (x̂0 - x)²`` against the trajectory's end ``x``, over the frames that were given noisy.

    Frames given clean (time 0) are context: their estimate is what they were given, whatever the network says, and would only
    thin the mean. A sample of nothing else has the loss 0. In the space of clean estimates all families' losses are alike.
    """

    def forward(self, step: TrajectoryStep) -> Tensor:
        if not isinstance(step, TrajectoryStep):
            raise UsageError(
                f"TrajectoryRegression was given a {type(step).__name__}",
                "a step along a trajectory: it belongs to the job TrajectoryDistillation",
                "for paired regression in Distillation use the loss Regression",
            )
        per_frame = (step.x0.float() - step.clean.float()).square().mean((1, 3, 4))
        noisy = (step.t > 0).reshape(len(step.t), -1).expand_as(per_frame)
        total = torch.where(noisy, per_frame, torch.zeros_like(per_frame)).sum(1)
        return total / noisy.sum(1).clamp(min=1)
