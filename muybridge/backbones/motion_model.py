"""A backbone read as a model of motion: of differences of frames, alone or after given frames."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.differences import Differences
from muybridge.diffusion.predictions import guide
from muybridge.diffusion.samplers import Denoiser
from muybridge.errors import UsageError


def check_motion_model(backbone: Backbone, differences: Differences, window: int) -> None:
    """Refuse what the family's network can't be given; needs no weights.

    Args:
        backbone: Loaded or not.
        differences: The map.
        window: Differences that are modelled together.
    """
    if differences.given and not backbone.per_frame_times:
        raise UsageError(
            f"a motion model on {backbone.family} that is given {differences.context} frames",
            "a family with per-frame times (Wan): the given frames are clean while the differences are noisy",
            "set context to 0, which models all differences of a clip without a frame",
        )
    frames, geometry = differences.context + window, backbone.geometry
    if geometry.frames is not None and frames != geometry.frames:
        raise UsageError(
            f"{frames} frames for {backbone.family}, whose network has positions for {geometry.frames} alone",
            f"{geometry.frames} given frames and differences together",
            "use another family: a clip has one difference less than frames",
        )
    if frames % geometry.patch[0]:
        raise UsageError(
            f"{frames} given frames and differences for {backbone.family}",
            f"a multiple of its patch, {geometry.patch[0]}",
        )
    if backbone.causal is not None:
        backbone.causal.spans(frames)


class MotionModel:
    """What a backbone says of noisy differences.

    Given frames come before the differences in the network's own sequence, clean and at time 0; no weight is added, and the
    network's first frames stay frames.

    Args:
        backbone: Loaded.
        differences: The map.
    """

    def __init__(self, backbone: Backbone, differences: Differences) -> None:
        self.backbone, self.differences = backbone, differences

    def denoise(self, noisy: Tensor, t: Tensor, conditioning: Conditioning, context: Optional[Tensor] = None) -> Tensor:
        """The raw prediction for noisy differences.

        Args:
            noisy: (B, C, differences, H, W).
            t: Times, (B,).
            conditioning: One per sample.
            context: The given frames, (B, C, k, H, W); needed where the map has any.
        """
        k = self.differences.context
        if (context is None) != (k == 0) or (context is not None and context.shape[2] != k):
            given = 0 if context is None else context.shape[2]
            raise ValueError(f"{given} given frames: expected {k}")
        if context is None:
            return self.backbone(noisy, t, conditioning)
        times = torch.cat([t.new_zeros(len(t), k), t[:, None].expand(-1, noisy.shape[2])], 1)
        sequence = torch.cat([context.to(noisy), noisy], 2)
        return self.backbone(sequence, times, conditioning)[:, :, k:]

    def denoiser(
        self,
        conditioning: Conditioning,
        context: Optional[Tensor] = None,
        unconditional: Optional[Conditioning] = None,
        guidance: float = 1.0,
    ) -> Denoiser:
        """A denoiser of differences under standard guidance."""

        def denoise(noisy: Tensor, t: Tensor) -> Tensor:
            prediction = self.denoise(noisy, t, conditioning, context)
            if guidance == 1.0:
                return prediction
            empty = self.backbone.pair_unconditional(conditioning, unconditional)
            return guide(self.denoise(noisy, t, empty, context), prediction, guidance)

        return denoise
