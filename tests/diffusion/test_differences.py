"""Differences as a linear map: its algebra, the chain rule on Gaussians in closed form, mixing, and windows."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussians import gaussian, spd
from torch import Tensor

from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule
from muybridge.diffusion.differences import Differences, mixed, roll_windows
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.errors import UsageError

MAPS = [Differences(c, s, n) for c in (0, 1, 2) for s in (1.0, 3.0) for n in ("difference", "independent")]
SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": FlowSchedule(3.0),
    "epsilon": VPSchedule.from_betas(prediction="epsilon"),
    "v": VPSchedule.from_betas(prediction="v", zero_terminal_snr=True),
}
FRAMES = 4


def clip(seed: int, frames: int = FRAMES) -> Tensor:
    return torch.randn(2, 3, frames, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- algebra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", MAPS, ids=str)
def test_the_map_its_matrix_its_adjoint_and_its_inverse_agree(m: Differences) -> None:
    x = clip(0)
    u = m.apply(x)
    assert u.shape[2] == m.count(FRAMES) == m.matrix(FRAMES).shape[0]
    assert m.frames(u.shape[2]) == FRAMES
    assert torch.allclose(u, torch.einsum("ij,bcjhw->bcihw", m.matrix(FRAMES), x), rtol=0, atol=1e-12)
    other = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float((u * other).sum()) == pytest.approx(float((x * m.adjoint(other)).sum()), abs=1e-10), (
        "⟨Mx, y⟩ = ⟨x, Mᵀy⟩"
    )
    previous = clip(2, 1) if m.given else x[:, :, :1]
    frames = m.restore(m.apply(x, previous) if m.given else u, previous)
    assert torch.allclose(frames, x if m.given else x[:, :, 1:], rtol=0, atol=1e-12)
    whitened = torch.einsum("ij,bcjhw->bcihw", m.covariance(u.shape[2]), m.whiten(u))
    assert torch.allclose(whitened, u, rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", MAPS, ids=str)
def test_the_noise_has_the_covariance_it_is_said_to_have(m: Differences) -> None:
    noise = torch.randn(20000, 1, FRAMES, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = m.noise_of(noise)[:, 0, :, 0, 0]
    found = n.T @ n / len(n)
    assert torch.allclose(found, m.covariance(n.shape[1]), rtol=0, atol=0.05 * m.scale**2)
    wanted = torch.distributions.MultivariateNormal(torch.zeros(n.shape[1]).double(), m.covariance(n.shape[1]))
    assert torch.allclose(m.log_density_of_noise(n[:5, None, :, None, None]), wanted.log_prob(n[:5]), rtol=0, atol=1e-9)


def test_noisy_clips_have_noisy_differences() -> None:
    m, schedule, x, eps = Differences(scale=2.0), SCHEDULES["flow"], clip(0), clip(1)
    t = torch.tensor([300.0, 800.0])
    ours = schedule.add_noise(m.apply(x), m.noise_of(eps), t)
    assert torch.allclose(m.apply(schedule.add_noise(x, eps, t)), ours, rtol=0, atol=1e-12)


# -- the chain rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [m for m in MAPS if m.context < 2 and m.noise == "difference"], ids=str)
@pytest.mark.parametrize("t", [50.0, 500.0, 950.0])
def test_the_score_on_frames_is_the_gradient_of_the_density_of_noisy_differences(m: Differences, t: float) -> None:
    """The model of Gaussian differences in closed form against autograd through log N(Mz; α μ, α² S + σ² K)."""
    schedule, size = SCHEDULES["flow"], m.count(FRAMES)
    mean, covariance, noise = torch.linspace(-1, 1, size).double(), spd(size, 3), m.covariance(size)
    time = torch.full((2,), t, dtype=torch.float64)
    z = clip(4).requires_grad_()
    u = m.apply(z)
    a, s = (float(c) for c in schedule.coefficients(time[0]))
    law = torch.distributions.MultivariateNormal(a * mean, a**2 * covariance + s**2 * noise)
    log_p = law.log_prob(u.permute(0, 1, 3, 4, 2)).sum()
    (wanted,) = torch.autograd.grad(log_p, z)
    u0 = schedule.to_x0(gaussian(mean, covariance, noise, schedule)(u.detach(), time), u.detach(), time)
    found = m.adjoint(m.score(u0, u.detach(), time, schedule))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_mixed_denoiser_has_the_mixed_score(name: str) -> None:
    schedule, m, weight = SCHEDULES[name], Differences(scale=2.0), 0.7
    frames = gaussian(torch.zeros(FRAMES).double(), spd(FRAMES, 1), torch.eye(FRAMES).double(), schedule)
    motion = gaussian(torch.ones(3).double(), spd(3, 2), m.covariance(3), schedule)
    z, t = clip(5), torch.full((2,), 600.0, dtype=torch.float64)

    def score(denoise, z: Tensor) -> Tensor:
        return schedule.score(schedule.to_x0(denoise(z, t), z, t), z, t)

    u = m.apply(z)
    u0 = schedule.to_x0(motion(u, t), u, t)
    wanted = score(frames, z) + weight * m.adjoint(m.score(u0, u, t, schedule))
    found = score(mixed(frames, motion, schedule, m, weight), z)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    # And outside its range, or with no weight, the appearance model alone.
    for alone in (
        mixed(frames, motion, schedule, m, 0.0),
        mixed(frames, motion, schedule, m, weight, high=500.0),
        mixed(frames, motion, schedule, m, weight, low=700.0),
    ):
        assert torch.equal(alone(z, t), frames(z, t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_replacing_moves_the_differences_alone_and_all_the_way_at_weight_one(name: str) -> None:
    schedule, m = SCHEDULES[name], Differences(scale=2.0)
    frames = gaussian(torch.zeros(FRAMES).double(), spd(FRAMES, 1), torch.eye(FRAMES).double(), schedule)
    motion = gaussian(torch.ones(3).double(), spd(3, 2), m.covariance(3), schedule)
    z, t = clip(5), torch.full((2,), 600.0, dtype=torch.float64)
    u = m.apply(z)
    u0, x0 = schedule.to_x0(motion(u, t), u, t), schedule.to_x0(frames(z, t), z, t)
    for weight in (0.5, 1.0):
        found = schedule.to_x0(mixed(frames, motion, schedule, m, weight, "replace")(z, t), z, t)
        wanted = (1 - weight) * m.apply(x0) + weight * u0
        assert torch.allclose(m.apply(found), wanted, rtol=0, atol=1e-8)
        assert torch.allclose(found.mean(2), x0.mean(2), rtol=0, atol=1e-8)


def test_a_motion_model_of_the_same_law_changes_nothing_when_it_replaces() -> None:
    """Differences of a Gaussian clip whose mean over frames is independent of them are what the clip's own model says."""
    schedule, m = SCHEDULES["flow"], Differences()
    step, start = 0.3, 1.7
    # Independent: covariance = a 11ᵀ + b (I - 11ᵀ/F).
    ones = torch.ones(FRAMES, FRAMES).double() / FRAMES
    law = start * ones + step * (torch.eye(FRAMES).double() - ones)
    frames = gaussian(torch.zeros(FRAMES).double(), law, torch.eye(FRAMES).double(), schedule)
    d = m.matrix(FRAMES)
    motion = gaussian(torch.zeros(3).double(), d @ law @ d.T, m.covariance(3), schedule)
    z, t = clip(5), torch.full((2,), 400.0, dtype=torch.float64)
    assert torch.allclose(mixed(frames, motion, schedule, m, 1.0, "replace")(z, t), frames(z, t), rtol=0, atol=1e-8)


def test_mixing_a_stiller_motion_model_in_makes_clips_stiller() -> None:
    schedule, m = SCHEDULES["flow"], Differences()
    frames = gaussian(torch.zeros(FRAMES).double(), torch.eye(FRAMES).double(), torch.eye(FRAMES).double(), schedule)
    still = 0.02 * m.covariance(3)
    motion = gaussian(torch.zeros(3).double(), still, m.covariance(3), schedule)
    noise = torch.randn(200, 1, FRAMES, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = {}
    for form in ("sum", "replace"):
        for weight in (0.0, 0.5, 1.0):
            denoise = mixed(frames, motion, schedule, m, weight, form)  # type: ignore[arg-type]
            *_, (_, made) = ode_path(denoise, noise, schedule, ode_times(schedule, 60))
            energy[form, weight] = float(m.apply(made).square().mean())
            assert float(made.mean(2).std()) == pytest.approx(0.5, abs=0.08), "what does not move is left alone"
    for form in ("sum", "replace"):
        assert energy[form, 0.0] > 1.5 * energy[form, 0.5] > 1.5 * energy[form, 1.0]
    assert energy["replace", 1.0] == pytest.approx(0.04, rel=0.3), "the motion model's own energy, 2 x 0.02"


def test_a_mix_with_a_model_that_wants_frames_is_refused() -> None:
    with pytest.raises(UsageError, match="given 1 frames"):
        mixed(lambda z, t: z, lambda z, t: z, SCHEDULES["flow"], Differences(1), 1.0)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_windows_go_on_with_a_motion_exactly() -> None:
    velocity = clip(0, 1)
    context = velocity * torch.arange(3).view(1, 1, 3, 1, 1)

    def same(frames: Tensor, number: int) -> Tensor:
        return (frames[:, :, -1:] - frames[:, :, -2:-1]).expand(-1, -1, 4, -1, -1)

    wanted = velocity * torch.arange(3, 13).view(1, 1, 10, 1, 1)
    for stride, weights in ((4, None), (1, None), (2, [4.0, 3.0, 2.0, 1.0])):
        made = roll_windows(same, context, 10, 4, stride, weights)
        assert torch.allclose(made, wanted, rtol=0, atol=1e-12)


def test_a_difference_said_several_times_is_the_weighted_mean() -> None:
    """Window n says n for its first difference, n + 0.1 for its second, n + 0.2 for its third."""
    context = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)

    def said(frames: Tensor, number: int) -> Tensor:
        return torch.tensor([number, number + 0.1, number + 0.2], dtype=torch.float64).view(1, 1, 3, 1, 1)

    def differences(stride: int, weights: list[float] | None) -> list[float]:
        made = roll_windows(said, context, 4, 3, stride, weights).flatten()
        return torch.cat([made[:1], made.diff()]).tolist()

    assert differences(1, [3.0, 2.0, 1.0]) == pytest.approx(
        [0.0, (3 * 1 + 2 * 0.1) / 5, (3 * 2 + 2 * 1.1 + 0.2) / 6, (3 * 3 + 2 * 2.1 + 1.2) / 6]
    )
    assert differences(1, [1.0, 0.0, 0.0]) == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert differences(3, None) == pytest.approx([0.0, 0.1, 0.2, 1.0])
    assert differences(2, None) == pytest.approx([0.0, 0.1, (1.0 + 0.2) / 2, 1.1])


def test_windows_that_leave_a_difference_unsaid_are_refused() -> None:
    context = torch.zeros(1, 1, 1, 1, 1)
    for stride, weights in ((5, None), (0, None), (2, [1.0, 0.0, 1.0]), (1, [1.0]), (1, [1.0, -1.0, 0.0])):
        with pytest.raises(UsageError):
            roll_windows(lambda f, n: f, context, 4, 3, stride, weights)


def test_maps_that_are_none_are_refused() -> None:
    for wrong in (dict(context=-1), dict(scale=0.0), dict(scale=math.nan), dict(noise="white")):
        with pytest.raises(UsageError):
            Differences(**wrong)  # type: ignore[arg-type]
