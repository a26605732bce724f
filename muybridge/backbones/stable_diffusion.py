"""What the families grown out of Stable Diffusion share: an image VAE applied to each frame, and CLIP's 77 tokens."""

from __future__ import annotations

import inspect
from typing import Any, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.noise import variance_preserving
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError


class FrameWise(Backbone):
    """Families whose codec is an image VAE: frames are folded into the batch."""

    frames_at_once = 8
    """Frames per call of the VAE: a clip at once takes tens of gigabytes."""

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        return variance_preserving(config)

    @property
    def _vae_factor(self) -> int:
        return int(2 ** (len(self.checkpoint.config("vae").get("block_out_channels", (64,))) - 1))

    def _vae_encode(self, vae: Any, pixels: Tensor) -> Any:
        frames = pixels.transpose(1, 2).flatten(0, 1)
        parts = [vae.encode(chunk).latent_dist for chunk in frames.split(self.frames_at_once)]
        return type(parts[0])(torch.cat([part.parameters for part in parts]))

    def _from_codec(self, raw: Tensor, batch: int) -> Tensor:
        return raw.unflatten(0, (batch, -1)).transpose(1, 2)

    def _vae_decode(self, vae: Any, raw: Tensor) -> Tensor:
        # A decoder with temporal layers must be told how many of the images it is given are one clip.
        temporal = "num_frames" in inspect.signature(vae.forward).parameters
        frames = raw.transpose(1, 2).flatten(0, 1)
        parts = [
            vae.decode(chunk, **({"num_frames": len(chunk)} if temporal else {})).sample
            for clip in frames.split(raw.shape[2])
            for chunk in clip.split(self.frames_at_once)
        ]
        return torch.cat(parts).unflatten(0, (raw.shape[0], -1)).transpose(1, 2)


class ClipText(FrameWise):
    """Families conditioned on CLIP: always the number of tokens its positions are for."""

    default_text_length = 77

    def _text_length(self, wanted: Optional[int]) -> int:
        known = self.default_text_length
        if self.checkpoint.has("text_encoder"):
            known = int(self.checkpoint.config("text_encoder").get("max_position_embeddings", known))
        if wanted not in (None, known):
            raise UsageError(
                f"max_text_length is {wanted}",
                f"{known}, the number of tokens {self.family}'s text encoder has positions for",
                "leave max_text_length out",
            )
        return known

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, _ = pipeline.encode_prompt(prompts, self.device, 1, False)
        return Conditioning(text)
