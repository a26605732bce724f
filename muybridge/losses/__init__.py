"""Losses: one file an idea. ``docs/plug-in-a-loss.md`` shows how to add one, here or in a file of your own."""

from muybridge.losses.adversarial import Adversarial
from muybridge.losses.base import Loss, per_sample
from muybridge.losses.denoising import Denoising
from muybridge.losses.distribution_matching import DistributionMatching
from muybridge.losses.motion_score_matching import MotionScoreMatching
from muybridge.losses.motion_weighted import MotionWeightedDenoising
from muybridge.losses.regression import Regression
from muybridge.losses.trajectory_regression import TrajectoryRegression

__all__ = [
    "Adversarial",
    "Denoising",
    "DistributionMatching",
    "Loss",
    "MotionScoreMatching",
    "MotionWeightedDenoising",
    "Regression",
    "TrajectoryRegression",
    "per_sample",
]
