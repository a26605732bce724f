"""Inversion: exact where it must be, and better with more steps, a higher order and refinements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.denoising import denoising_inputs, open_tiny
from torch import Tensor

from muybridge.backbones import Backbone
from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule, inversion
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
SCHEDULES = {
    "flow": FlowSchedule(3.0),
    "epsilon": VPSchedule.from_betas(),
    "v": VPSchedule.from_betas(prediction="v", snr_shift=3.0, zero_terminal_snr=True),
}


def straight(schedule: NoiseSchedule, x0: Tensor, eps: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that always predicts this one pair: its path is known in closed form."""
    return lambda z, t: schedule.target(x0, eps, t)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("order", ["euler", "midpoint"])
def test_the_path_of_one_clip_and_one_noise_is_followed_exactly(kind: str, order: inversion.Order) -> None:
    schedule = SCHEDULES[kind]
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    denoise = straight(schedule, x0, eps)
    # The cleanest entry of a table has a little noise, and the clip has none: what is made of v there is off by as much.
    near = 1e-2 if (kind, order) == ("v", "midpoint") else 1e-5
    states = inversion.invert(denoise, x0, schedule, 7, order)
    for place, state in zip(inversion.ladder(schedule, 7), states, strict=True):
        torch.testing.assert_close(state, place.alpha * x0 + place.sigma * eps, atol=near, rtol=near)
    torch.testing.assert_close(inversion.resample(denoise, states[-1], schedule, 7, order), x0, atol=near, rtol=near)


def test_zero_terminal_snr_gives_pure_noise_and_comes_back() -> None:
    schedule = SCHEDULES["v"]
    last = inversion.ladder(schedule, 5)[-1]
    assert (last.alpha, last.sigma) == (0.0, 1.0)
    x0, eps = torch.randn(2, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    states = inversion.invert(straight(schedule, x0, eps), x0, schedule, 5)
    torch.testing.assert_close(states[-1], eps, atol=1e-5, rtol=1e-5)


def test_an_euler_step_is_ddims() -> None:
    """A hand-computed step: ``z' = √ᾱ' (z - √(1-ᾱ) ε)/√ᾱ + √(1-ᾱ') ε``."""
    schedule = SCHEDULES["epsilon"]
    here, there = inversion.node(schedule, 600.0), inversion.node(schedule, 400.0)
    z, eps = torch.randn(2, 1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    found = inversion.ode_step(lambda z, t: eps, z, here, there, schedule)
    a, b = schedule.alphas_cumprod[600], schedule.alphas_cumprod[400]  # type: ignore[attr-defined]
    expected = b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)


def test_diffusers_inverse_scheduler_takes_the_same_step() -> None:
    from diffusers import DDIMInverseScheduler

    schedule = VPSchedule.from_betas()
    inverse = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    inverse.set_timesteps(10)
    z, eps = torch.randn(2, 1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    # From 399 to 499: two neighbouring places of both lists.
    theirs = inverse.step(eps, 499, z, return_dict=False)[0]
    here, there = inversion.node(schedule, 399.0), inversion.node(schedule, 499.0)
    torch.testing.assert_close(inversion._solve(schedule, eps, z, here, there), theirs, atol=1e-5, rtol=1e-5)


def round_trip(backbone: Backbone, steps: int, order: inversion.Order, refinements: int) -> float:
    latents, _, text = denoising_inputs(backbone, samples=1)
    denoise = backbone.guided(text)
    states = inversion.invert(denoise, latents, backbone.schedule, steps, order, refinements)
    back = inversion.resample(denoise, states[-1], backbone.schedule, steps, order)
    return float(inversion.relative_error(back, latents).mean())


@pytest.mark.parametrize(
    ("name", "bound"),
    # Of refined steps at 20. Random networks that predict noise are harsher than trained ones. Mochi counts time backwards.
    [("wan", 1e-3), ("mochi", 1e-3), ("cogvideox", 0.02), ("unet3d", 0.4), ("latte", 0.05)],
)
def test_round_trips_of_real_networks(name: str, bound: float, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    few, many = round_trip(backbone, 5, "euler", 0), round_trip(backbone, 20, "euler", 0)
    refined = round_trip(backbone, 20, "euler", 2)
    assert refined < many < few
    assert refined < bound
    if backbone.schedule.prediction == "flow":
        assert round_trip(backbone, 20, "midpoint", 0) < 0.1 * many, "of second order"


def test_mixed_noise_keeps_its_variance_and_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    inverted, fresh = torch.randn(2, 200_000, generator=generator)
    for beta in (0.0, 0.3, 1.0):
        mixed = inversion.mix_noise(inverted, fresh, beta)
        assert mixed.std().item() == pytest.approx(1.0, abs=0.01)
        assert torch.corrcoef(torch.stack([mixed, inverted]))[0, 1].item() == pytest.approx(beta**0.5, abs=0.01)


def test_a_part_of_the_way_is_that_part() -> None:
    schedule = SCHEDULES["flow"]
    noise = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(z) * t.view(-1, 1, 1, 1, 1) / 1000.0

    whole = inversion.resample(denoise, noise, schedule, 6)
    middle = inversion.resample(denoise, noise, schedule, 6, stop=4)
    assert torch.equal(inversion.resample(denoise, middle, schedule, 6, start=4), whole)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 1}, "at least 2"),
        ({"steps": 900}, "at most 500"),
        ({"order": "heun"}, "euler or midpoint"),
        ({"order": "midpoint", "refinements": 1}, "midpoint has none"),
        ({"refinements": -1}, "0 or more"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict, said: str) -> None:
    clean = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(UsageError, match=said):
        inversion.invert(lambda z, t: z, clean, SCHEDULES["epsilon"], **{"steps": 4, **settings})


def test_noise_prediction_without_terminal_signal_is_refused() -> None:
    schedule = VPSchedule.from_betas(zero_terminal_snr=True)
    with pytest.raises(UsageError, match="v-prediction"):
        inversion.invert(lambda z, t: z, torch.zeros(1, 1, 2, 2, 2), schedule, 4)


def test_a_network_that_predicts_the_clip_is_refused() -> None:
    schedule = VPSchedule.from_betas(prediction="x0")
    with pytest.raises(UsageError, match="predicts the clip itself"):
        inversion.invert(lambda z, t: z, torch.zeros(1, 1, 2, 2, 2), schedule, 4)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(UsageError, match="from 0"):
        inversion.mix_noise(torch.zeros(1), torch.zeros(1), beta)
