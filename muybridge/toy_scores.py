"""Models whose score is known in closed form, as backbones: jobs that match scores can be held against the answer.

A clip is (1, F, H, W), and its H·W places are independent draws of one distribution over F frames: a batch of clips is a large
sample of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from muybridge.backbones.base import Backbone
from muybridge.backbones.geometry import Geometry
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule


class Mixture(nn.Module):
    """The denoiser of a mixture of Gaussians, ``E[x | z]`` at every noise level; one component is a plain Gaussian.

    Its parameters are those of the distribution, so that a critic can learn them.

    Args:
        means: (K, F).
        factors: ``L`` of each component's covariance ``L Lᵀ``, (K, F, F).
        weights: (K,), positive.
    """

    def __init__(self, means: Tensor, factors: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.means, self.factors = nn.Parameter(means.clone()), nn.Parameter(factors.clone())
        self.logits = nn.Parameter(weights.log())

    def forward(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``E[x | z]`` for ``z = α x + σ ε``: z is (B, N, F), and the levels are (B,).

        ``x̂ = Σ r_k (m_k + α Σ_k C_k⁻¹ (z - α m_k))`` with ``C_k = α² Σ_k + σ² I`` and ``r_k ∝ π_k N(z; α m_k, C_k)``.
        """
        covariance = self.factors @ self.factors.mT
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        spread = torch.linalg.cholesky(a**2 * covariance + s**2 * eye)
        offset = z[:, :, None] - a * self.means
        solved = torch.cholesky_solve(offset.permute(0, 2, 3, 1), spread)
        each = self.means + a * torch.einsum("kfg,bkgn->bnkf", covariance, solved)
        if len(self.logits) == 1:
            return each[:, :, 0]
        squares = torch.einsum("bnkf,bkfn->bnk", offset, solved)
        volume = 2.0 * spread.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        share = torch.softmax(self.logits - 0.5 * (squares + volume[:, None]), -1)
        return (share[..., None] * each).sum(2)


def gaussian(mean: Tensor, covariance: Tensor) -> Mixture:
    """The denoiser of one Gaussian."""
    return Mixture(mean[None], torch.linalg.cholesky(covariance)[None], torch.ones(1))


def correlated(frames: int, correlation: float, scale: float = 1.0) -> Tensor:
    """A covariance between frames that falls with their distance, ``s² ρ^|i - j|``."""
    index = torch.arange(frames)
    return scale**2 * correlation ** (index[:, None] - index[None]).abs().float()


class Generator(nn.Module):
    """A student of one step: from noise to a clean estimate, linear or with a hidden layer beside it.

    Args:
        frames: F.
        hidden: Hidden units; 0 is linear.
        scale: It begins as noise times this.
        seed: Of its hidden layer.
    """

    def __init__(self, frames: int, hidden: int = 0, scale: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Parameter(scale * torch.eye(frames))
        self.bias = nn.Parameter(torch.zeros(frames))
        self.hidden = nn.Parameter(torch.randn(hidden, frames, generator=generator))
        self.offset = nn.Parameter(torch.randn(hidden, generator=generator))
        self.out = nn.Parameter(torch.randn(frames, hidden, generator=generator) / math.sqrt(max(hidden, 1)) * 0.5)

    def forward(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean estimate of (B, N, F)."""
        return z @ self.linear.mT + self.bias + torch.tanh(z @ self.hidden.mT + self.offset) @ self.out.mT


class _Toy(Backbone):
    """A backbone around one of the above."""

    family = "Toy"
    pipelines = ()
    network_names = ("network",)
    block_lists = ()
    temporal_attention = ""
    default_text_length = 1

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        nn.Module.__init__(self)
        self.waiting = [network]
        self.dtype = torch.float32
        self.components = ("denoiser",)
        self.gradient_checkpointing = False
        self.causal = None
        self.max_text_length = 1
        self.schedule, self.geometry = schedule, Geometry(channels=1, spatial=1, patch=(1, 1, 1))
        self.networks = nn.ModuleDict()
        self.idle_device = torch.device("cpu")
        self._parts, self._empty_text = {}, {}

    def _make_schedule(self, config: dict[str, object]) -> NoiseSchedule:
        return self.schedule

    def _make_geometry(self) -> Geometry:
        return self.geometry

    def _present_networks(self) -> list[str]:
        return ["network"]

    def skeleton(self, name: str | None = None) -> nn.Module:
        return self.waiting[0]

    def materialize(self) -> Backbone:
        self.networks["network"] = self.waiting[0]
        return self

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        batch, _, frames, height, width = latents.shape
        alpha, sigma = (level.to(latents.dtype) for level in self.schedule.coefficients(t))
        z = latents.permute(0, 3, 4, 1, 2).reshape(batch, -1, frames)
        clean = self.network(z, alpha, sigma).view(batch, height, width, 1, frames).permute(0, 3, 4, 1, 2)
        # What a network of this family would have said: the prediction that goes with this clean estimate.
        a, s = alpha.view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1)
        return self.schedule.target(clean, (latents - a * clean) / s, t)

    def _encode_prompts(self, pipeline: object, prompts: list[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1))


def toy(network: nn.Module, schedule: NoiseSchedule) -> Backbone:
    """A network of this module as a backbone, not loaded yet."""
    return _Toy(network, schedule)


def places(clips: Tensor) -> Tensor:
    """The draws in some clips (B, 1, F, H, W), as (N, F)."""
    return clips.permute(0, 3, 4, 1, 2).reshape(-1, clips.shape[2])
