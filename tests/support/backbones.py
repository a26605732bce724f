"""A valid call of any family's tiny backbone."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from muybridge.backbones import Backbone
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError


def small_clip(backbone: Backbone) -> tuple[int, int, int]:
    """The smallest of some clip sizes that the family takes, with several latent frames."""
    for side, frames in product((16, 32, 64, 128), (9, 13, 17, 4, 16)):
        try:
            shape = backbone.latent_shape(frames, side, side)
        except UsageError:
            continue
        if shape[1] > 1 and min(shape[2:]) > 1:
            return frames, side, side
    raise AssertionError(f"no small clip fits {backbone.family}")


def small_call(backbone: Backbone, count: int = 2, t: float = 500.0) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, times and conditioning for ``count`` samples; the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    shape = backbone.latent_shape(*small_clip(backbone))
    prompts = ["a dog runs", "a cat sleeps", "a red car", "waves at night"]
    text = backbone.encode_text([prompts[i % len(prompts)] for i in range(count)])
    return torch.randn(count, *shape, generator=generator), torch.full((count,), t), text
