"""A causal video VAE at work on single frames, where its convolutions over time are convolutions over space."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def causal_convolutions(vae: nn.Module) -> list[Any]:
    """Those of a Wan VAE that look back in time."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [m for m in vae.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[0] > 1]


def forget_past(vae: nn.Module) -> None:
    """Set to zero all that looks back, and keep the scale of what is left.

    A VAE so begun and trained on stills stays a function of each frame alone: a zero tap that sees only zeros gets no gradient.
    """
    import torch

    with torch.no_grad():
        for layer in causal_convolutions(vae):
            layer.weight[:, :, :-1] = 0.0
            layer.weight[:, :, -1] *= layer.kernel_size[0] ** 0.5


@contextmanager
def as_stills(vae: nn.Module) -> Iterator[None]:
    """Inside it, clips of one frame skip what is multiplied by the zeros before them: the same numbers, three times as fast."""

    def flat(layer: Any, x: Tensor, cache_x: Any = None) -> Tensor:
        if x.shape[2] != 1 or cache_x is not None:
            return type(layer).forward(layer, x, cache_x)
        padding = (layer._padding[2], layer._padding[0])
        return F.conv2d(x[:, :, 0], layer.weight[:, :, -1], layer.bias, layer.stride[1:], padding).unsqueeze(2)

    layers = causal_convolutions(vae)
    for layer in layers:
        layer.forward = types.MethodType(flat, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
