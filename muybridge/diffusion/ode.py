"""A model's way from noise to clean by its probability-flow ODE, and the states it passes through.

A step takes what the network says of a state, ``(x̂0, ε̂)``, to ``z' = α' x̂0 + σ' ε̂``: Euler's step for flow models, DDIM's
for variance-preserving ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Optional

import torch
from torch import Tensor

from muybridge.diffusion.samplers import Denoiser
from muybridge.diffusion.schedules import T_MAX, FlowSchedule, NoiseSchedule, shift_level
from muybridge.errors import UsageError


def ode_times(schedule: NoiseSchedule, steps: int, shift: Optional[float] = None) -> list[float]:
    """``steps + 1`` falling times from noise to 0, which is clean: equal steps, under the shift of a flow family.

    Args:
        schedule: The family's schedule.
        steps: Number of steps.
        shift: Instead of the family's own shift; flow families only.
    """
    if steps < 1:
        raise UsageError(f"an ODE in {steps} steps", "at least 1")
    if shift is None:
        times = [schedule.time_of_fraction(i / steps) for i in range(steps)]
    elif isinstance(schedule, FlowSchedule):
        times = [T_MAX * float(shift_level(1.0 - i / steps, shift)) for i in range(steps)]
    else:
        raise UsageError(
            f"a shift of {shift} for a variance-preserving family", "no shift: its times are a table's entries"
        )
    known = [float(schedule.snap(torch.tensor(t, dtype=torch.float64))) for t in times]
    if known[-1] <= 0.0 or any(a <= b for a, b in pairwise(known)):
        raise UsageError(f"an ODE in {steps} steps", "fewer steps: the family's network knows no more times")
    return [*known, 0.0]


@torch.no_grad()
def ode_path(
    denoise: Denoiser, noise: Tensor, schedule: NoiseSchedule, times: Sequence[float]
) -> Iterator[tuple[float, Tensor]]:
    """Times and states from noise to clean, the first and the last included.

    Args:
        denoise: The network, with guidance inside.
        noise: Standard normal; the state at the first time.
        schedule: The family's schedule.
        times: Falling; the last one, 0, is the clean estimate itself.
    """
    state = noise
    yield times[0], state
    for now, then in pairwise(times):
        t = torch.full((noise.shape[0],), now, device=noise.device)
        prediction = denoise(state, t)
        x0, eps = schedule.to_x0(prediction, state, t), schedule.to_eps(prediction, state, t)
        # No entry of a table is without noise: the end is the estimate itself.
        state = x0 if then == 0.0 else schedule.add_noise(x0, eps, torch.full_like(t, then))
        yield then, state
