"""Mochi 1: flow matching that counts time from noise, joint attention over video and text, text last."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Optional

from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import rectified_flow
from muybridge.diffusion import samplers
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import T_MAX, NoiseSchedule
from muybridge.errors import UsageError

THRESHOLD = 0.025
"""Noise that the first half of the steps removes, in equal parts; the second half is quadratic."""


class Mochi(Backbone):
    """Mochi 1 (text to video).

    Its network counts time from 0 (noise) to 1000 (clean) and predicts ``x - ε``; both are turned round here.
    """

    family = "Mochi"
    pipelines = ("MochiPipeline",)
    block_lists = ("transformer_blocks",)
    temporal_attention = r"transformer_blocks\.\d+\.attn1"
    text_tokens: ClassVar[Optional[Literal["first", "last"]]] = "last"
    lays_own_levels = True
    default_text_length = 256

    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        if not config.get("invert_sigmas"):
            raise UsageError(
                f"the checkpoint's scheduler, a {config.get('_class_name')}, has no invert_sigmas",
                "invert_sigmas: true, since Mochi's network counts time from noise",
                "put the published scheduler_config.json into the checkpoint",
            )
        return rectified_flow(config)

    def _make_geometry(self) -> Geometry:
        vae, network = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        patch = int(network.get("patch_size", 2))
        return Geometry(
            channels=int(network.get("in_channels", 12)),
            spatial=math.prod(vae.get("spatial_expansions", (2, 2, 2))),
            temporal=math.prod(vae.get("temporal_expansions", (1, 2, 3))),
            patch=(1, patch, patch),
        )

    def _check(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        if conditioning.mask is None:
            raise UsageError(
                "Mochi was given text without its mask",
                "the mask of the real tokens: the network attends to those only",
                "cache the text again with this checkpoint",
            )

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return -self.network(
            hidden_states=latents,
            encoder_hidden_states=conditioning.text,
            timestep=T_MAX - t,
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        # One by one: an empty last prompt makes the pipeline blank the whole batch.
        parts = []
        for prompt in prompts:
            text, mask, _, _ = pipeline.encode_prompt(
                [prompt],
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_text_length,
                device=self.device,
            )
            parts.append(Conditioning(text, mask.bool()))
        return Conditioning.cat(parts)

    def _set_steps(self, scheduler: Any, steps: int, latents: Tensor) -> None:
        if steps < 2:
            raise UsageError(f"{steps} steps", "at least 2: Mochi's list of times has a linear and a quadratic half")
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, THRESHOLD), device=latents.device)

    def _scheduler_time(self, label: Tensor) -> Tensor:
        return T_MAX - label

    def _scheduler_step(self, generator: Optional[samplers.Generators]) -> samplers.SchedulerStep:
        plain = super()._scheduler_step(generator)
        return lambda scheduler, prediction, timestep, latents: plain(scheduler, -prediction, timestep, latents)
