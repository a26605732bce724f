"""What a tiny backbone of any family is denoised on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from muybridge.backbones import Backbone, load
from muybridge.diffusion import Conditioning

PROMPTS = ["a dog", "a much longer prompt about a cat", "rain"]
_ENCODED: dict[str, Conditioning] = {}


def open_tiny(path: Path, gradient_checkpointing: bool = False) -> Backbone:
    """A tiny backbone with its network loaded."""
    return load(str(path), gradient_checkpointing=gradient_checkpointing)


def denoising_inputs(backbone: Backbone, samples: int = 2, t: float = 900.0) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents that every family's network takes, one time, and prompts of different lengths."""
    geometry = backbone.geometry
    frames = geometry.frames or (4 if geometry.patch[0] == 2 else 3)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(samples, geometry.channels, frames, 8, 8, generator=generator)
    path = str(backbone.checkpoint.path)
    if path not in _ENCODED:
        _ENCODED[path] = backbone.encode_text(PROMPTS)
    return latents, torch.full((samples,), t), _ENCODED[path][:samples]
