"""Networks that know their data's law: of Gaussians over the frame axis, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from muybridge.diffusion import NoiseSchedule
from muybridge.diffusion.samplers import Denoiser


def gaussian(mean: Tensor, covariance: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Denoiser:
    """What a perfect network predicts of a Gaussian over the frame axis, every other place independent.

    Args:
        mean: (F,).
        covariance: (F, F).
        noise: Covariance of the noise, (F, F).
        schedule: A family's.
    """

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.double() for c in schedule.coefficients(t.double()))
        a, s = float(alpha[0]), float(sigma[0])
        gain = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * noise)
        center = mean[None, None, :, None, None]
        x0 = center + torch.einsum("ij,bcjhw->bcihw", gain, noisy - a * center)
        # At no noise the noise estimate is its limit.
        whiten = noise @ torch.linalg.inv(a**2 * covariance + s**2 * noise)
        eps = s * torch.einsum("ij,bcjhw->bcihw", whiten, noisy - a * center)
        return schedule.target(x0, eps, t)

    return denoise


def spd(size: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
