"""Which times a job draws: distributions on the noise level, restricted to a range and clamped.

Each is given by its quantile function, so that training draws (quantile of a uniform number), validation at fixed
quantiles, and restriction to a range (a stretch of the uniform number) are the same few lines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Optional

import torch
from torch import Tensor

from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.schedules import T_MAX, FlowSchedule, NoiseSchedule, shift_level, unshift_level
from muybridge.errors import UsageError


class TimestepSampler(ABC):
    """A distribution of times.

    Args:
        low: Nothing is drawn below it. The distribution is *truncated*: its mass is rescaled into the range.
        high: Nothing is drawn above it.
        clamp: ``[low, high]`` timesteps to which drawn times are moved instead, as the published recipes of
            distillation do (they put 9 to 14 per cent of all draws on the upper end).
    """

    def __init__(
        self, low: Optional[Boundary] = None, high: Optional[Boundary] = None, clamp: Optional[list[float]] = None
    ) -> None:
        if clamp is not None and not (len(clamp) == 2 and 0 <= clamp[0] < clamp[1] <= T_MAX):
            raise UsageError(f"clamp is {clamp}", "two timesteps [low, high] with 0 <= low < high <= 1000")
        self.low, self.high, self.clamp = low, high, clamp

    @abstractmethod
    def _quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Noise level in [0, 1] below which a share ``u`` of the unrestricted distribution lies."""

    @abstractmethod
    def _share_below(self, level: float, schedule: NoiseSchedule) -> float:
        """The inverse of :meth:`_quantile`."""

    def bounds(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """The times between which all draws lie; refuses a range without any."""
        low = self.low.resolve(schedule) if self.low else 0.0
        high = self.high.resolve(schedule) if self.high else T_MAX
        self._known_ends(low, high, schedule)
        return low, high

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The time below which a share ``u`` of the draws lies, as the family's network knows it."""
        low, high = self.bounds(schedule)
        a, b = self._share_below(low / T_MAX, schedule), self._share_below(high / T_MAX, schedule)
        t = self._quantile(a + (b - a) * u.double(), schedule) * T_MAX
        if self.clamp is not None:
            t = t.clamp(*self.clamp)
        # Rounding must not leave the range, or a gated adapter would be trained where it is never applied.
        first, last = self._known_ends(low, high, schedule)
        if isinstance(schedule, FlowSchedule) and high < T_MAX:
            # A continuous range ends below its upper end: at the boundary of two experts the other one begins.
            last = float(torch.nextafter(torch.tensor(last), torch.tensor(first)))
        return schedule.settle(t.float()).clamp(first, last)

    def _known_ends(self, low: float, high: float, schedule: NoiseSchedule) -> tuple[float, float]:
        """The first and the last time of the range that the family's network knows."""

        def known(t: float) -> float:
            return float(schedule.snap(torch.tensor(t, dtype=torch.float64)))

        # Rounding to the nearest may go outwards; rounding inwards may still find nothing there.
        first = known(low) if known(low) >= low else known(math.ceil(low))
        last = known(high) if known(high) <= high else known(math.floor(high))
        if not (low < high and low <= first <= last <= high):
            raise UsageError(
                f"the time range is empty: it runs from {low:g} to {high:g}",
                "low below high, from 0 (clean) to 1000 (noise), with a time between them that the network knows",
            )
        return first, last

    def sample(self, count: int, schedule: NoiseSchedule, generator: Optional[torch.Generator] = None) -> Tensor:
        """``count`` draws."""
        return self.quantile(torch.rand(count, generator=generator, dtype=torch.float64), schedule)


class Uniform(TimestepSampler):
    """Uniform in the time label: the training distribution of the variance-preserving families."""

    def _quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return u

    def _share_below(self, level: float, schedule: NoiseSchedule) -> float:
        return level


class Shifted(TimestepSampler):
    """Uniform, then shifted towards noise by ``f_s``: score times of distillation, flow training at high resolution.

    Args:
        shift: ``s``; the family's own sampling shift where not given.
        low: Nothing is drawn below it (truncated).
        high: Nothing is drawn above it (truncated).
        clamp: ``[low, high]`` timesteps to which draws are moved.
    """

    def __init__(
        self,
        shift: Optional[float] = None,
        low: Optional[Boundary] = None,
        high: Optional[Boundary] = None,
        clamp: Optional[list[float]] = None,
    ) -> None:
        super().__init__(low, high, clamp)
        if shift is not None and not shift > 0:
            raise UsageError(f"shift is {shift}", "a number above 0 (1 is no shift)")
        self.shift = shift

    def _quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return shift_level(u, self.shift or schedule.shift)  # type: ignore[return-value]

    def _share_below(self, level: float, schedule: NoiseSchedule) -> float:
        return float(unshift_level(level, self.shift or schedule.shift))


class LogitNormal(TimestepSampler):
    """``logit(σ) ~ N(mean, std²)``: the training distribution of several flow models, optionally shifted afterwards.

    Args:
        mean: Mean of the logit.
        std: Standard deviation of the logit.
        shift: Shift applied to the drawn level; 1 is none.
        low: Nothing is drawn below it (truncated).
        high: Nothing is drawn above it (truncated).
        clamp: ``[low, high]`` timesteps to which draws are moved.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
        low: Optional[Boundary] = None,
        high: Optional[Boundary] = None,
        clamp: Optional[list[float]] = None,
    ) -> None:
        super().__init__(low, high, clamp)
        if not (std > 0 and shift > 0):
            raise UsageError(f"std is {std} and shift is {shift}", "both above 0")
        self.mean, self.std, self.shift = mean, std, shift

    def _quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        normal = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        return shift_level(torch.sigmoid(self.mean + self.std * normal), self.shift)  # type: ignore[return-value]

    def _share_below(self, level: float, schedule: NoiseSchedule) -> float:
        if level <= 0.0 or level >= 1.0:
            return min(max(level, 0.0), 1.0)
        raw = float(unshift_level(level, self.shift))
        z = (math.log(raw) - math.log1p(-raw) - self.mean) / self.std
        return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
