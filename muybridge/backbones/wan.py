"""Wan 2.1 and 2.2: flow matching, unified attention over space and time, two experts in 2.2's A14B."""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.causal import Causal, install
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import rectified_flow
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule


class Wan(Backbone):
    """Wan 2.1 (1.3B, 14B) and 2.2 (A14B with two experts, TI2V-5B without an image)."""

    family = "Wan"
    pipelines = ("WanPipeline",)
    network_names = ("transformer", "transformer_2")
    block_lists = ("blocks",)
    temporal_attention = r"blocks\.\d+\.attn1"
    cross_attention: ClassVar[Optional[str]] = r"blocks\.\d+\.attn2"
    per_frame_times = True
    # The number the pipeline encodes with when none is said; Wan was trained with 512 and its velocity depends on it.
    default_text_length = 512

    def _text_length(self, wanted: Optional[int]) -> int:
        """As said; else Wan's own number, or less where the tokenizer takes no more: such a model was trained so."""
        if wanted is not None or not self.checkpoint.has("tokenizer"):
            return wanted or self.default_text_length
        longest = self.checkpoint.read_json("tokenizer", "tokenizer_config.json").get("model_max_length")
        return min(self.default_text_length, int(longest or self.default_text_length))

    @property
    def trained_clip(self) -> Optional[tuple[int, int, int]]:
        # TI2V-5B alone gives its tokens times of their own; its VAE folds 16x16 pixels, for 720p.
        return (121, 704, 1280) if self.checkpoint.index.get("expand_timesteps") else None

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        return rectified_flow(config)

    def _make_geometry(self) -> Geometry:
        vae = self.checkpoint.config("vae")
        network = self.checkpoint.config(self._present_networks()[0])
        return Geometry(
            channels=int(network["in_channels"]),
            spatial=int(vae.get("scale_factor_spatial") or 8),
            temporal=int(vae.get("scale_factor_temporal") or 4),
            patch=tuple(network["patch_size"]),
        )

    def _make_causal(self, causal: Causal) -> None:
        network: Any = self.network
        self._parts["causal"] = install(network, [block.attn1 for block in network.blocks], network.rope, causal)

    @property
    def expert_boundary(self) -> Optional[float]:
        """The time from which on the high-noise expert works (2.2's A14B), or None for a single network."""
        ratio = self.checkpoint.index.get("boundary_ratio")
        return None if ratio is None or not self.checkpoint.has("transformer_2") else 1000.0 * float(ratio)

    def networks_between(self, low: float, high: float) -> list[str]:
        boundary = self.expert_boundary
        if boundary is None:
            return self._present_networks()
        return [name for name, works in (("transformer", high > boundary), ("transformer_2", low < boundary)) if works]

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        boundary = self.expert_boundary
        if boundary is None:
            return self._run("transformer", latents, t, conditioning)
        high = t.flatten(1).amax(1) >= boundary if t.ndim == 2 else t >= boundary
        if bool(high.all()):
            return self._run("transformer", latents, t, conditioning)
        if not bool(high.any()):
            return self._run("transformer_2", latents, t, conditioning)
        result = torch.empty_like(latents)
        for name, rows in (("transformer", high), ("transformer_2", ~high)):
            index = rows.nonzero().flatten()
            result[index] = self._run(name, latents[index], t[index], conditioning[index])
        return result

    def _run(self, name: str, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if t.ndim == 2 or self.checkpoint.index.get("expand_timesteps"):
            # One time per token: 2.2's 5B always wants it so, and causal stages give every frame its own.
            frames, height, width = (n // p for n, p in zip(latents.shape[2:], self.geometry.patch, strict=True))
            per_frame = t if t.ndim == 2 else t[:, None].expand(-1, frames)
            t = per_frame.repeat_interleave(height * width, dim=1)
        network = self.networks[name]
        return network(hidden_states=latents, timestep=t, encoder_hidden_states=conditioning.text, return_dict=False)[0]

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_text_length, device=self.device
        )
        return Conditioning(text)
