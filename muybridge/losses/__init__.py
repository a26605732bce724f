"""Losses: one file an idea. ``docs/plug-in-a-loss.md`` shows how to add one, here or in a file of your own."""

from muybridge.losses.adversarial import Adversarial
from muybridge.losses.appearance_debiased import AppearanceDebiased
from muybridge.losses.attention_motion_flow import AttentionMotionFlow
from muybridge.losses.base import Loss, per_sample
from muybridge.losses.denoising import Denoising
from muybridge.losses.distribution_matching import DistributionMatching
from muybridge.losses.frame_residual import FrameResidual
from muybridge.losses.motion_feature_matching import MotionFeatureMatching
from muybridge.losses.motion_features import MotionFeatures
from muybridge.losses.motion_score_matching import MotionScoreMatching
from muybridge.losses.motion_weighted import MotionWeightedDenoising
from muybridge.losses.regression import Regression
from muybridge.losses.space_time_features import SpaceTimeFeatures
from muybridge.losses.temporal_high_pass import TemporalHighPass
from muybridge.losses.trajectory_regression import TrajectoryRegression

__all__ = [
    "Adversarial",
    "AppearanceDebiased",
    "AttentionMotionFlow",
    "Denoising",
    "DistributionMatching",
    "FrameResidual",
    "Loss",
    "MotionFeatureMatching",
    "MotionFeatures",
    "MotionScoreMatching",
    "MotionWeightedDenoising",
    "Regression",
    "SpaceTimeFeatures",
    "TemporalHighPass",
    "TrajectoryRegression",
    "per_sample",
]
