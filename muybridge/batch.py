"""What every datamodule yields, whatever its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Optional

import torch
from torch import Tensor

from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """Some clips.

    Args:
        ids: One stable name per clip: influence scores, selections, caches and noise draws refer to it.
        pixels: (B, 3, F, H, W) in [-1, 1], where the source is video.
        latents: (B, C, F, H, W), normalised as the backbone's codec does, where the source is a cache.
        prompts: Captions, where the source has text.
        conditioning: Text embeddings, where the source is a cache.
        weights: Motion weights on the latent grid, (B, 1, F, H, W).
        fps: Frames per second of the clips.
        present: (B,), False for a clip that could not be read and was skipped: its pixels are zero and no loss may count it.
            A skipped clip keeps its slot, so that every rank still takes the same number of steps; so does a repeat that only
            fills up a batch or a rank's share. ``None``: all are there.
        remarks: What there is to say of each clip, mostly nothing; of a skipped one, why.
    """

    ids: list[str]
    pixels: Optional[Tensor] = None
    latents: Optional[Tensor] = None
    prompts: Optional[list[str]] = None
    conditioning: Optional[Conditioning] = None
    weights: Optional[Tensor] = None
    fps: Optional[float] = None
    present: Optional[Tensor] = None
    remarks: Optional[list[str]] = None

    def __post_init__(self) -> None:
        for name in _PER_CLIP:
            value = getattr(self, name)
            if value is not None and len(value) != len(self.ids):
                raise UsageError(
                    f"a batch holds {len(self.ids)} ids and {len(value)} {name}",
                    "one of each per clip",
                    "check the datamodule that made it",
                )

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        moved = ("pixels", "latents", "conditioning", "weights", "present")
        return replace(self, **{k: function(getattr(self, k)) for k in moved if getattr(self, k) is not None})

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """A copy moved like ``Tensor.to``; Lightning calls it to bring a batch to its device."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        """A copy in pinned memory; the data loader calls it."""
        return self._map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x._map(lambda y: y.pin_memory()))


_PER_CLIP = tuple(field.name for field in fields(Batch) if field.name not in ("ids", "fps"))
"""What a batch holds one of for every clip."""


def joined_presence(parts: Sequence[Any]) -> Optional[Tensor]:
    """Which samples of several batches are there, in a row; ``None`` where all are."""
    if all(part.present is None for part in parts):
        return None
    there = [torch.ones(len(p), dtype=torch.bool) if p.present is None else p.present for p in parts]
    return torch.cat(there)
