"""A place in the noise schedule, given in whichever unit the user thinks in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError

Unit = Literal["timestep", "sigma", "logsnr", "fraction"]


@dataclass(frozen=True)
class Boundary:
    """One noise level, in one of four units; :meth:`resolve` turns it into a family's own time.

    ``sigma`` and ``logsnr`` mean the same signal-to-noise ratio in every family. ``timestep`` is the family's own label
    and ``fraction`` the share of its sampling steps, so those mean different ratios in different families.

    Args:
        value: The number.
        unit: ``timestep`` is 0..1000. ``sigma`` is the noise share ``σ/(α + σ)`` in [0, 1], for flow models simply σ.
            ``logsnr`` is ``log(α²/σ²)``. ``fraction`` in [0, 1] is the share of the sampling steps done, from noise.
    """

    value: float
    unit: Unit = "timestep"

    def __post_init__(self) -> None:
        limits = {
            "timestep": (0.0, 1000.0),
            "sigma": (0.0, 1.0),
            "fraction": (0.0, 1.0),
            "logsnr": (-math.inf, math.inf),
        }
        if self.unit not in limits:
            raise UsageError(f"boundary unit is {self.unit!r}", f"one of {', '.join(limits)}")
        low, high = limits[self.unit]
        if not low <= self.value <= high:
            raise UsageError(
                f"boundary of {self.value:g} {self.unit}",
                f"a value from {low:g} to {high:g}",
                "check the unit of the boundary",
            )

    def resolve(self, schedule: NoiseSchedule) -> float:
        """This place as a time of ``schedule``, 0 (clean) to 1000 (noise)."""
        if self.unit == "timestep":
            return float(self.value)
        if self.unit == "fraction":
            return schedule.time_of_fraction(self.value)
        if self.unit == "logsnr":
            return schedule.time_of_logsnr(self.value)
        if self.value in (0.0, 1.0):
            return schedule.time_of_logsnr(math.inf if self.value == 0.0 else -math.inf)
        return schedule.time_of_logsnr(2.0 * (math.log1p(-self.value) - math.log(self.value)))

    @classmethod
    def of_time(cls, t: float, unit: Unit, schedule: NoiseSchedule) -> Boundary:
        """The place ``t`` of ``schedule``, expressed in ``unit``."""
        if unit == "timestep":
            return cls(t, unit)
        if unit == "fraction":
            return cls(schedule.fraction_of_time(t), unit)
        alpha, sigma = (float(c) for c in schedule.coefficients(torch.tensor(t, dtype=torch.float64)))
        if unit == "sigma":
            return cls(sigma / (alpha + sigma), unit)
        return cls(
            2.0 * (math.log(alpha) - math.log(sigma)) if alpha and sigma else (math.inf if alpha else -math.inf), unit
        )
