"""Latte: ε-prediction, factorised attention, a fixed number of frames, text of varying length."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor

from muybridge.backbones.geometry import Geometry
from muybridge.backbones.stable_diffusion import FrameWise
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError

MASKED = -10000.0
"""What diffusers adds to the score of a masked token."""


class Latte(FrameWise):
    """Latte (text to video)."""

    family = "Latte"
    pipelines = ("LattePipeline",)
    block_lists = ("transformer_blocks", "temporal_transformer_blocks")
    temporal_attention = r"temporal_transformer_blocks\.\d+\.attn1"
    cross_attention: ClassVar[Optional[str]] = r"transformer_blocks\.\d+\.attn2"
    attention_kind: ClassVar[Literal["factorised", "unified"]] = "factorised"
    default_text_length = 120
    # The pipeline's own: a decoder with temporal layers gives other frames for other cuts.
    frames_at_once = 14

    def _make_geometry(self) -> Geometry:
        network = self.checkpoint.config("transformer")
        patch = int(network["patch_size"])
        return Geometry(
            channels=int(network["in_channels"]),
            spatial=self._vae_factor,
            patch=(1, patch, patch),
            frames=int(network.get("video_length", 16)),
        )

    def _text_length(self, wanted: Optional[int]) -> int:
        if wanted not in (None, self.default_text_length):
            raise UsageError(
                f"max_text_length is {wanted}",
                f"{self.default_text_length}, which Latte's pipeline always pads its text to",
                "leave max_text_length out",
            )
        return self.default_text_length

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        bias = None
        if conditioning.mask is not None:
            # The network fails on the (B, L) mask its documentation asks for; a bias per frame works, and attending
            # to the kept tokens alone is what the pipeline reaches by cropping a single prompt.
            scores = torch.where(conditioning.mask, 0.0, MASKED).to(latents.dtype)
            bias = scores[:, None].repeat_interleave(latents.shape[2], dim=0)
        prediction = self.network(
            hidden_states=latents,
            timestep=t,
            encoder_hidden_states=conditioning.text,
            encoder_attention_mask=bias,
            return_dict=False,
        )[0]
        # The second half of the channels is a learned variance, which neither training nor sampling uses.
        return prediction[:, : self.geometry.channels]

    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        # Cleaning captions depends on two optional packages; without it a prompt means the same on every machine.
        text, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, clean_caption=False, mask_feature=False, device=self.device
        )
        tokens = pipeline.tokenizer(
            pipeline._text_preprocessing(prompts, clean_caption=False),
            padding="max_length",
            max_length=self.max_text_length,
            truncation=True,
            return_tensors="pt",
        )
        return Conditioning(text, tokens.attention_mask.bool().to(text.device))

    def pair_unconditional(
        self, conditioning: Conditioning, unconditional: Optional[Conditioning] = None
    ) -> Conditioning:
        """The unconditional branch, with as many tokens as ``conditioning``: the pipeline crops both to one length."""
        return replace(super().pair_unconditional(conditioning, unconditional), mask=conditioning.mask)

    def inference_scheduler(self, steps: int, latents: Tensor) -> Any:
        """The checkpoint's own scheduler; one that wants the learned variance is refused, since it is dropped."""
        import diffusers

        kind = self.checkpoint.config("scheduler").get("variance_type")
        scheduler = getattr(diffusers, self.checkpoint.class_of("scheduler"))
        # Others (DDIM) have no such choice, and pass over the word.
        chooses = "variance_type" in inspect.signature(scheduler.__init__).parameters
        if chooses and kind in ("learned", "learned_range"):
            raise UsageError(
                f"the checkpoint's scheduler has variance_type {kind!r}",
                "a scheduler that needs no learned variance, such as DDIMScheduler",
                "put another scheduler_config.json into the checkpoint, or sample with a list of steps",
            )
        return super().inference_scheduler(steps, latents)
