"""What a clip's motion is worth, as torchmetrics; each also as a function."""

from muybridge.metrics.base import Estimate, PerClip
from muybridge.metrics.flow import MotionAmount, MotionSmoothness, dis_flow, motion_amount, motion_smoothness
from muybridge.metrics.law import LawScore, law_score
from muybridge.metrics.likelihood import MotionLikelihood, motion_likelihood
from muybridge.metrics.reading import Leakage, ReaderAccuracy, leak, read_pixels

__all__ = [
    "Estimate",
    "LawScore",
    "Leakage",
    "MotionAmount",
    "MotionLikelihood",
    "MotionSmoothness",
    "PerClip",
    "ReaderAccuracy",
    "dis_flow",
    "law_score",
    "leak",
    "motion_amount",
    "motion_likelihood",
    "motion_smoothness",
    "read_pixels",
]
