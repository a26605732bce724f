"""Attention motion flow (DiTFlow): where attention says that each place goes in the next frame."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from muybridge.backbones.attention import AttentionRecord, full_precision
from muybridge.backbones.base import Backbone
from muybridge.diffusion.predictions import upcast
from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import per_sample
from muybridge.losses.frozen_attention import LayerByLayer


class AttentionMotionFlow(LayerByLayer):
    """``mean |û - u|²`` where ``u`` is the displacement that attention expects from each frame to the next, in tokens (DiTFlow).

    Needs attention over space and time (Wan, CogVideoX, HunyuanVideo, LTX, Mochi): temporal attention that stays at one
    place says nothing of where to. The published method descends on latents at test time, compares all pairs of frames, and
    takes of the reference the place that is attended to most; here both are read in one way, so that the truth loses nothing.

    Args:
        t_min: Samples at this time or below count for nothing.
        jump: Length in timesteps of the step after which displacements are compared.
        layers: Full-match regex of the attention modules that are read; those of ``depth`` where not given.
        depth: The first share of the family's attention modules.
        temperature: Scores are multiplied by it before the softmax over the next frame's places.
    """

    def __init__(
        self,
        t_min: float = 500.0,
        jump: float = 20.0,
        layers: Optional[str] = None,
        depth: float = 0.5,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(t_min, jump, layers, depth)
        if not temperature > 0:
            raise UsageError(f"AttentionMotionFlow temperature is {temperature}", "a number above 0")
        self.temperature = temperature

    def check(self, backbone: Backbone) -> None:
        if backbone.attention_kind != "unified":
            raise UsageError(
                f"AttentionMotionFlow on {backbone.family}, whose temporal attention stays at one place",
                "a family with attention over space and time",
                "MotionFeatureMatching and SpaceTimeFeatures work for every family",
            )
        super().check(backbone)

    def forward(self, step: DenoisingStep) -> Tensor:
        if isinstance(step.network, Backbone) and step.network.attention_kind != "unified":
            self.check(step.network)
        return super().forward(step)

    def layer(self, predicted: AttentionRecord, true: AttentionRecord) -> Tensor:
        found, wanted = (expected_flow(record, self.temperature) for record in (predicted, true))
        return per_sample((found - wanted) ** 2)


def expected_flow(record: AttentionRecord, temperature: float) -> Tensor:
    """``Σ_j softmax_j(temperature · q_i k_jᵀ/√d) p_j - p_i`` from each frame to the next, (B, F-1, h·w, 2), x first.

    Scores are averaged over heads before the softmax.

    Args:
        record: Of unified attention.
        temperature: Of the softmax over the places j of the next frame.
    """
    assert record.grid is not None
    frames, height, width = record.grid
    query, key = (
        upcast(x).unflatten(2, (frames, height * width)) for x in (record.video_queries(), record.video_keys())
    )
    with full_precision(query):
        scores = torch.einsum("bhfid,bhfjd->bfij", query[:, :, :-1], key[:, :, 1:]) * record.scale / query.shape[1]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([x, y], -1).flatten(0, 1).to(scores)
        return (temperature * scores).softmax(-1) @ places - places
