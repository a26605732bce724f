"""CogVideoX 2b, 5b and 1.5: v-prediction with zero terminal SNR, joint attention over text and video, text first."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import variance_preserving
from muybridge.diffusion import samplers
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError


class CogVideoX(Backbone):
    """CogVideoX 2b, 5b and 1.5 (text to video)."""

    family = "CogVideoX"
    pipelines = ("CogVideoXPipeline",)
    block_lists = ("transformer_blocks",)
    temporal_attention = r"transformer_blocks\.\d+\.attn1"
    text_tokens: ClassVar[Optional[Literal["first", "last"]]] = "first"
    default_text_length = 226

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        return variance_preserving(config)

    def _make_geometry(self) -> Geometry:
        vae, network = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        patch = int(network.get("patch_size", 2))
        return Geometry(
            channels=int(network.get("in_channels", 16)),
            spatial=2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1),
            temporal=int(vae.get("temporal_compression_ratio", 4)),
            patch=(int(network.get("patch_size_t") or 1), patch, patch),
        )

    @property
    def trained_clip(self) -> Optional[tuple[int, int, int]]:
        config, geometry = self.checkpoint.config("transformer"), self.geometry
        frames, height, width = (int(config.get(f"sample_{n}") or 0) for n in ("frames", "height", "width"))
        if not frames or not height or not width:
            return None
        # 1.5 names a count of frames that its patches in time don't divide; its pipeline pads, and we round up.
        latent = -(-((frames - 1) // geometry.temporal + 1) // geometry.patch[0]) * geometry.patch[0]
        return (latent - 1) * geometry.temporal + 1, height * geometry.spatial, width * geometry.spatial

    def _text_length(self, wanted: Optional[int]) -> int:
        trained = int(self.checkpoint.config("transformer").get("max_text_seq_length", self.default_text_length))
        if wanted is not None and wanted != trained and not self._rotary:
            raise UsageError(
                f"max_text_length is {wanted}",
                f"{trained}: this network's positions are laid out after exactly so many text tokens",
                "leave max_text_length out",
            )
        return wanted or trained

    @property
    def _rotary(self) -> bool:
        """Whether positions are rotary (5b, 1.5) rather than added once (2b)."""
        return bool(self.checkpoint.config("transformer").get("use_rotary_positional_embeddings", False))

    def _check(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        length = conditioning.text.shape[1]
        if length != self.max_text_length and not self._rotary:
            raise UsageError(
                f"text of {length} tokens",
                f"{self.max_text_length}: this network's positions are laid out after exactly so many text tokens",
                "encode the prompts again with this checkpoint",
            )

        config = self.checkpoint.config("transformer")
        if self._rotary and config.get("patch_size_t"):
            limits = int(config.get("sample_height", 60)), int(config.get("sample_width", 90))
            size = latents.shape[3], latents.shape[4]
            if size[0] > limits[0] or size[1] > limits[1]:
                raise UsageError(
                    f"latents of {size[0]}x{size[1]}",
                    f"at most {limits[0]}x{limits[1]}: this network's rotary tables end there",
                    "use smaller frames",
                )

    def _rotary_embedding(self, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary tables for latents of this size, as the pipeline builds them; the network runs wrongly without."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config: Any = self.network.config
        patch_t, patch, _ = self.geometry.patch
        grid = (height // patch, width // patch)
        base_height, base_width = config.sample_height // patch, config.sample_width // patch
        make = partial(get_3d_rotary_pos_embed, embed_dim=config.attention_head_dim, grid_size=grid, device=device)
        if config.patch_size_t is None:
            crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
            return make(crops_coords=crops, temporal_size=frames)
        return make(
            crops_coords=None, temporal_size=frames // patch_t, grid_type="slice", max_size=(base_height, base_width)
        )

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height, width = latents.shape[2:]
        rotary = self._rotary_embedding(frames, height, width, latents.device) if self._rotary else None
        prediction = self.network(
            hidden_states=latents.transpose(1, 2),
            encoder_hidden_states=conditioning.text,
            timestep=t,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_text_length, device=self.device
        )
        return Conditioning(text)

    def _scheduler_step(self, generator: Optional[samplers.Generators]) -> samplers.SchedulerStep:
        if self.checkpoint.class_of("scheduler") != "CogVideoXDPMScheduler":
            return super()._scheduler_step(generator)
        old_x0: Optional[Tensor] = None
        back: Optional[Tensor] = None

        def step(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
            # This solver looks one step back, and draws noise in the shape it is given: frames before channels.
            nonlocal old_x0, back
            z, old_x0 = scheduler.step(
                prediction.float().transpose(1, 2),
                old_x0,
                timestep,
                back,
                latents.transpose(1, 2),
                generator=generator,
                return_dict=False,
            )
            back = timestep
            return z.transpose(1, 2)

        return step
