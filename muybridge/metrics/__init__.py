"""What a clip's motion is worth, as torchmetrics; each also as a function."""

from muybridge.metrics.base import PerClip
from muybridge.metrics.flow import MotionAmount, MotionSmoothness, dis_flow, motion_amount, motion_smoothness
from muybridge.metrics.law import LawScore, law_score

__all__ = [
    "LawScore",
    "MotionAmount",
    "MotionSmoothness",
    "PerClip",
    "dis_flow",
    "law_score",
    "motion_amount",
    "motion_smoothness",
]
