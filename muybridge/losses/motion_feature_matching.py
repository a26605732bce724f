"""Motion feature matching (MotionMatcher): attention maps say how a clip moves and is framed, and little of how it looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from muybridge.backbones.attention import AttentionRecord
from muybridge.backbones.taps import Kind
from muybridge.errors import UsageError
from muybridge.losses.base import per_sample
from muybridge.losses.frozen_attention import FrozenAttention, crossing, temporal


class MotionFeatureMatching(FrozenAttention):
    """``λ_TSA mean (T̂ - T)² + λ_CA mean (Ĉ - C)²`` between maps of the frozen base.

    ``T`` is temporal self-attention, which carries how things move: the whole map of each place where a family has temporal
    attention, and where attention is over space and time how each place attends to itself in other frames (the whole map would
    take 24 GiB a layer at 480p). ``C`` is attention to text, which carries framing. Maps are averaged over heads and over
    layers of one resolution before they are compared. To be listed alone, as published, or beside ``Denoising``.

    Args:
        temporal_weight: ``λ_TSA``.
        cross_weight: ``λ_CA``; 0 reads no cross attention.
        t_min: Samples at this time or below count for nothing.
        jump: Length in timesteps of the step after which maps are compared. The published code takes 1, whose differences
            (and the numbers 2000 of its two weights) are 400 times smaller; a network in bfloat16 rounds those away.
        layers: Full-match regex of the attention modules that are read; those of ``depth`` where not given.
        depth: The first share of the family's temporal and cross attention modules.
    """

    def __init__(
        self,
        temporal_weight: float = 5.0,
        cross_weight: float = 5.0,
        t_min: float = 500.0,
        jump: float = 20.0,
        layers: Optional[str] = None,
        depth: float = 0.5,
    ) -> None:
        super().__init__(t_min, jump, layers, depth)
        if not (temporal_weight >= 0 and cross_weight >= 0 and temporal_weight + cross_weight > 0):
            raise UsageError(
                f"MotionFeatureMatching weights are {temporal_weight} and {cross_weight}", "0 or more, and not both 0"
            )
        self.temporal_weight, self.cross_weight = temporal_weight, cross_weight
        chosen: dict[Kind, float] = {"temporal": temporal_weight, "cross": cross_weight}
        self.kinds = tuple(kind for kind, weight in chosen.items() if weight)

    def compare(self, predicted: list[AttentionRecord], true: list[AttentionRecord]) -> Tensor:
        total = torch.zeros((), device=predicted[0].query.device)
        for weight, chosen, make in (
            (self.temporal_weight, temporal, lambda r: r.same_site_map(mean_heads=True)),
            (self.cross_weight, crossing, lambda r: r.cross_map(among_text=True, mean_heads=True)),
        ):
            if not weight:
                continue
            found, wanted = (mean_maps(chosen(records), make) for records in (predicted, true))
            if not found:
                continue
            distances = [per_sample((found[shape] - wanted[shape]) ** 2) for shape in found]
            total = total + weight * torch.stack(distances).mean(0)
        if total.ndim == 0:
            raise UsageError(
                f"MotionFeatureMatching read {len(predicted)} layers, none of them temporal attention or attention to text",
                "layers of these kinds",
                "check the regex layers",
            )
        return total


def mean_maps(
    records: list[AttentionRecord], make: Callable[[AttentionRecord], Tensor]
) -> dict[tuple[int, ...], Tensor]:
    """Maps averaged over the layers of one resolution; by their shape.

    Args:
        records: Of one pass.
        make: From a record to its map, averaged over heads.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for record in records:
        averaged = make(record)
        groups.setdefault(tuple(averaged.shape), []).append(averaged)
    return {shape: torch.stack(maps).mean(0) for shape, maps in groups.items()}
