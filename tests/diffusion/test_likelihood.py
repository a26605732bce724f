"""The likelihood by the ODE is that of a Gaussian in closed form, for every family and both kinds of noise."""

from __future__ import annotations

import pytest
import torch
from support.gaussians import gaussian, spd
from torch import Tensor

from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule, keyed_generator
from muybridge.diffusion.differences import Differences
from muybridge.diffusion.likelihood import log_likelihood
from muybridge.errors import UsageError

SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": FlowSchedule(3.0),
    "v": VPSchedule.from_betas(prediction="v", zero_terminal_snr=True),
    "epsilon": VPSchedule.from_betas(prediction="epsilon"),
}
FRAMES = 3


def toy(schedule: NoiseSchedule, m: Differences, places: int = 1):
    """A Gaussian law of differences, four samples of it, their exact log-density, and a perfect network."""
    size = m.count(FRAMES)
    mean, covariance = torch.linspace(-0.5, 0.5, size).double(), spd(size, 1)
    law = torch.distributions.MultivariateNormal(mean, covariance)
    noise = torch.randn(4, places, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mean + noise @ torch.linalg.cholesky(covariance).T
    denoise = gaussian(mean, covariance, m.covariance(size), schedule)
    return x.transpose(1, 2)[:, None, :, :, None], law.log_prob(x).sum(1), denoise


def rate(name: str, m: Differences, steps: int, probes: int | None = None, places: int = 1) -> tuple[Tensor, Tensor]:
    schedule = SCHEDULES[name]
    x, wanted, denoise = toy(schedule, m, places)
    generators = [keyed_generator(0, "probe", i) for i in range(4)]
    return log_likelihood(denoise, x, schedule, m.log_density_of_noise, steps, probes, generators), wanted


@pytest.mark.parametrize("m", [Differences(), Differences(scale=2.0), Differences(1, noise="independent")], ids=str)
def test_a_gaussian_is_rated_exactly(m: Differences) -> None:
    coarse, wanted = rate("flow", m, 50)
    fine, _ = rate("flow", m, 100)
    assert torch.allclose(fine, wanted, rtol=0, atol=2e-3 * m.scale**3)
    ratio = float((fine - wanted).abs().max() / (coarse - wanted).abs().max())
    assert ratio == pytest.approx(0.25, abs=0.05), "second order: twice the steps, a quarter of the error"


@pytest.mark.parametrize(("name", "tolerance"), [("v", 0.06), ("epsilon", 0.1)])
def test_tables_rate_it_up_to_their_ends(name: str, tolerance: float) -> None:
    """Their cleanest entry holds some noise, and without zero terminal SNR the noisiest some signal."""
    found, wanted = rate(name, Differences(), 200)
    assert torch.allclose(found, wanted, rtol=0, atol=tolerance)


def test_probes_have_the_trace_as_their_mean() -> None:
    exact, _ = rate("flow", Differences(), 20, None, places=2)
    many, _ = rate("flow", Differences(), 20, 100, places=2)
    few, _ = rate("flow", Differences(), 20, 1, places=2)
    assert float((few - exact).abs().max()) > 1e-6
    # The mean of a hundred is ten times nearer than one: within five of its deviations.
    assert float((many - exact).abs().max()) < 5 * float((few - exact).square().mean().sqrt()) / 10


def test_a_diagonal_law_needs_one_probe() -> None:
    """Random signs square to one, so that nothing is left to chance where the derivative is diagonal."""
    schedule, m = SCHEDULES["flow"], Differences(1, noise="independent")
    denoise = gaussian(
        torch.zeros(FRAMES).double(), torch.eye(FRAMES).double() * 0.3, torch.eye(FRAMES).double(), schedule
    )
    x = toy(schedule, m)[0]
    generators = [keyed_generator(1, "probe", i) for i in range(4)]
    one = log_likelihood(denoise, x, schedule, m.log_density_of_noise, 10, 1, generators)
    all_of_them = log_likelihood(denoise, x, schedule, m.log_density_of_noise, 10, None)
    assert torch.allclose(one, all_of_them, rtol=0, atol=1e-10)


def test_a_sample_is_rated_alike_in_any_batch() -> None:
    schedule, m = SCHEDULES["flow"], Differences()
    x, _, denoise = toy(schedule, m, 2)
    together = log_likelihood(
        denoise, x, schedule, m.log_density_of_noise, 5, 1, [keyed_generator(0, i) for i in "abcd"]
    )
    alone = log_likelihood(denoise, x[2:3], schedule, m.log_density_of_noise, 5, 1, [keyed_generator(0, "c")])
    assert torch.allclose(alone, together[2:3], rtol=0, atol=1e-12)


def test_probes_without_generators_are_refused() -> None:
    x, _, denoise = toy(SCHEDULES["flow"], Differences())
    with pytest.raises(UsageError, match="a generator for each sample"):
        log_likelihood(denoise, x, SCHEDULES["flow"], Differences().log_density_of_noise, 5, 1)
