"""Exponential moving averages of weights, as buffers beside them.

Lightning's own averaging deep-copies the module, which FSDP2 refuses. Here the averages are buffers cloned from the
parameters after these were sharded: DTensors where the parameters are, so that a distributed checkpoint saves and reshards
them like everything else, and each rank averages its own part without talking to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.sharding import local, reshard


class WeightAverage(nn.Module):
    """``a ← d a + (1 - d) w`` for every trained parameter ``w`` of a module.

    Buffers are at least float32: at a decay of 0.999 an average in bfloat16 stands still, because a thousandth of the
    difference is below its resolution.

    Args:
        module: Its trained parameters are averaged. Make the average after adapters, freezing and sharding.
        only: Names of those to average, where not all are.
    """

    def __init__(self, module: nn.Module, only: Optional[Collection[str]] = None) -> None:
        super().__init__()
        reshard(module)
        self._names: dict[str, str] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (only is None or name in only):
                key = name.replace(".", "__")
                if key in self._names:
                    raise ValueError(f"{name} and {self._names[key]} would share one buffer")
                self._names[key] = name
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.register_buffer(key, parameter.detach().to(wide, copy=True))
        self._swapped = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightAverage:
        """Move with the module, but keep the dtype: Trainer precision ``bf16-true`` casts every buffer it finds."""
        return super()._apply(lambda t: fn(t).to(t.dtype), recurse)

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of the averages, and of the parameters they are averages of."""
        reshard(module)
        parameters = dict(module.named_parameters())
        buffers = dict(self.named_buffers())
        averages = [local(buffers[key]) for key in self._names]
        return averages, [local(parameters[name].detach()) for name in self._names.values()]

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """One step of the average.

        Args:
            module: The module it was made from.
            decay: ``d``; 0 copies the weights.
        """
        if self._swapped:
            raise RuntimeError("the averages are in the place of the weights; leave swapped() before update()")
        averages, weights = self._pairs(module)
        if not averages:
            return
        weights = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
        if decay == 0.0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @torch.no_grad()
    def swap_in(self, module: nn.Module) -> list[Tensor]:
        """Put the averages in the weights' place; returns the weights, for :meth:`swap_out`."""
        if self._swapped:
            raise RuntimeError("the averages are already in the place of the weights")
        averages, weights = self._pairs(module)
        kept = [w.clone() for w in weights]
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)
        self._swapped = True
        return kept

    @torch.no_grad()
    def swap_out(self, module: nn.Module, kept: list[Tensor]) -> None:
        """Bring back the weights that :meth:`swap_in` returned."""
        _, weights = self._pairs(module)
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
        self._swapped = False

    @property
    def swapped_in(self) -> bool:
        """Whether the averages are in the weights' place now."""
        return self._swapped

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """Inside it, ``module`` computes with the averages; the weights come back at the end, also after an error.

        Nested uses are one: what is already in place stays until the outermost ends.
        """
        if self._swapped:
            yield module
            return
        kept = self.swap_in(module)
        try:
            yield module
        finally:
            self.swap_out(module, kept)


def warm_decay(decay: float, updates: int, warmup: bool = True) -> float:
    """The decay after ``updates`` updates: ``min(decay, (1 + n)/(10 + n))``, so that an early average forgets its start."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay
