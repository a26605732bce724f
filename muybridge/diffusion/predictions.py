"""What a network predicts, and how one prediction becomes another.

Every function takes the pair ``(α, σ)`` of ``z = α x + σ ε`` and is exact for any such pair, so the flow family
(α + σ = 1) and the variance-preserving families (α² + σ² = 1) share one copy. Computation is at least float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["flow", "epsilon", "v", "x0"]
"""``flow``: ε - x. ``epsilon``: ε. ``v``: α ε - σ x. ``x0``: x."""


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is already that or finer."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_x0_eps(
    prediction: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction
) -> tuple[Tensor, Tensor]:
    """The clean and the noise estimate that a raw prediction stands for.

    From ``z = α x + σ ε``: flow ``v = ε - x`` gives ``x = (z - σ v)/(α + σ)``, ``ε = (z + α v)/(α + σ)``;
    v ``= α ε - σ x`` gives ``x = (α z - σ v)/(α² + σ²)``, ``ε = (σ z + α v)/(α² + σ²)``.
    """
    p, z = upcast(prediction), upcast(noisy)
    if kind == "flow":
        total = alpha + sigma
        return (z - sigma * p) / total, (z + alpha * p) / total
    if kind == "v":
        norm = alpha**2 + sigma**2
        return (alpha * z - sigma * p) / norm, (sigma * z + alpha * p) / norm
    if kind == "epsilon":
        return (z - sigma * p) / alpha, p
    if kind == "x0":
        return p, (z - alpha * p) / sigma
    raise ValueError(f"unknown prediction {kind!r}: expected flow, epsilon, v or x0")


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """What a network of ``kind`` would have to predict for this clean and noise pair (its regression target)."""
    x0, eps = upcast(x0), upcast(eps)
    if kind == "flow":
        return eps - x0
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "epsilon":
        return eps
    if kind == "x0":
        return x0
    raise ValueError(f"unknown prediction {kind!r}: expected flow, epsilon, v or x0")


def convert(
    prediction: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction, target: Prediction
) -> Tensor:
    """A prediction of one kind as a prediction of another, at the same noisy latent."""
    x0, eps = to_x0_eps(prediction, noisy, alpha, sigma, source)
    return from_x0_eps(x0, eps, alpha, sigma, target)


def score(x0: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``∇_z log p(z) = (α x̂0 - z)/σ²`` (Tweedie)."""
    return (alpha * upcast(x0) - upcast(noisy)) / sigma**2


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Standard classifier-free guidance, ``u + s (c - u)``.

    Recipes elsewhere that write ``c + w (c - u)`` mean ``s = w + 1``.
    """
    return unconditional + scale * (conditional - unconditional)
