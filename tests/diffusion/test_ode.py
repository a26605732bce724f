"""The path from noise to clean: exact on a Gaussian, and Euler's for flow."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.errors import UsageError

SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": FlowSchedule(3.0),
    "epsilon": VPSchedule.from_betas(prediction="epsilon"),
    "v": VPSchedule.from_betas(prediction="v", snr_shift=3.0, zero_terminal_snr=True),
}
MEAN, STD = 0.7, 0.4


def gaussian(schedule: NoiseSchedule):
    """What a perfect network predicts of a Gaussian."""

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.double().view(-1, 1, 1, 1, 1) for c in schedule.coefficients(t.double()))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (noisy - alpha * MEAN)
        return schedule.target(x0, (noisy - alpha * x0) / sigma, t)

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_gaussian_is_reached_exactly_as_steps_grow(name: str) -> None:
    """The ODE carries noise to where the marginals' quantiles are: x = mean + std (z - α mean)/√(α² std² + σ²)."""
    schedule = SCHEDULES[name]
    noise = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.tensor(ode_times(schedule, 10)[0], dtype=torch.float64)
    alpha, sigma = (float(c) for c in schedule.coefficients(start))
    wanted = MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) ** 0.5
    errors = []
    for steps in (100, 200, 400):
        *_, (time, clean) = ode_path(gaussian(schedule), noise, schedule, ode_times(schedule, steps))
        assert time == 0.0
        errors.append(float((clean - wanted).abs().max()))
    assert errors[-1] < {"flow": 0.01, "epsilon": 0.02, "v": 0.04}[name]
    # First order: flow's error halves as its steps double; VP's last step, from a table's second entry, shrinks a little slower.
    for coarse, fine in pairwise(errors):
        assert fine < (0.51 if name == "flow" else 0.62) * coarse


def test_flow_takes_eulers_steps() -> None:
    schedule, times = SCHEDULES["flow"], [1000.0, 600.0, 250.0, 0.0]
    noise = torch.randn(1, 1, 2, 2, 2, dtype=torch.float64)
    denoise = gaussian(schedule)
    z, states = noise, dict(ode_path(denoise, noise, schedule, times))
    assert torch.equal(states[1000.0], noise)
    for now, then in pairwise(times):
        z = z + (then - now) / 1000.0 * denoise(z, torch.full((1,), now))
        assert torch.allclose(states[then], z, rtol=0, atol=1e-6)


def test_the_published_steps_are_on_the_published_path() -> None:
    times = ode_times(FlowSchedule(3.0), 50, shift=8.0)
    assert len(times) == 51
    assert [round(times[i], 1) for i in (0, 36, 44, 50)] == [1000.0, 756.8, 521.7, 0.0]
    assert ode_times(SCHEDULES["flow"], 4) == pytest.approx([1000.0, 900.0, 750.0, 500.0, 0.0])


def test_what_has_no_path_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        ode_times(SCHEDULES["flow"], 0)
    with pytest.raises(UsageError, match="fewer steps"):
        ode_times(SCHEDULES["v"], 1500)
    with pytest.raises(UsageError, match="no shift"):
        ode_times(SCHEDULES["v"], 10, shift=3.0)
