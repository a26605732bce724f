"""What watches a run."""

from callbacks.clip_losses import ClipLosses
from callbacks.ema import EMA
from callbacks.gradient_capture import GradientCapture
from callbacks.interruption import Interruption
from callbacks.motion_monitor import MotionMonitor
from callbacks.preemption import Preemption
from callbacks.progress_line import ProgressLine
from callbacks.samples import Samples

__all__ = [
    "EMA",
    "ClipLosses",
    "GradientCapture",
    "Interruption",
    "MotionMonitor",
    "Preemption",
    "ProgressLine",
    "Samples",
]
