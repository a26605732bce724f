"""Inputs of a few-step student in training are those it has when it samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule, few_step
from muybridge.diffusion.rollouts import at_times, noised, simulate

SCHEDULES: dict[str, NoiseSchedule] = {"flow": FlowSchedule(3.0), "epsilon": VPSchedule.from_betas()}
STEPS = [999.0, 700.0, 300.0]


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_simulated_inputs_are_those_of_the_sampler(name: str):
    schedule, seen = SCHEDULES[name], []

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        seen.append(noisy)
        return torch.tanh(noisy) * (t / 1000.0).view(-1, 1, 1, 1, 1)

    few_step(denoise, draw(0), schedule, STEPS, torch.Generator().manual_seed(1))
    given, seen = seen, []
    made = simulate(denoise, draw(0), schedule, STEPS, torch.Generator().manual_seed(1))
    assert len(seen) == 2, "the last input is not denoised here"
    assert all(torch.equal(a, b) for a, b in zip(made, given, strict=True))
    first = simulate(denoise, draw(0), schedule, STEPS[:2], torch.Generator().manual_seed(1))
    assert torch.equal(first[-1], given[1])
    *inputs, clean = simulate(denoise, draw(0), schedule, STEPS, torch.Generator().manual_seed(1), to_end=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))
    assert torch.equal(clean, few_step(denoise, draw(0), schedule, STEPS, torch.Generator().manual_seed(1)))
    t = torch.tensor([[999.0, 300.0, 0.0, 700.0], [0.0, 0.0, 999.0, 700.0]])
    found = at_times(inputs, clean, schedule, STEPS, t)
    for sample, row in enumerate(t.tolist()):
        for frame, time in enumerate(row):
            wanted = inputs[STEPS.index(time)] if time else clean
            assert torch.equal(found[sample, :, frame], wanted[sample, :, frame])


@pytest.mark.parametrize("name", SCHEDULES)
def test_noised_clips_are_pure_noise_at_the_first_step(name: str):
    """Also where the schedule would leave some of the clip in its last latent: sampling begins with none."""
    schedule, clean, noise = SCHEDULES[name], draw(2), draw(3)
    t = torch.tensor([[999.0, 700.0, 0.0, 999.0], [300.0, 999.0, 700.0, 300.0]])
    found = noised(clean, noise, schedule, t, first=1000.0 if name == "epsilon" else 999.0)
    wanted = schedule.add_noise(clean, noise, t)
    at_first = (t == 999.0)[:, None, :, None, None].expand_as(found)
    assert torch.equal(found[at_first], noise[at_first])
    assert torch.equal(found[~at_first], wanted[~at_first])
