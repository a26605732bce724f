"""How far every pixel of a clip moves, by any estimator, and what that makes each place of the latent grid worth."""

from muybridge.motion.estimators import DIS, Displacement, FlowEstimator, MotionEstimator, compensate_camera
from muybridge.motion.networks import RAFT, AllTracker, CoTracker
from muybridge.motion.weights import MotionWeights, magnitude, motion_weights

__all__ = [
    "DIS",
    "RAFT",
    "AllTracker",
    "CoTracker",
    "Displacement",
    "FlowEstimator",
    "MotionEstimator",
    "MotionWeights",
    "compensate_camera",
    "magnitude",
    "motion_weights",
]
