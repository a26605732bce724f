"""DMD1's paired regression: the student's one step against the teacher's whole path from the same noise."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from muybridge.diffusion.steps import ScoreStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss


class Regression(Loss):
    """``mean d(G(ε), y)`` where ``y`` is what the teacher's many-step sampler made of the same noise ``ε`` (DMD1).

    The pairs come from ``TrajectoryData``. Only a rollout that is left at its first step is a function of its noise alone, so
    turns that are left later count 0; a one-step student has the term in every turn. In latents, where DMD1 has LPIPS in pixels.

    Args:
        distance: ``l2``, ``l1``, or ``huber`` (the square root of ``d² + c²``, less ``c``, with ``c = 0.1``).
    """

    def __init__(self, distance: Literal["l2", "l1", "huber"] = "l2") -> None:
        super().__init__()
        if distance not in ("l2", "l1", "huber"):
            raise UsageError(f"Regression distance is {distance!r}", "l2, l1 or huber")
        self.distance = distance

    def forward(self, step: ScoreStep) -> Tensor:
        sample = step.sample.double()
        if step.target is None:
            return 0.0 * sample.flatten(1).sum(1)
        difference = sample - step.target.double()
        if self.distance == "l2":
            value = difference**2
        elif self.distance == "l1":
            value = difference.abs()
        else:
            value = (difference**2 + 0.01).sqrt() - 0.1
        return value.flatten(1).mean(1)
