"""Differences of frames as a linear map: what a motion model sees, and how its score acts back on frames.

The map ``M`` takes frames ``x`` to ``u = M x``: each frame minus the one before, times ``scale``. Without context its rows are
``x² - x¹, x³ - x², …``; after given frames the first row is ``x¹ - x⁰``, where ``x⁰`` is the last of them and carries no noise.
Noisy frames ``z = α x + σ ε`` have the differences ``M z = α u + σ M ε``: noise of covariance ``K = M Mᵀ`` over frames. A model
trained under that noise knows the density of ``M z`` at every level, and the chain rule gives its score on frames exactly,

    ∇_z log p(M z) = Mᵀ s(M z),    s(u) = K⁻¹ (α û - u)/σ².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor

from muybridge.diffusion import predictions as P
from muybridge.diffusion.samplers import Denoiser
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError

Noise = Literal["difference", "independent"]


@dataclass(frozen=True)
class Differences:
    """The map ``M`` from frames to their differences, and the noise that goes with it.

    Args:
        context: Frames that are given, before those whose differences are modelled.
        scale: What differences are multiplied by; they are smaller than frames, and networks like numbers near 1.
        noise: ``difference``: differences of the frames' noise, as noisy clips have it. ``independent``: of its own for each
            difference; the density of noisy clips' differences is then not what is learned.
    """

    context: int = 0
    scale: float = 1.0
    noise: Noise = "difference"

    def __post_init__(self) -> None:
        if self.context < 0 or not self.scale > 0:
            raise UsageError(
                f"differences after {self.context} frames, times {self.scale:g}",
                "0 frames or more, and a scale above 0",
            )
        if self.noise not in ("difference", "independent"):
            raise UsageError(f"noise of differences is {self.noise!r}", "difference or independent")

    @property
    def given(self) -> bool:
        """Whether the frame before the first difference is known."""
        return self.context > 0

    def count(self, frames: int) -> int:
        """Differences of so many frames, those of the context not counted."""
        return frames if self.given else frames - 1

    def frames(self, count: int) -> int:
        """Frames that so many differences are of, those of the context not counted."""
        return count if self.given else count + 1

    # -- the map ---------------------------------------------------------------------------------------------------

    def matrix(self, frames: int) -> Tensor:
        """``M`` over the frame axis, (differences, frames), float64."""
        whole = torch.eye(frames, dtype=torch.float64) - torch.diag(torch.ones(frames - 1, dtype=torch.float64), -1)
        return self.scale * (whole if self.given else whole[1:])

    def covariance(self, count: int) -> Tensor:
        """``K``, the covariance of the noise over so many differences, float64."""
        if self.noise == "independent":
            return torch.eye(count, dtype=torch.float64)
        matrix = self.matrix(self.frames(count))
        return matrix @ matrix.T

    def apply(self, x: Tensor, previous: Optional[Tensor] = None) -> Tensor:
        """``M x``, at least float32.

        Args:
            x: Frames (B, C, F, H, W), without those of the context.
            previous: The last frame of the context, (B, C, 1, H, W); zero (as for noise) where not given.
        """
        x = P.upcast(x)
        if self.given:
            x = torch.cat([torch.zeros_like(x[:, :, :1]) if previous is None else previous.to(x), x], 2)
        return self.scale * (x[:, :, 1:] - x[:, :, :-1])

    def adjoint(self, u: Tensor) -> Tensor:
        """``Mᵀ u``: what a change of the differences is worth to each frame."""
        zero = torch.zeros_like(u[:, :, :1])
        before = u if self.given else torch.cat([zero, u], 2)
        after = torch.cat([u[:, :, 1:] if self.given else u, zero], 2)
        return self.scale * (before - after)

    def restore(self, u: Tensor, previous: Tensor) -> Tensor:
        """The frames that follow ``previous`` (B, C, 1, H, W) with these differences."""
        return previous + u.cumsum(2) / self.scale

    def noise_of(self, frames_noise: Tensor) -> Tensor:
        """The noise on differences, from standard normal noise of the frames."""
        if self.noise == "difference":
            return self.apply(frames_noise)
        return frames_noise if self.given else frames_noise[:, :, 1:]

    # -- scores ----------------------------------------------------------------------------------------------------

    def whiten(self, u: Tensor) -> Tensor:
        """``K⁻¹ u`` over the frame axis."""
        if self.noise == "independent":
            return u
        inverse = torch.linalg.inv(self.covariance(u.shape[2])).to(u)
        return torch.einsum("ij,bcjhw->bcihw", inverse, u)

    def score(self, u0: Tensor, noisy: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """``K⁻¹ (α û - u)/σ²``: the score of noisy differences from their clean estimate."""
        return self.whiten(schedule.score(u0, noisy, t))

    def log_density_of_noise(self, u: Tensor) -> Tensor:
        """``log N(u; 0, K)``, one number a sample."""
        size = u[0].numel()
        logdet = float(torch.linalg.slogdet(self.covariance(u.shape[2])).logabsdet) * (size // u.shape[2])
        square = (u * self.whiten(u)).flatten(1).sum(1)
        return -0.5 * (square + logdet + size * math.log(2.0 * math.pi))


Form = Literal["sum", "replace"]


def mixed(
    frames: Denoiser,
    motion: Denoiser,
    schedule: NoiseSchedule,
    differences: Differences,
    weight: float,
    form: Form = "sum",
    low: float = 0.0,
    high: float = 980.0,
) -> Denoiser:
    """A denoiser of frames whose score is ``s + μ Mᵀ s_motion``.

    It is the score of ``p(z) p(M z)^μ``, which pure noise does not follow: at the noisy end its clean estimate grows without
    bound, as ``1/α``, so that it is left out above ``high``. ``replace`` is bounded everywhere: it moves the differences of the
    clean estimate towards those that the motion model expects, ``x̂ + μ M⁺(û - M x̂)``, and leaves the frames' mean alone. That is
    ``s + μ Mᵀ(s_motion - s_implied)`` with the motion score that the frames' own estimate implies.

    Args:
        frames: The appearance model.
        motion: The motion model of all differences of a clip; no frame is given.
        schedule: Of both.
        differences: The map.
        weight: ``μ``; 0 is the appearance model.
        form: ``sum`` or ``replace``.
        low: Below this time the appearance model runs alone.
        high: Above this time the appearance model runs alone.
    """
    if differences.given:
        raise UsageError(
            f"a mix with a motion model that is given {differences.context} frames", "one of all differences, context 0"
        )
    if form not in ("sum", "replace"):
        raise UsageError(f"mix form is {form!r}", "sum or replace")

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        prediction = frames(noisy, t)
        time = float(t.flatten()[0])
        if weight == 0.0 or not low <= time <= high:
            return prediction
        z = P.upcast(noisy)
        u = differences.apply(z)
        u0 = schedule.to_x0(motion(u.to(noisy.dtype), t), u, t)
        x0, eps = schedule.to_x0(prediction, z, t), schedule.to_eps(prediction, z, t)
        alpha, sigma = schedule._at(t, z)
        if form == "sum":
            change = weight * differences.adjoint(differences.score(u0, u, t, schedule))
        else:
            own = Differences(scale=differences.scale)
            inward = own.adjoint(own.whiten(u0 - differences.apply(x0)))
            change = weight * inward * alpha / sigma**2
        # A score s stands for x̂ = (σ² s + z)/α and ε̂ = -σ s.
        x0, eps = x0 + sigma**2 / alpha * change, eps - sigma * change
        return P.from_x0_eps(x0, eps, alpha, sigma, schedule.prediction).to(prediction.dtype)

    return denoise


SampleWindow = Callable[[Tensor, int], Tensor]
"""(the last context frames, number of the window) -> differences (B, C, window, H, W), in the frames' own unit."""


def roll_windows(
    sample_window: SampleWindow,
    context: Tensor,
    count: int,
    window: int,
    stride: Optional[int] = None,
    weights: Optional[Sequence[float]] = None,
) -> Tensor:
    """The ``count`` frames after some given ones, window by window.

    Each window says the next ``window`` differences and ``stride`` of them are taken. Where windows overlap a difference has been
    said several times; it is their mean under the weights of its places in the windows that said it.

    Args:
        sample_window: Says the differences after some frames.
        context: The given frames, (B, C, k, H, W).
        count: Frames wanted.
        window: Differences a window says.
        stride: Differences taken of each window; all where not given.
        weights: One for each place in a window, nearest first; equal where not given.
    """
    stride = window if stride is None else stride
    coefficients = [1.0] * window if weights is None else [float(w) for w in weights]
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} in windows of {window}", f"from 1 to {window}")
    if len(coefficients) != window or min(coefficients) < 0 or not all(w > 0 for w in coefficients[:stride]):
        raise UsageError(
            f"weights {coefficients} for windows of {window} with stride {stride}",
            f"{window} numbers, none below 0, the first {stride} above 0: these are said for the last time",
        )
    k, frames = context.shape[2], P.upcast(context)
    total: dict[int, Tensor] = {}
    mass: dict[int, float] = {}
    number = 0
    while frames.shape[2] - k < count:
        start = frames.shape[2] - k
        said = sample_window(frames[:, :, -k:], number)
        for place, w in enumerate(coefficients):
            if w == 0.0:
                continue
            d = w * P.upcast(said[:, :, place : place + 1])
            total[start + place] = total[start + place] + d if start + place in total else d
            mass[start + place] = mass.get(start + place, 0.0) + w
        for place in range(start, start + stride):
            frames = torch.cat([frames, frames[:, :, -1:] + total.pop(place) / mass.pop(place)], 2)
        number += 1
    return frames[:, :, k : k + count]
