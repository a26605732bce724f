"""Whether clips obey the law of their motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muybridge.errors import UsageError, did_you_mean
from muybridge.metrics.base import PerClip
from muybridge.proving_ground.laws import LAWS, judge
from muybridge.video import to_frames


def law_score(pixels: Tensor, motions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Score of each clip's own law, and which law fits best, as a number among ``LAWS``; -1 where none does at all.

    Args:
        pixels: Clips of the proving ground or of a model that learned it, (B, 3, F, H, W) in [-1, 1].
        motions: What each is to show.
    """
    if len(motions) != len(pixels):
        raise UsageError(f"{len(pixels)} clips and {len(motions)} motions", "one for each")
    for motion in motions:
        if motion not in LAWS:
            raise UsageError(f"no law of {motion!r}", f"one of {', '.join(LAWS)}", did_you_mean(motion, LAWS))
    own, best = [], []
    for clip, motion in zip(pixels, motions, strict=True):
        scores = [fit.score for fit in judge(to_frames(clip)).values()]
        own.append(scores[LAWS.index(motion)])
        best.append(scores.index(max(scores)) if max(scores) > 0.0 else -1)
    return torch.tensor(own), torch.tensor(best)


class LawScore(PerClip):
    """Mean score of each clip's own law, 0 to 1, and the table of which law was asked for and which fits best.

    Args:
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    confusion: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # One column more than laws, for clips that obey none.
        self.add_state("confusion", torch.zeros(len(LAWS), len(LAWS) + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pixels: Tensor, motions: Sequence[str]) -> None:
        """Take some clips and what each is to show."""
        own, best = law_score(pixels, motions)
        self.keep(own)
        for motion, found in zip(motions, best.tolist(), strict=True):
            self.confusion[LAWS.index(motion), found] += 1

    @property
    def accuracy(self) -> Tensor:
        """Share of clips whose own law fits best."""
        return self.confusion.diagonal().sum() / self.confusion.sum()
