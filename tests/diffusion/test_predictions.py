"""One prediction becomes another without loss, for any pair (α, σ)."""

from __future__ import annotations

import itertools

import pytest
import torch

from muybridge.diffusion import convert, guide
from muybridge.diffusion.predictions import from_x0_eps, score, to_x0_eps

KINDS = ("flow", "epsilon", "v", "x0")
SIGMAS = (0.05, 0.3, 0.5, 0.8, 0.95)


def pair(family: str, sigma: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.tensor(sigma, dtype=torch.float64)
    alpha = 1 - s if family == "flow" else (1 - s**2).sqrt()
    return alpha.to(dtype), s.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", ["flow", "vp"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_round_trip(source: str, target: str, family: str, dtype: torch.dtype, tolerance: float) -> None:
    for sigma in SIGMAS:
        alpha, s = pair(family, sigma, dtype)
        x, eps = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in (0, 1))
        noisy = alpha * x + s * eps
        prediction = from_x0_eps(x, eps, alpha, s, source)
        there = convert(prediction, noisy, alpha, s, source, target)
        torch.testing.assert_close(there, from_x0_eps(x, eps, alpha, s, target), rtol=0, atol=tolerance)
        back = convert(there, noisy, alpha, s, target, source)
        torch.testing.assert_close(back, prediction, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_that_made_the_noisy_latent_is_found(kind: str) -> None:
    alpha, s = pair("vp", 0.6, torch.float64)
    x, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = to_x0_eps(from_x0_eps(x, eps, alpha, s, kind), alpha * x + s * eps, alpha, s, kind)
    torch.testing.assert_close(found[0], x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], eps, rtol=0, atol=1e-12)


def test_v_is_finite_at_zero_terminal_snr() -> None:
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    noisy, v = torch.randn(2, 4), torch.randn(2, 4)
    x0, eps = to_x0_eps(v, noisy, zero, one, "v")
    assert torch.equal(x0, -v)
    assert torch.equal(eps, noisy)
    assert torch.equal(from_x0_eps(x0, eps, zero, one, "v"), v)


def test_half_precision_is_computed_in_float32() -> None:
    alpha, s = pair("flow", 0.37, torch.float32)
    noisy, prediction = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    x0, eps = to_x0_eps(prediction, noisy, alpha, s, "flow")
    assert x0.dtype == eps.dtype == torch.float32
    torch.testing.assert_close(x0, noisy.float() - s * prediction.float())


def test_score_points_at_the_noise() -> None:
    alpha, s = pair("vp", 0.4, torch.float64)
    x, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(score(x, alpha * x + s * eps, alpha, s), -eps / s)


def test_guidance_is_the_standard_one() -> None:
    u, c = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    torch.testing.assert_close(guide(u, c, 0.0), u)
    w = 2.5
    torch.testing.assert_close(guide(u, c, w + 1), c + w * (c - u))


def test_an_unknown_kind_is_refused() -> None:
    one = torch.ones(())
    with pytest.raises(ValueError, match="unknown prediction"):
        to_x0_eps(one, one, one, one, "score")
    with pytest.raises(ValueError, match="unknown prediction"):
        from_x0_eps(one, one, one, one, "score")
