"""What a few-step student is given at its steps: the inputs it is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from muybridge.diffusion.samplers import Denoiser, Generators, check_steps, fresh_noise
from muybridge.diffusion.schedules import NoiseSchedule, broadcast_time


@torch.no_grad()
def simulate(
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: Sequence[float],
    generator: Optional[Generators] = None,
) -> list[Tensor]:
    """The inputs of a few-step sampler at each of its ``steps``, from its own estimates (backward simulation).

    The last is what :func:`~muybridge.diffusion.samplers.few_step` denoises last, from the same noises.

    Args:
        denoise: The student.
        noise: Its input at the first step.
        schedule: The family's schedule.
        steps: Falling times; the first of them where the rollout is to be left early.
        generator: Source of the fresh noises.
    """
    times = check_steps(steps)
    inputs = [noise]
    for now, after in itertools.pairwise(times):
        t, t_next = (schedule.snap(torch.full((noise.shape[0],), time, device=noise.device)) for time in (now, after))
        clean = schedule.to_x0(denoise(inputs[-1], t), inputs[-1], t).to(noise.dtype)
        inputs.append(schedule.add_noise(clean, fresh_noise(noise, generator), t_next))
    return inputs


def noised(clean: Tensor, noise: Tensor, schedule: NoiseSchedule, t: Tensor, first: float) -> Tensor:
    """Real latents as inputs of a few-step student: noised to ``t``, and pure noise at its first step.

    A schedule without zero terminal SNR would leave some of the clip in its noisiest latent, and sampling has none to leave.

    Args:
        clean: Latents (B, C, F, H, W).
        noise: Standard normal, same shape.
        schedule: The family's schedule.
        t: Times, (B,) or (B, F).
        first: The student's first step.
    """
    at_first = broadcast_time(t >= float(schedule.snap(torch.tensor(first))), clean)
    return torch.where(at_first, noise, schedule.add_noise(clean, noise, t))
