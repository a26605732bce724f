"""What watches a run."""

from callbacks.ema import EMA
from callbacks.motion_monitor import MotionMonitor
from callbacks.preemption import Preemption
from callbacks.samples import Samples

__all__ = ["EMA", "MotionMonitor", "Preemption", "Samples"]
