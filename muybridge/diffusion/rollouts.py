"""What a few-step student is given at its steps: the inputs it is trained on."""

from __future__ import annotations

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
    to_end: bool = False,
) -> list[Tensor]:
    """The inputs of a few-step sampler at each of its ``steps``, from its own estimates (backward simulation).

    The input at the last step is what :func:`~muybridge.diffusion.samplers.few_step` denoises last, from the same noises.

    Args:
        denoise: The student.
        noise: Its input at the first step.
        schedule: The family's schedule.
        steps: Falling times; the first of them where the rollout is to be left early.
        generator: Source of the fresh noises.
        to_end: Denoise at the last step too; the sampler's result is then one more entry.
    """
    times = [schedule.snap(torch.full((noise.shape[0],), t, device=noise.device)) for t in check_steps(steps)]
    inputs = [noise]
    for place, t in enumerate(times if to_end else times[:-1]):
        clean = schedule.to_x0(denoise(inputs[-1], t), inputs[-1], t).to(noise.dtype)
        more = place + 1 < len(times)
        inputs.append(schedule.add_noise(clean, fresh_noise(noise, generator), times[place + 1]) if more else clean)
    return inputs


def at_times(
    inputs: Sequence[Tensor], clean: Tensor, schedule: NoiseSchedule, steps: Sequence[float], t: Tensor
) -> Tensor:
    """A clip whose frames are at steps of their own: each frame as it is in the input at its time.

    Args:
        inputs: Of a rollout, one for each step.
        clean: What the rollout made; frames at no step have ended there.
        schedule: The family's schedule.
        steps: The student's times.
        t: A time for each frame, (B, F).
    """
    z = clean
    for step, given in zip(steps, inputs, strict=True):
        z = torch.where(broadcast_time(t == float(schedule.snap(torch.tensor(step))), clean), given, z)
    return z


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
