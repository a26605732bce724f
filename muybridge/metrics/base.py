"""What every metric of clips shares: one value a clip is kept, so that a mean never stands without its spread."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Estimate(NamedTuple):
    """A mean over clips and how sure it is.

    Args:
        value: The mean.
        low: Lower end of its confidence interval.
        high: Upper end.
        clips: How many it is of.
    """

    value: float
    low: float
    high: float
    clips: int


def share(hits: int, count: int, z: float = 1.96) -> Estimate:
    """A share of some clips with Wilson's interval, which is right for shares near 0 and 1 too; 95 % with the default."""
    if not count:
        return Estimate(math.nan, 0.0, 1.0, 0)
    part = hits / count
    middle = (part + z**2 / (2.0 * count)) / (1.0 + z**2 / count)
    half = z * math.sqrt(part * (1.0 - part) / count + z**2 / (4.0 * count**2)) / (1.0 + z**2 / count)
    # At a share of 0 or 1 that end of the interval is the share itself, but for rounding.
    return Estimate(part, min(part, max(0.0, middle - half)), max(part, min(1.0, middle + half)), count)


def bootstrap(values: Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Lower and upper end of the mean's interval, from values (N,) drawn again with replacement."""
    values = values.detach().float().cpu()
    if not len(values):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.5 - level / 2.0, 0.5 + level / 2.0])).tolist()
    return low, high


def mean(values: Tensor, level: float = 0.95) -> Estimate:
    """A mean of some values, (N,), with its bootstrap interval."""
    low, high = bootstrap(values, level)
    return Estimate(float(values.float().mean()) if len(values) else math.nan, low, high, len(values))


class PerClip(Metric):
    """The mean of one value a clip; ``values`` are all of them, ``interval`` the mean's bootstrap confidence interval.

    Args:
        options: As for :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    samples: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("samples", default=[], dist_reduce_fx="cat")

    def keep(self, values: Tensor) -> None:
        """Take the values of some clips, (B,)."""
        self.samples.append(values.detach().float().to(self.device))

    @property
    def values(self) -> Tensor:
        """One value a clip, (N,)."""
        return dim_zero_cat(self.samples) if len(self.samples) else torch.zeros(0)

    def compute(self) -> Tensor:
        return self.values.mean()

    def interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Lower and upper end of the mean, from clips drawn again with replacement."""
        return bootstrap(self.values, level, draws, seed)
