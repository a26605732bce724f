"""Noise schedules: which ``(α, σ)`` belongs to a time, for every family.

Time ``t`` runs from 0 (clean) to 1000 (noise), as a float of shape (B,), or (B, F) where every frame has its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from muybridge.diffusion import predictions as P
from muybridge.diffusion.predictions import Prediction

T_MAX = 1000.0


def shift_level(u: Tensor | float, shift: float) -> Tensor | float:
    """``f_s(u) = s u / (1 + (s - 1) u)``, the flow families' shift of a noise level in [0, 1]."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def unshift_level(level: Tensor | float, shift: float) -> Tensor | float:
    """The inverse of :func:`shift_level`, which is the shift by ``1/s``."""
    return shift_level(level, 1.0 / shift)


def shifted_steps(steps: list[float], shift: float) -> list[float]:
    """A raw step list under a shift: [1000, 750, 500, 250] at 5 is [1000, 937.5, 833.3, 625]."""
    return [T_MAX * float(shift_level(step / T_MAX, shift)) for step in steps]


def broadcast_time(value: Tensor, x: Tensor) -> Tensor:
    """A per-sample (B,) or per-frame (B, F) value, shaped to multiply a (B, C, F, H, W) tensor."""
    if value.ndim == 0:
        return value
    if value.ndim == 1:
        return value.view(-1, *[1] * (x.ndim - 1))
    if value.ndim == 2 and x.ndim == 5 and value.shape[1] == x.shape[2]:
        return value.view(value.shape[0], 1, value.shape[1], 1, 1)
    raise ValueError(
        f"a time of shape {tuple(value.shape)} does not fit a latent of shape {tuple(x.shape)}: "
        "expected (B,) or, for per-frame times, (B, F)"
    )


class NoiseSchedule(ABC):
    """Noising ``z = α(t) x + σ(t) ε`` and the conversions that go with one family's prediction.

    Attributes:
        prediction: What the family's network predicts.
        shift: The shift that the family's sampling uses (1 where it has none); it moves times, never ``α`` and ``σ``.
    """

    prediction: Prediction
    shift: float = 1.0

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(α, σ)`` at ``t``, of the shape of ``t``."""

    @abstractmethod
    def snap(self, t: Tensor) -> Tensor:
        """The nearest time the family's network knows (variance-preserving families know the integers 0..999)."""

    @abstractmethod
    def settle(self, t: Tensor) -> Tensor:
        """The known time that a number drawn from [0, 1000) stands for: a label stands for the unit above it."""

    @abstractmethod
    def time_of_logsnr(self, logsnr: float) -> float:
        """The time whose ``log(α²/σ²)`` is ``logsnr``, clamped to the ends of the schedule."""

    @abstractmethod
    def time_of_fraction(self, fraction: float) -> float:
        """The time a many-step sampler has reached after ``fraction`` of its steps, counted from noise."""

    @abstractmethod
    def fraction_of_time(self, t: float) -> float:
        """The share of a many-step sampler's steps that lie above ``t``: the inverse of :meth:`time_of_fraction`."""

    def logsnr(self, t: Tensor) -> Tensor:
        """``log(α²/σ²)``; -inf at zero signal, +inf at zero noise."""
        alpha, sigma = self.coefficients(t)
        return 2.0 * (torch.log(alpha) - torch.log(sigma))

    def _at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t.to(x.device))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return broadcast_time(alpha, x).to(dtype), broadcast_time(sigma, x).to(dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``z = α x + σ ε``, in the dtype of ``clean``."""
        alpha, sigma = self._at(t, clean)
        return (alpha * P.upcast(clean) + sigma * P.upcast(noise)).to(clean.dtype)

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean estimate ``x̂0`` of a raw prediction, at least float32."""
        return P.to_x0_eps(prediction, noisy, *self._at(t, noisy), self.prediction)[0]

    def to_eps(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise estimate ``ε̂`` of a raw prediction, at least float32."""
        return P.to_x0_eps(prediction, noisy, *self._at(t, noisy), self.prediction)[1]

    def to_kind(self, prediction: Tensor, noisy: Tensor, t: Tensor, kind: Prediction) -> Tensor:
        """A raw prediction as another kind: losses from other families work on this one through it."""
        return P.convert(prediction, noisy, *self._at(t, noisy), self.prediction, kind)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have predicted, at least float32."""
        return P.from_x0_eps(clean, noise, *self._at(t, clean), self.prediction)

    def score(self, x0: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """``(α x̂0 - z)/σ²``."""
        return P.score(x0, noisy, *self._at(t, noisy))


class FlowSchedule(NoiseSchedule):
    """Rectified flow: ``α = 1 - σ``, ``σ = t/1000``, the network predicts ``ε - x`` (Wan, Hunyuan, LTX, Mochi).

    ``t`` is the time *after* the shift; the shift itself belongs to whoever draws or lists times.

    Args:
        shift: The family's sampling shift.
    """

    prediction: Prediction = "flow"

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift is {shift}: expected a number above 0 (1 is no shift)")
        self.shift = float(shift)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(1 - t/1000, t/1000)``."""
        sigma = P.upcast(t) / T_MAX
        return 1.0 - sigma, sigma

    def snap(self, t: Tensor) -> Tensor:
        """Every time from 0 to 1000 is known."""
        return t.clamp(0.0, T_MAX)

    def settle(self, t: Tensor) -> Tensor:
        """Every time from 0 to 1000 is known."""
        return self.snap(t)

    def time_of_logsnr(self, logsnr: float) -> float:
        """``σ = 1/(1 + exp(logsnr/2))``."""
        return T_MAX / (1.0 + math.exp(min(logsnr / 2.0, 700.0)))

    def time_of_fraction(self, fraction: float) -> float:
        """Equal steps before the shift."""
        return T_MAX * float(shift_level(1.0 - fraction, self.shift))

    def fraction_of_time(self, t: float) -> float:
        """The inverse of :meth:`time_of_fraction`."""
        return max(1.0 - float(unshift_level(t / T_MAX, self.shift)), 0.0)


class VPSchedule(NoiseSchedule):
    """Variance preserving on a table of 1000 entries: ``α = √ᾱ``, ``σ = √(1 - ᾱ)`` (ModelScope, Latte, CogVideoX).

    Times between two entries mean the nearer entry, because the network was trained at the entries only; 1000 means the
    last entry, 999.

    Args:
        alphas_cumprod: The table ``ᾱ``.
        prediction: ``epsilon`` or ``v``.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction) -> None:
        if alphas_cumprod.ndim != 1 or not bool((alphas_cumprod.diff() <= 0).all()):
            raise ValueError("alphas_cumprod: expected one falling row of numbers")
        self.alphas_cumprod = alphas_cumprod.double()
        self.prediction = prediction

    @classmethod
    def from_betas(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear",
        prediction: Prediction = "epsilon",
        snr_shift: float = 1.0,
        zero_terminal_snr: bool = False,
        steps: int = 1000,
    ) -> VPSchedule:
        """The table of a diffusers scheduler configuration.

        Args:
            beta_start: First beta.
            beta_end: Last beta.
            beta_schedule: Spacing of the betas; ``scaled_linear`` is linear in their square roots.
            prediction: What the network predicts.
            snr_shift: CogVideoX's ``ᾱ / (s + (1 - s) ᾱ)``, which divides the signal-to-noise ratio by ``s``.
            zero_terminal_snr: Shift and scale ``√ᾱ`` so that the last entry is 0 (Lin et al. 2023, algorithm 1).
            steps: Number of entries.
        """
        if beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        else:
            raise ValueError(f"beta_schedule is {beta_schedule!r}: expected linear or scaled_linear")
        table = torch.cumprod(1.0 - betas, 0)
        table = table / (snr_shift + (1.0 - snr_shift) * table)
        if zero_terminal_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return cls(table, prediction)

    def snap(self, t: Tensor) -> Tensor:
        """The nearest entry of the table."""
        return t.round().clamp(0, len(self.alphas_cumprod) - 1)

    def settle(self, t: Tensor) -> Tensor:
        """The entry below, so that uniform numbers make all entries equally likely."""
        return t.floor().clamp(0, len(self.alphas_cumprod) - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(√ᾱ, √(1 - ᾱ))`` of the nearest entry."""
        table = self.alphas_cumprod.to(t.device)[self.snap(t).long()]
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        return table.sqrt().to(dtype), (1.0 - table).sqrt().to(dtype)

    def time_of_logsnr(self, logsnr: float) -> float:
        """The entry whose ratio is nearest."""
        table = torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod)
        # The last entry may be -inf, and so may be what is asked for: their difference would be no number.
        if logsnr <= float(table[-1]):
            return float(len(table) - 1)
        return 0.0 if logsnr >= float(table[0]) else float((table - logsnr).abs().argmin())

    def time_of_fraction(self, fraction: float) -> float:
        """Equal steps of the label."""
        return (len(self.alphas_cumprod) - 1) * (1.0 - fraction)

    def fraction_of_time(self, t: float) -> float:
        """The inverse of :meth:`time_of_fraction`."""
        return 1.0 - min(t / (len(self.alphas_cumprod) - 1), 1.0)
