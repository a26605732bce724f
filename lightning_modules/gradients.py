"""Gradients of sharded weights and whole ones together: exchanged, measured and clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from muybridge.backbones.sharding import local


def whole_ones(gradients: Iterable[Any]) -> list[Tensor]:
    """Those of weights that every rank holds: FSDP2 exchanges only what it sharded."""
    return [g for g in gradients if not hasattr(g, "full_tensor")]


@torch.no_grad()
def exchange(strategy: Strategy, gradients: Sequence[Tensor], chunk: int = 2**25) -> None:
    """The mean over ranks, in place, in pieces of so many elements."""
    waiting: list[Tensor] = []
    for place, gradient in enumerate(gradients):
        waiting.append(gradient)
        if sum(g.numel() for g in waiting) >= chunk or place == len(gradients) - 1:
            flat = torch.cat([g.flatten() for g in waiting])
            flat = strategy.reduce(flat, reduce_op="mean")
            for one, part in zip(waiting, flat.split([g.numel() for g in waiting]), strict=True):
                one.copy_(part.view_as(one))
            waiting = []


@torch.no_grad()
def total_norm(gradients: Sequence[Any]) -> Tensor:
    """The norm of all gradients together, whole ones and parts of sharded ones alike."""
    if not gradients:
        return torch.zeros(())
    whole = whole_ones(gradients)
    sharded = [g for g in gradients if hasattr(g, "full_tensor")]
    norms = []
    if sharded:
        norm: Any = torch.nn.utils.get_total_norm(sharded)
        norms.append(norm.full_tensor())
    if whole:
        norms.append(torch.nn.utils.get_total_norm(whole))
    return torch.stack(norms).norm()


@torch.no_grad()
def scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
