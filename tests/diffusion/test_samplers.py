"""A network that knows the answer leads every sampler to it."""

from __future__ import annotations

import pytest
import torch
from support.schedules import SCHEDULES
from torch import Tensor

from muybridge.diffusion import NoiseSchedule, few_step, many_step
from muybridge.diffusion.samplers import check_steps
from muybridge.errors import UsageError

SHAPE = (2, 4, 3, 2, 2)


def oracle(schedule: NoiseSchedule, clean: Tensor):
    """The denoiser whose clean estimate is ``clean``, whatever it is shown."""

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1, 1) for c in schedule.coefficients(t))
        return schedule.target(clean, (noisy - alpha * clean) / sigma, t)

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [[1000.0, 937.5, 833.3, 625.0], [999.0], [700, 400, 100]])
def test_few_steps_of_a_perfect_student_reach_the_clean_latent(name: str, steps: list[float]) -> None:
    schedule, clean, noise = SCHEDULES[name], torch.randn(SHAPE), torch.randn(SHAPE)
    sample = few_step(oracle(schedule, clean), noise, schedule, steps)
    torch.testing.assert_close(sample, clean, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_steps_are_re_noised_with_fresh_noise(name: str) -> None:
    """Each step is shown ``α x̂0 + σ ε`` with the ε of the generator, the first one the noise itself."""
    schedule, clean, noise = SCHEDULES[name], torch.randn(SHAPE), torch.randn(SHAPE)
    shown: list[tuple[Tensor, Tensor]] = []
    denoise = oracle(schedule, clean)

    def watch(noisy: Tensor, t: Tensor) -> Tensor:
        shown.append((noisy, t))
        return denoise(noisy, t)

    steps = [1000.0, 600.0, 300.0]
    told: list[tuple[int, int, float]] = []
    few_step(watch, noise, schedule, steps, torch.Generator().manual_seed(1), lambda i, n, t, x: told.append((i, n, t)))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(shown[0][0], noise)
    for noisy, t in shown[1:]:
        fresh = torch.randn(SHAPE, generator=generator)
        torch.testing.assert_close(noisy, schedule.add_noise(clean, fresh, t), rtol=0, atol=2e-4)
    assert [t[0].item() for _, t in shown] == [schedule.snap(torch.tensor(s)).item() for s in steps]
    assert told == [(0, 3, 1000.0), (1, 3, 600.0), (2, 3, 300.0)]


def test_few_steps_repeat_with_the_generator() -> None:
    schedule, noise = SCHEDULES["flow"], torch.randn(SHAPE)

    def run(seed: int) -> Tensor:
        return few_step(lambda z, t: torch.tanh(z), noise, schedule, [1000, 500], torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("steps", [[], [500, 500], [500, 700], [1001], [1000, 0], [1000, -5]])
def test_a_list_that_does_not_fall_is_refused(steps: list[float]) -> None:
    with pytest.raises(UsageError, match="step list"):
        check_steps(steps)


def test_many_steps_of_a_perfect_network_reach_the_clean_latent() -> None:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    cog = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
    schedulers = {
        "flow": FlowMatchEulerDiscreteScheduler(),
        "latte": DDIMScheduler(clip_sample=False),
        "cogvideox_2b": CogVideoXDDIMScheduler(**cog, snr_shift_scale=3.0, timestep_spacing="trailing"),
    }
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(5)
        seen: list[float] = []
        denoise = oracle(SCHEDULES[name], clean)
        sample = many_step(denoise, noise, scheduler, on_step=lambda i, n, t, z, seen=seen: seen.append(t))
        torch.testing.assert_close(sample, clean, rtol=0, atol=1e-3)
        assert seen == [float(t) for t in scheduler.timesteps]


def test_a_scheduler_that_draws_noise_draws_it_from_the_generator() -> None:
    from diffusers import DDPMScheduler

    from muybridge.diffusion.samplers import plain_step

    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    z, p, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[1]

    def step(seed: int) -> Tensor:
        return plain_step(scheduler, p, t, z, torch.Generator().manual_seed(seed))

    assert torch.equal(step(0), step(0))
    assert not torch.equal(step(0), step(1))


def test_the_initial_noise_is_scaled_as_the_scheduler_wants() -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(3)
    noise = torch.randn(SHAPE)
    shown: list[Tensor] = []

    def watch(noisy: Tensor, t: Tensor) -> Tensor:
        shown.append(noisy)
        return torch.zeros_like(noisy)

    many_step(watch, noise, scheduler)
    sigma = scheduler.init_noise_sigma
    torch.testing.assert_close(shown[0], noise * sigma / (scheduler.sigmas[0] ** 2 + 1) ** 0.5)
