"""Single clips to one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from muybridge.batch import Batch, joined_presence
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError


def collate(clips: Sequence[Batch]) -> Batch:
    """Join batches along the first axis; they must hold the same kinds of things in the same shapes."""
    if len(clips) == 1:
        return clips[0]

    def tensors(name: str) -> torch.Tensor | None:
        values = [getattr(clip, name) for clip in clips]
        if all(v is None for v in values):
            return None
        shapes = {tuple(v.shape[1:]) if v is not None else None for v in values}
        if len(shapes) > 1:
            raise UsageError(
                f"clips of {len(shapes)} shapes in one batch: {name} {sorted(map(str, shapes))}", "one shape a batch"
            )
        return torch.cat(values)

    conditionings = [clip.conditioning for clip in clips if clip.conditioning is not None]
    prompts = [clip.prompts for clip in clips if clip.prompts is not None]
    return Batch(
        ids=[name for clip in clips for name in clip.ids],
        pixels=tensors("pixels"),
        latents=tensors("latents"),
        prompts=[p for part in prompts for p in part] if prompts else None,
        conditioning=Conditioning.cat(conditionings) if conditionings else None,
        weights=tensors("weights"),
        fps=rate(clips),
        present=joined_presence(clips),
        remarks=None
        if all(c.remarks is None for c in clips)
        else [r for c in clips for r in c.remarks or [""] * len(c)],
    )


def rate(clips: Sequence[Batch]) -> float | None:
    """The one rate of all clips; ``None`` where they differ, since a batch has room for one."""
    rates = [clip.fps for clip in clips if clip.fps is not None]
    return rates[0] if rates and max(rates) - min(rates) <= 0.01 * rates[0] else None
