"""Whether two clips move alike, whatever they show: agreement of their optical flows."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.metrics.base import PerClip
from muybridge.metrics.flow import dis_flow

STILL = 0.05
"""Pixels below which a flow is none."""


class FlowAgreement(NamedTuple):
    """How two flows agree, each (B,).

    Args:
        similarity: Cosine, weighted by the larger length: 1 is the same directions, 0 unrelated ones, -1 opposite ones.
        error: Mean distance of the two where either moves, as a share of the picture's diagonal.
        ratio: Total length of the first over that of the second.
    """

    similarity: Tensor
    error: Tensor
    ratio: Tensor


def flow_agreement(flow: Tensor, reference: Tensor) -> FlowAgreement:
    """``Σ w cos(u, v) / Σ w`` with ``w = max(|u|, |v|)`` where that is above 0.05 pixels, over all pixels and frames.

    Two clips in which nothing moves agree (1); one that moves and one that does not have nothing in common (0).

    Args:
        flow: (B, F-1, 2, H, W) in pixels.
        reference: Likewise.
    """
    if flow.shape != reference.shape or flow.ndim != 5 or flow.shape[2] != 2:
        raise UsageError(
            f"flows of shapes {tuple(flow.shape)} and {tuple(reference.shape)}", "two of (B, F-1, 2, H, W)"
        )
    u, v = flow.double(), reference.double()
    size_u, size_v = u.norm(dim=2), v.norm(dim=2)
    larger = torch.maximum(size_u, size_v)
    weight = torch.where(larger > STILL, larger, torch.zeros_like(larger))
    cosine = (u * v).sum(2) / (size_u * size_v).clamp(min=1e-12)
    # Where one of the two is still there is no direction to compare.
    cosine = torch.where(torch.minimum(size_u, size_v) > STILL, cosine, torch.zeros_like(cosine))
    total = weight.flatten(1).sum(1)
    similarity = torch.where(
        total > 0, (weight * cosine).flatten(1).sum(1) / total.clamp(min=1e-12), torch.ones_like(total)
    )
    moving = (weight > 0).double()
    diagonal = (flow.shape[-1] ** 2 + flow.shape[-2] ** 2) ** 0.5
    error = (moving * (u - v).norm(dim=2)).flatten(1).sum(1) / moving.flatten(1).sum(1).clamp(min=1.0) / diagonal
    ratio = size_u.flatten(1).sum(1) / size_v.flatten(1).sum(1).clamp(min=1e-12)
    return FlowAgreement(similarity.float(), error.float(), ratio.float())


def flow_similarity(pixels: Tensor, reference: Tensor) -> Tensor:
    """Similarity of the flows of two batches of clips by OpenCV's DIS, (B,).

    Args:
        pixels: (B, 3, F, H, W) in [-1, 1].
        reference: Likewise, of the same size.
    """
    return flow_agreement(dis_flow(pixels), dis_flow(reference)).similarity


class FlowSimilarity(PerClip):
    """Mean of :func:`flow_agreement`'s similarity of clips to references.

    Args:
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def update(
        self,
        pixels: Tensor,
        references: Tensor,
        flow: Optional[Tensor] = None,
        reference_flow: Optional[Tensor] = None,
    ) -> None:
        """Take some clips and what each is compared with, (B, 3, F, H, W) in [-1, 1]; their flows where these are known."""
        found = dis_flow(pixels) if flow is None else flow
        wanted = dis_flow(references) if reference_flow is None else reference_flow
        self.keep(flow_agreement(found, wanted).similarity)
