"""Distribution matching: pull the student's samples along the difference of two scores."""

from __future__ import annotations

import torch
from torch import Tensor

from muybridge.diffusion.steps import ScoreStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss


def mean_size(difference: Tensor, floor: float) -> Tensor:
    """``mean |d|`` of each sample over everything but the batch, at least ``floor``; shaped to divide ``d``."""
    return difference.abs().flatten(1).mean(1).clamp(min=floor).view(-1, *[1] * (difference.ndim - 1))


def pull(x: Tensor, gradient: Tensor) -> Tensor:
    """``½ mean (x - sg(x - g))²``, (B,): a loss whose gradient in ``x`` is ``g``, divided by its number of elements.

    Args:
        x: What is pulled, with gradient.
        gradient: ``g``, same shape.
    """
    target = (x - gradient).detach()
    return 0.5 * ((x - target) ** 2).flatten(1).mean(1)


class DistributionMatching(Loss):
    """``½ mean (x - sg(x - g))²`` with ``g = (x̂_fake - x̂_real)/w``, ``w = mean |x - x̂_real|`` of each sample (DMD2).

    At one score time the difference of the two clean estimates is that of the two scores times a positive number, so this
    descends the Kullback-Leibler divergence from the student's noised clips to the teacher's. All in float64.

    Args:
        floor: ``w`` is at least this.
    """

    def __init__(self, floor: float = 1e-5) -> None:
        super().__init__()
        if not floor > 0:
            raise UsageError(f"DistributionMatching floor is {floor}", "a small number above 0")
        self.floor = floor

    def forward(self, step: ScoreStep) -> Tensor:
        x, real, fake = step.sample.double(), step.real_x0.double(), step.fake_x0.double()
        with torch.no_grad():
            gradient = (fake - real) / mean_size(x - real, self.floor)
        return pull(x, gradient)


def shared_time(step: ScoreStep, loss: str) -> None:
    """Refuse a step whose frames have different score times."""
    t = step.t
    if t.ndim == 2 and bool((t != t[:, :1]).any()):
        raise UsageError(
            f"{loss} was given score times that differ between the frames of a clip",
            "one score time for all frames: at different times the scores of two frames belong to different noise levels, and"
            " their difference is no score of a motion",
            "draw one score time a clip (the student's own times may differ between blocks), or leave this loss out",
        )


def enough_frames(step: ScoreStep, loss: str, skipped: int) -> None:
    """Refuse clips in which there is no motion to look at."""
    frames = step.sample.shape[2]
    if frames - skipped < 2:
        rest = " after the first is skipped" if skipped else ""
        raise UsageError(
            f"{loss} was given clips of {frames} latent frame{'s' * (frames != 1)}",
            f"at least two latent frames{rest}: motion is what changes between two",
            "use longer clips, or leave this loss out",
        )


def frame_difference(x: Tensor) -> Tensor:
    """``Δx``: each frame's difference to the one before it."""
    return x[:, :, 1:] - x[:, :, :-1]
