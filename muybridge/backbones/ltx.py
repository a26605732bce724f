"""LTX-Video: flow matching on strongly compressed latents, given to the network as a row of tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import rectified_flow
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError


class LTX(Backbone):
    """LTX-Video (text to video).

    Its sampling shift depends on the size of the clip; ``schedule.shift`` is that of the largest size its configuration
    names.

    Args:
        frame_rate: Frames per second of the clips: its rotary positions are seconds.
    """

    family = "LTX"
    pipelines = ("LTXPipeline",)
    block_lists = ("transformer_blocks",)
    temporal_attention = r"transformer_blocks\.\d+\.attn1"
    cross_attention: ClassVar[Optional[str]] = r"transformer_blocks\.\d+\.attn2"
    per_frame_times = True
    lays_own_levels = True
    default_text_length = 128

    def __init__(self, *args: Any, frame_rate: float = 25.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_frame_rate(frame_rate)

    def set_frame_rate(self, fps: float) -> None:
        """Say how many frames a second the clips have that follow."""
        if not fps > 0:
            raise UsageError(f"frame_rate is {fps}", "frames per second, above 0")
        self.frame_rate = fps

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        dynamic = bool(config.get("use_dynamic_shifting"))
        return rectified_flow(config, math.exp(float(config.get("max_shift") or 1.15)) if dynamic else None)

    def _make_geometry(self) -> Geometry:
        vae, network = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        halvings = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        patch = int(network.get("patch_size", 1))
        return Geometry(
            channels=int(network.get("in_channels", 128)),
            spatial=int(vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * halvings),
            temporal=int(vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * halvings),
            patch=(int(network.get("patch_size_t", 1)), patch, patch),
        )

    def _check(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        if conditioning.mask is None:
            raise UsageError(
                "LTX was given text without its mask",
                "the mask of the real tokens: the network would attend to the padding",
                "cache the text again with this checkpoint",
            )

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height, width = latents.shape[2:]
        if t.ndim == 2:
            t = t.repeat_interleave(height * width, dim=1)
        tokens = self.network(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=conditioning.text,
            timestep=t,
            encoder_attention_mask=conditioning.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(
                self.geometry.temporal / self.frame_rate,
                self.geometry.spatial,
                self.geometry.spatial,
            ),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (frames, height, width))

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_text_length, device=self.device
        )
        return Conditioning(text, mask.bool())

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        # This VAE holds its statistics as buffers.
        center, spread = vae.latents_mean.float(), vae.latents_std.float() / float(vae.config.scaling_factor)
        return center.view(1, -1, 1, 1, 1), spread.view(1, -1, 1, 1, 1)

    def _vae_decode(self, vae: Any, raw: Tensor) -> Tensor:
        # Later decoders finish the denoising themselves; the pipeline's default tells them there is none left.
        time = (
            torch.zeros(raw.shape[0], device=raw.device, dtype=raw.dtype) if vae.config.timestep_conditioning else None
        )
        return vae.decode(raw, time, return_dict=False)[0]

    def _set_steps(self, scheduler: Any, steps: int, latents: Tensor) -> None:
        config = scheduler.config
        # The log of the shift grows linearly with the number of tokens.
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (math.prod(latents.shape[2:]) - config.base_image_seq_len)
        scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=latents.device, mu=mu)
