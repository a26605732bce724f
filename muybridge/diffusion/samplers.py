"""Samplers: functions of a denoiser and a noise. They know times and latents, not networks.

A denoiser is any ``(noisy, t) -> raw prediction``; guidance, adapters and experts are already inside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from muybridge.diffusion.schedules import T_MAX, NoiseSchedule
from muybridge.errors import UsageError


class Denoiser(Protocol):
    """Anything that predicts from a noisy latent and a time of shape (B,)."""

    def __call__(self, noisy: Tensor, t: Tensor, /) -> Tensor:
        """The raw prediction."""


OnStep = Callable[[int, int, float, Tensor], None]
"""Called after each step with (index, number of steps, time, latents)."""

SchedulerStep = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(scheduler, raw prediction, the scheduler's own timestep, latents) -> next latents."""


def check_steps(steps: Sequence[float]) -> list[float]:
    """A few-step list: falling, at most 1000, above 0."""
    values = [float(step) for step in steps]
    if not values or values[0] > T_MAX or values[-1] <= 0 or any(b >= a for a, b in pairwise(values)):
        raise UsageError(
            f"the step list is {list(steps)}",
            "times that fall from at most 1000 and end above 0, such as [1000, 937.5, 833.3, 625]",
            "the clean end (0) is reached from the last step and is not listed",
        )
    return values


Generators = torch.Generator | list[torch.Generator]
"""One source of fresh noise for a batch, or one for each sample, which then does not depend on its batch."""


def fresh_noise(like: Tensor, generator: Optional[Generators]) -> Tensor:
    """Standard normal noise in the shape of ``like``, drawn on the CPU."""
    if isinstance(generator, list):
        drawn = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    else:
        drawn = torch.randn(like.shape, generator=generator)
    return drawn.to(like)


@torch.no_grad()
def few_step(
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: Sequence[float],
    generator: Optional[Generators] = None,
    on_step: Optional[OnStep] = None,
) -> Tensor:
    """The re-noising sampler of few-step students: estimate ``x̂0``, add fresh noise for the next time, repeat.

    Args:
        denoise: The student.
        noise: Where it starts, standard normal. It is taken as the latent of the first step: even without zero
            terminal SNR this is nearly what the last training step was given.
        schedule: The family's schedule.
        steps: Falling times, see :func:`check_steps`.
        generator: Source of the fresh noises, on the CPU; a list has one for each sample.
        on_step: Called after every step with the clean estimate.
    """
    times = check_steps(steps)
    z = x0 = noise
    for i, time in enumerate(times):
        t = schedule.snap(torch.full((noise.shape[0],), time, device=noise.device))
        if i:
            z = schedule.add_noise(x0, fresh_noise(noise, generator), t)
        x0 = schedule.to_x0(denoise(z, t), z, t).to(noise.dtype)
        if on_step is not None:
            on_step(i, len(times), time, x0)
    return x0


def plain_step(
    scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: Optional[Generators] = None
) -> Tensor:
    """One step of a diffusers scheduler; those that draw noise draw it from ``generator``."""
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]


@torch.no_grad()
def many_step(
    denoise: Denoiser,
    noise: Tensor,
    scheduler: Any,
    step: SchedulerStep = plain_step,
    to_time: Callable[[Tensor], Tensor] = lambda label: label,
    on_step: Optional[OnStep] = None,
) -> Tensor:
    """A family's own diffusers scheduler, already set to its timesteps, run from noise to clean.

    Args:
        denoise: The network.
        noise: Standard normal latents; scaled by the scheduler's ``init_noise_sigma`` as its pipelines do.
        scheduler: A diffusers scheduler after ``set_timesteps``.
        step: How the family takes one step (CogVideoX's multistep solver wants more than the usual three arguments).
        to_time: The scheduler's timestep label as our time (Mochi counts the other way round).
        on_step: Called after every step with the latents.
    """
    latents = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    timesteps = scheduler.timesteps
    for i, label in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, label) if hasattr(scheduler, "scale_model_input") else latents
        time = to_time(label)
        prediction = denoise(scaled, time.to(latents.device).float().expand(latents.shape[0]))
        latents = step(scheduler, prediction, label, latents)
        if on_step is not None:
            on_step(i, len(timesteps), float(time), latents)
    return latents
