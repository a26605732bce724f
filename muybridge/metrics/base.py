"""What every metric of clips shares: one value a clip is kept, so that a mean never stands without its spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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
        values = self.values.cpu()
        generator = torch.Generator().manual_seed(seed)
        means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
        low, high = torch.quantile(means, torch.tensor([0.5 - level / 2.0, 0.5 + level / 2.0])).tolist()
        return low, high
