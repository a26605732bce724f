"""Space-time features (SMM): how a clip's mean features differ between its frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from muybridge.backbones.attention import AttentionRecord
from muybridge.losses.frozen_attention import LayerByLayer, key_features


class SpaceTimeFeatures(LayerByLayer):
    """``mean 1 - cos(ŝ_f - ŝ_k, s_f - s_k)`` over all pairs of frames, ``s_f`` the mean over places of a frame's features (SMM).

    The published method reads activations of a decoder block and descends on latents at test time; here the features are the
    keys of the motion-carrying attention, which every family has in one layout, and the loss trains an adapter.

    Args:
        t_min: Samples at this time or below count for nothing.
        jump: Length in timesteps of the step after which features are compared.
        layers: Full-match regex of the attention modules that are read; those of ``depth`` where not given.
        depth: The first share of the family's motion-carrying attention modules.
    """

    reads_keys = True

    def layer(self, predicted: AttentionRecord, true: AttentionRecord) -> Tensor:
        return frame_pairs(key_features(predicted).mean(2), key_features(true).mean(2))


def frame_pairs(found: Tensor, wanted: Tensor) -> Tensor:
    """``mean_{k ≠ f} 1 - cos(ŝ_f - ŝ_k, s_f - s_k)``, (B,), of features (B, F, D)."""
    frames = found.shape[1]
    first, second = torch.triu_indices(frames, frames, 1, device=found.device)
    differences = [x[:, second] - x[:, first] for x in (found, wanted)]
    return (1.0 - F.cosine_similarity(differences[0], differences[1], dim=2)).mean(1)
