"""Motion features (MOFT): the channels in which a clip's features change most over its frames."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from muybridge.backbones.attention import AttentionRecord
from muybridge.errors import UsageError
from muybridge.losses.frozen_attention import LayerByLayer, key_features

LEAST = 4
"""Channels that are kept at least: of one, a cosine is a sign."""


class MotionFeatures(LayerByLayer):
    """``mean 1 - cos(m̂, m)`` at every place and frame, ``m`` the features less their mean over frames, in a few channels (MOFT).

    The channels are those with the largest entries of the true clip's first principal component. Features are the keys of the
    motion-carrying attention, before their rotation, which every family has in one layout.

    Args:
        t_min: Samples at this time or below count for nothing.
        jump: Length in timesteps of the step after which features are compared.
        layers: Full-match regex of the attention modules that are read; those of ``depth`` where not given.
        depth: The first share of the family's motion-carrying attention modules.
        channels: Share of the channels that is kept; at least 4.
    """

    reads_keys = True

    def __init__(
        self,
        t_min: float = 500.0,
        jump: float = 20.0,
        layers: Optional[str] = None,
        depth: float = 0.5,
        channels: float = 0.04,
    ) -> None:
        super().__init__(t_min, jump, layers, depth)
        if not 0.0 < channels <= 1.0:
            raise UsageError(f"MotionFeatures channels is {channels}", "a share above 0 and up to 1")
        self.channels = channels

    def layer(self, predicted: AttentionRecord, true: AttentionRecord) -> Tensor:
        found, wanted = (x - x.mean(1, keepdim=True) for x in (key_features(predicted), key_features(true)))
        count = min(max(LEAST, round(self.channels * wanted.shape[-1])), wanted.shape[-1])
        kept = motion_channels(wanted, count)[:, None, None].expand(*wanted.shape[:3], -1)
        cosine = F.cosine_similarity(found.gather(3, kept), wanted.gather(3, kept), dim=3)
        return (1.0 - cosine).flatten(1).mean(1)


def motion_channels(features: Tensor, count: int) -> Tensor:
    """Channels with the largest entries of the first principal component over frames and places, (B, count).

    Args:
        features: Without their mean over frames, (B, F, places, D).
        count: How many.
    """
    rows = features.detach().flatten(1, 2).double()
    # The mean over frames is gone already at every place, so these rows have none left.
    _, vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
    return vectors[..., -1].abs().topk(count, dim=1).indices
