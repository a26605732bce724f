"""One case for every tiny checkpoint: its family, a clip size it takes, and how its diffusers pipeline is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muybridge.backbones import Backbone, load

PROMPT, NEGATIVE = "a dog runs", "low quality"


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """What a family is expected to be.

    Args:
        family: Class name.
        clip: Frames, height and width of a clip it takes.
        projections: Linears of the motion attention: value and output, and all four.
        attentions: Modules that carry motion, and modules from video to text.
        options: Arguments of ``load``.
        call: Further arguments of the pipeline.
        guidance: Name of the pipeline's argument for the guidance scale.
        frames: Name of the pipeline's argument for the number of frames.
        to_pipeline: Our latents as the pipeline takes them.
        from_pipeline: The pipeline's latents as ours, given the shape of ours.
    """

    family: str
    clip: tuple[int, int, int]
    projections: tuple[int, int]
    attentions: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    frames: str = "num_frames"
    to_pipeline: Callable[[Tensor], Tensor] = same
    from_pipeline: Callable[[Tensor, torch.Size], Tensor] = lambda x, shape: x

    def open(self, path: Any, **options: Any) -> Backbone:
        """The backbone at ``path``."""
        return load(str(path), **{**self.options, **options})

    def noise(self, backbone: Backbone, count: int = 1, seed: int = 0) -> Tensor:
        """Noise for ``count`` clips."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *backbone.latent_shape(*self.clip), generator=generator)

    def run_pipeline(self, pipeline: Any, noise: Tensor, guidance: float, **extra: Any) -> Tensor:
        """What the pipeline makes of ``noise`` in four steps."""
        frames, height, width = self.clip
        arguments = {self.frames: frames, self.guidance: guidance, "negative_prompt": NEGATIVE, **self.call, **extra}
        return pipeline(
            PROMPT,
            height=height,
            width=width,
            num_inference_steps=4,
            latents=self.to_pipeline(noise.clone()),
            generator=torch.Generator().manual_seed(5),
            **arguments,
        ).frames


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


_WAN = {
    "family": "Wan",
    "clip": (9, 16, 16),
    "projections": (4, 8),
    "attentions": (2, 2),
    "options": {"max_text_length": 32},
    "call": {"max_sequence_length": 32},
}
_COGVIDEOX = {
    "family": "CogVideoX",
    "clip": (9, 32, 32),
    "projections": (4, 8),
    "attentions": (2, 0),
    "call": {"max_sequence_length": 32},
    "to_pipeline": frames_first,
    "from_pipeline": lambda x, shape: x.transpose(1, 2),
}
CASES: dict[str, Case] = {
    "wan": Case(**_WAN),
    "wan22": Case(**_WAN),
    "cogvideox": Case(**_COGVIDEOX),
    "cogvideox_rope": Case(**_COGVIDEOX),
    "latte": Case("Latte", (4, 32, 32), (4, 8), (2, 2), frames="video_length", call={"clean_caption": False}),
    # Two attentions in each of five temporal transformers.
    "unet3d": Case("UNet3D", (9, 32, 32), (20, 40), (10, 4)),
    # Two dual blocks with an output projection each, two single ones without.
    "hunyuan": Case("HunyuanVideo", (9, 32, 32), (6, 14), (4, 0), guidance="true_cfg_scale", options={}),
    "ltx": Case(
        "LTX",
        (9, 64, 64),
        (4, 8),
        (2, 2),
        to_pipeline=lambda x: x.flatten(2).transpose(1, 2),
        from_pipeline=lambda x, shape: x.transpose(1, 2).unflatten(2, shape[2:]),
    ),
    "mochi": Case("Mochi", (7, 32, 32), (4, 8), (2, 0)),
    # Two attentions in each of seven motion modules.
    "animatediff": Case("AnimateDiff", (4, 32, 32), (28, 56), (14, 4)),
}
"""By the name of the tiny checkpoint."""
