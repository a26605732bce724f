"""What watches a run."""

from callbacks.ema import EMA
from callbacks.preemption import Preemption
from callbacks.samples import Samples

__all__ = ["EMA", "Preemption", "Samples"]
