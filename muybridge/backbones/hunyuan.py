"""HunyuanVideo: flow matching, joint attention over video and text, text last, guidance distilled into an embedding."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import rectified_flow
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError


class HunyuanVideo(Backbone):
    """HunyuanVideo (text to video).

    The output projection of the single-stream blocks is fused with their MLP's, so ``o`` of the motion projections means
    that of the dual-stream blocks.

    Args:
        embedded_guidance: Guidance scale that the network is told, and was distilled for; the pipeline's default is 6. It
            costs one call a step, other than the guidance of sampling, which the pipeline calls true.
    """

    family = "HunyuanVideo"
    pipelines = ("HunyuanVideoPipeline",)
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    temporal_attention = r"(?:single_)?transformer_blocks\.\d+\.attn"
    text_tokens: ClassVar[Optional[Literal["first", "last"]]] = "last"
    lays_own_levels = True
    default_text_length = 256

    def __init__(self, *args: Any, embedded_guidance: float = 6.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embedded_guidance = embedded_guidance

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        return rectified_flow(config)

    def _make_geometry(self) -> Geometry:
        vae, network = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        patch = int(network.get("patch_size", 2))
        return Geometry(
            channels=int(network.get("in_channels", 16)),
            spatial=int(vae.get("spatial_compression_ratio", 8)),
            temporal=int(vae.get("temporal_compression_ratio", 4)),
            patch=(int(network.get("patch_size_t", 1)), patch, patch),
        )

    def _check(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        if conditioning.mask is None or conditioning.pooled is None:
            raise UsageError(
                "HunyuanVideo was given text without its mask or without CLIP's pooled vector",
                "both: the network attends to the real tokens only, and is modulated by the vector",
                "cache the text again with this checkpoint",
            )

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        mask = conditioning.mask
        assert mask is not None
        guidance = torch.full((latents.shape[0],), self.embedded_guidance, dtype=latents.dtype, device=latents.device)
        return self.network(
            hidden_states=latents,
            timestep=t,
            encoder_hidden_states=conditioning.text,
            encoder_attention_mask=mask.to(latents.dtype),
            pooled_projections=conditioning.pooled,
            guidance=guidance * 1000.0,
            return_dict=False,
        )[0]

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, pooled, mask = pipeline.encode_prompt(
            prompts, max_sequence_length=self.max_text_length, device=self.device
        )
        return Conditioning(text, mask.bool(), pooled)

    def _set_steps(self, scheduler: Any, steps: int, latents: Tensor) -> None:
        scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=latents.device)
