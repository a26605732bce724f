"""What tells how a distillation goes: of a student's turn and of a critic's, over the clips of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from lightning_modules.base import present_sum
from muybridge.diffusion.steps import ScoreStep

NOISE_LEVELS = (0.0, 250.0, 500.0, 750.0, 1000.0)
"""Between these times the critic's loss is logged by itself."""

SumUp = Callable[[Tensor], Tensor]
"""Numbers of this rank's samples, summed over all ranks."""


@torch.no_grad()
def motion_energy(latents: Tensor) -> Tensor:
    """``mean (Δx)²`` of each clip, (B,); 0 for one frame."""
    if latents.shape[2] < 2:
        return latents.new_zeros(len(latents))
    return (latents[:, :, 1:] - latents[:, :, :-1]).float().square().flatten(1).mean(1)


@torch.no_grad()
def of_student(
    step: ScoreStep,
    names: Sequence[str],
    gradients: list[Tensor],
    total: Tensor,
    present: Optional[Tensor],
    sum_up: SumUp,
    ranks: int,
) -> dict[str, Tensor]:
    """The gap between the two scores, the clip's motion against the teacher's, and each loss' share of the gradient.

    Args:
        step: What the losses saw.
        names: Of the losses.
        gradients: Of each loss in the clip.
        total: The loss.
        present: Which clips are there.
        sum_up: Over the ranks.
        ranks: How many they are.
    """
    gap = (step.fake_x0 - step.real_x0).abs().flatten(1).mean(1)
    mine, theirs = motion_energy(step.sample), motion_energy(step.real_x0)
    norms = torch.stack([gradient.double().square().sum() for gradient in gradients])
    here = torch.stack([present_sum(x, present).double() for x in (gap, mine, theirs, torch.ones_like(gap))])
    sums = sum_up(torch.cat([here, total.reshape(1), norms]))
    count = sums[3].clamp(min=1.0)
    told = {
        "student/loss": sums[4] / ranks,
        "student/x0_gap": sums[0] / count,
        "student/motion": sums[1] / count,
        "student/motion_of_teacher": sums[2] / count,
        "student/motion_ratio": sums[1] / sums[2].clamp(min=1e-30),
    }
    if len(gradients) > 1:
        sizes = sums[5:].sqrt()
        told |= {
            f"student/share_of_{name}": size / sizes.sum().clamp(min=1e-30)
            for name, size in zip(names, sizes, strict=True)
        }
    return told


@torch.no_grad()
def of_critic(
    value: Tensor, verdict: Optional[Tensor], t: Tensor, present: Optional[Tensor], sum_up: SumUp
) -> dict[str, Tensor]:
    """The critic's loss, also by noise level, and the discriminator's.

    Args:
        value: Its loss of each clip.
        verdict: The discriminator's, where there is one.
        t: The clips' times.
        present: Which of them are there.
        sum_up: Over the ranks.
    """
    there = torch.ones_like(value, dtype=torch.bool) if present is None else present.to(value.device)
    level = torch.bucketize(t.to(value.device), torch.tensor(NOISE_LEVELS[1:-1], device=value.device), right=True)
    bins = [(level == i) & there for i in range(len(NOISE_LEVELS) - 1)]
    zero = torch.zeros_like(value)
    parts = [torch.stack([torch.where(b, value, zero).sum(), b.sum().to(value)]) for b in bins]
    judged = present_sum(verdict.to(value), present) if verdict is not None else value.new_zeros(())
    sums = sum_up(torch.cat([*parts, judged.reshape(1)]))
    totals, counts = sums[:-1:2], sums[1:-1:2]
    told = {"critic/loss": totals.sum() / counts.sum().clamp(min=1.0)}
    for low, total, count, some in zip(NOISE_LEVELS, totals, counts, counts.tolist(), strict=False):
        if some:
            told[f"critic/loss_from_t{low:03.0f}"] = total / count
    if verdict is not None:
        told["critic/verdict"] = sums[-1] / counts.sum().clamp(min=1.0)
    return told
