"""Distillation of teachers whose distribution is known: the student reaches it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.diffusion import VPSchedule
from muybridge.losses import DistributionMatching
from muybridge.toy_scores import Generator, Mixture, correlated, gaussian


@pytest.fixture(scope="module")
def bench() -> Any:
    """benchmarks/distill_toy.py, which runs the real job."""
    file = Path(__file__).parents[2] / "benchmarks/distill_toy.py"
    spec = importlib.util.spec_from_file_location("distill_toy", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_toy"] = module
    spec.loader.exec_module(module)
    return module


def test_the_closed_form_is_the_posterior_mean():
    """Against weighing many draws of the mixture by how well they explain what was seen."""
    means = torch.tensor([[-1.0, 1.0], [1.0, -0.5]])
    factor = torch.linalg.cholesky(correlated(2, 0.5, 0.5))
    model = Mixture(means, torch.stack([factor, 0.7 * factor]), torch.tensor([0.3, 0.7])).double()
    generator = torch.Generator().manual_seed(0)
    kind = (torch.rand(100000, generator=generator) < 0.7).long()
    noise = torch.randn(100000, 2, generator=generator).double()
    draws = model.means[kind] + torch.einsum("nfe,ne->nf", model.factors[kind], noise)
    z, alpha, sigma = torch.tensor([0.3, -0.2]).double(), 0.6, 0.5
    weight = torch.softmax(-((z - alpha * draws) ** 2).sum(1) / (2 * sigma**2), 0)
    found = model(z[None, None], torch.tensor([alpha]).double(), torch.tensor([sigma]).double())[0, 0]
    torch.testing.assert_close(found, (weight[:, None] * draws).sum(0), atol=0.02, rtol=0)


def test_a_student_reaches_a_gaussians_mean_and_covariance(bench: Any):
    """v-prediction. Every entry of the mean to 0.15 and of the covariance (diagonal 1) to 0.15."""
    mean, covariance = torch.linspace(-1.0, 1.0, 4), correlated(4, 0.9)
    schedule = VPSchedule.from_betas(prediction="v", zero_terminal_snr=True)
    loss, optimizer = [DistributionMatching()], bench.adam(2e-2)
    draws = bench.distil(gaussian(mean, covariance), Generator(4), 300, loss, optimizer, schedule, ratio=2)
    assert float((draws.mean(0) - mean).abs().max()) < 0.15
    assert float((draws.T.cov() - covariance).abs().max()) < 0.15


def test_a_student_reaches_both_motions_of_a_mixture(bench: Any):
    """ε-prediction; clips of two frames that move one way or the other. Half of the draws each, 80 % of them near a mode."""
    ways = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    covariance = correlated(2, 0.5, 0.3)
    factor = torch.linalg.cholesky(covariance)
    teacher = Mixture(ways, torch.stack([factor, factor]), torch.tensor([0.5, 0.5]))
    whole = covariance + ways.T @ ways / 2
    student = Generator(2, hidden=32, scale=0.8)
    loss, schedule = [DistributionMatching()], VPSchedule.from_betas()
    draws = bench.distil(teacher, student, 450, loss, bench.adam(5e-3), schedule, ratio=3)
    assert float(draws.mean(0).abs().max()) < 0.2
    assert float((draws.T.cov() - whole).abs().max()) < 0.2
    assert abs(float((draws[:, 0] < 0).float().mean()) - 0.5) < 0.1
    near = torch.cdist(draws, ways).min(1).values < 0.9
    assert float(near.float().mean()) > 0.75


def test_motion_score_matching_brings_motion_sooner(bench: Any):
    """The covariance of frame differences, after equally many plain steps from a still student; frames are no worse."""
    covariance = correlated(bench.FRAMES, bench.CORRELATION)
    off = {}
    for weight in (0.0, 1.0):
        teacher = gaussian(torch.zeros(bench.FRAMES), covariance)
        draws = bench.distil(teacher, bench.still(bench.FRAMES), 150, bench.losses(weight), bench.plain(0.2))
        off[weight] = bench.off(draws, covariance)
    assert off[1.0][1] < 0.75 * off[0.0][1]
    assert off[1.0][0] < 1.02 * off[0.0][0]
