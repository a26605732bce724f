"""From a clip to the noise that it would come from: the sampler's own differential equation, run the other way.

For every family the deterministic sampler follows ``dz = x̂0 dα + ε̂ dσ``, so one step from ``(α, σ)`` to ``(α', σ')`` is

    z' = z + (α' - α) x̂0 + (σ' - σ) ε̂

which is DDIM's step for variance-preserving families and Euler's for flow. Nothing divides by ``α``, so v-prediction with zero
terminal SNR is safe. Inversion takes the same steps from clean to noise; since the network can't be asked at a place that is
not known yet, it is asked nearby (``refinements`` of 0), or the place is found by fixed-point iteration, or the step is
taken through its middle (``midpoint``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor

from muybridge.diffusion import predictions as P
from muybridge.diffusion.samplers import Denoiser, OnStep
from muybridge.diffusion.schedules import T_MAX, FlowSchedule, NoiseSchedule, shift_level
from muybridge.errors import UsageError

Order = Literal["euler", "midpoint"]


@dataclass(frozen=True)
class Node:
    """A place on the way between clip and noise.

    Args:
        time: What the network is told there.
        alpha: ``α``.
        sigma: ``σ``.
    """

    time: float
    alpha: float
    sigma: float


def node(schedule: NoiseSchedule, t: float) -> Node:
    """The place at a time, which is snapped to one that the network knows."""
    known = schedule.snap(torch.tensor(t, dtype=torch.float64))
    alpha, sigma = schedule.coefficients(known)
    return Node(float(known), float(alpha), float(sigma))


def ladder(schedule: NoiseSchedule, steps: int) -> list[Node]:
    """``steps + 1`` places from the clip (``α = 1``, ``σ = 0``) to the noisiest time: equal steps before the family's shift.

    Args:
        schedule: The family's schedule.
        steps: At least 2.
    """
    if steps < 2:
        raise UsageError(f"{steps} steps", "at least 2", "50 is usual; fewer reconstruct worse")
    shares = [k / steps for k in range(1, steps + 1)]
    if isinstance(schedule, FlowSchedule):
        times = [T_MAX * float(shift_level(share, schedule.shift)) for share in shares]
    else:
        # As DDIM's trailing spacing: the last step is the table's last entry.
        times = [max(round(share * T_MAX) - 1, 0) for share in shares]
        if len(set(times)) < steps or steps > int(T_MAX) // 2:
            raise UsageError(f"{steps} steps", f"at most {int(T_MAX) // 2}: the family knows 1000 times")
    # The clip itself has no noise, which no entry of a table says; the network is told its cleanest time there.
    return [Node(float(schedule.snap(torch.tensor(0.0))), 1.0, 0.0), *(node(schedule, t) for t in times)]


def middle(schedule: NoiseSchedule, here: Node, there: Node) -> Node:
    """The place half way between two, in the family's time."""
    return node(schedule, 0.5 * (here.time + there.time))


def _ask(denoise: Denoiser, z: Tensor, at: Node) -> Tensor:
    return P.upcast(denoise(z, torch.full((z.shape[0],), at.time, device=z.device)))


def _pair(schedule: NoiseSchedule, prediction: Tensor, z: Tensor, at: Node) -> tuple[Tensor, Tensor]:
    alpha, sigma = (torch.tensor(c, dtype=torch.float64, device=z.device) for c in (at.alpha, at.sigma))
    return P.to_x0_eps(prediction, z, alpha.to(prediction.dtype), sigma.to(prediction.dtype), schedule.prediction)


def _move(z: Tensor, pair: tuple[Tensor, Tensor], here: Node, there: Node) -> Tensor:
    """``z + (α' - α) x̂0 + (σ' - σ) ε̂``."""
    return z + (there.alpha - here.alpha) * pair[0] + (there.sigma - here.sigma) * pair[1]


def ode_step(
    denoise: Denoiser, z: Tensor, here: Node, there: Node, schedule: NoiseSchedule, order: Order = "euler"
) -> Tensor:
    """One explicit step in either direction; ``euler`` asks the network once, ``midpoint`` twice.

    Args:
        denoise: The network.
        z: Latents at ``here``.
        here: Where the step begins.
        there: Where it ends.
        schedule: The family's schedule.
        order: ``euler`` is DDIM for variance-preserving families.
    """
    z = P.upcast(z)
    pair = _pair(schedule, _ask(denoise, z, here), z, here)
    if order == "euler":
        return _move(z, pair, here, there)
    half = middle(schedule, here, there)
    z_half = _move(z, pair, here, half)
    return _move(z, _pair(schedule, _ask(denoise, z_half, half), z_half, half), here, there)


def _solve(schedule: NoiseSchedule, prediction: Tensor, z: Tensor, here: Node, there: Node) -> Tensor:
    """The place at ``there`` from which a sampling step with this raw prediction leads to ``z`` at ``here``.

    A sampling step is ``z = α x̂0 + σ ε̂``, and the pair is linear in the noisier latents ``z'`` and the prediction ``p``:
    ``x̂0 = A z' + B p``, ``ε̂ = C z' + D p``. So ``z' = (z - (α B + σ D) p)/(α A + σ C)``.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    a, c = (float(x) for x in _pair(schedule, zero, one, there))
    b, d = (float(x) for x in _pair(schedule, one, zero, there))
    return (z - (here.alpha * b + here.sigma * d) * prediction) / (here.alpha * a + here.sigma * c)


def usual_refinements(order: Order) -> int:
    """As many as a step of that order may have, and most is won by: two, or none for ``midpoint``."""
    return 2 if order == "euler" else 0


def check_method(schedule: NoiseSchedule, order: Order, refinements: int) -> None:
    """Refuse what can't be followed; needs no network."""
    if order not in ("euler", "midpoint"):
        raise UsageError(f"order is {order!r}", "euler or midpoint")
    if refinements < 0 or (refinements and order == "midpoint"):
        raise UsageError(
            f"{refinements} refinements of order {order}",
            "0 or more with euler; midpoint has none",
            "leave refinements out: midpoint costs two network calls a step, euler one and one for each refinement",
        )
    if schedule.prediction == "epsilon" and float(schedule.coefficients(torch.tensor(T_MAX))[0]) == 0.0:
        raise UsageError(
            "a network that predicts noise, on a schedule whose last step holds no signal",
            "v-prediction where the terminal signal-to-noise ratio is zero",
            "check prediction_type and rescale_betas_zero_snr of the checkpoint's scheduler",
        )


@torch.no_grad()
def invert(
    denoise: Denoiser,
    clean: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    order: Order = "euler",
    refinements: int = 0,
    on_step: Optional[OnStep] = None,
) -> list[Tensor]:
    """The latents of a clip at every place of the ladder, from the clip to its noise; the last is the inverted noise.

    Args:
        denoise: The network with its prompt; guidance other than 1 makes inversion unstable.
        clean: Latents (B, C, F, H, W).
        schedule: The family's schedule.
        steps: Places but the clip; :func:`resample` with the same number goes back.
        order: ``euler`` (DDIM), or ``midpoint``, whose error falls with the square of the number of steps.
        refinements: Fixed-point iterations of an Euler step: the network is asked again where the step has led, so that
            the sampler's step leads back. Each costs a network call a step.
        on_step: Called after each step with (index, count, time, latents).
    """
    check_method(schedule, order, refinements)
    if schedule.prediction == "x0":
        raise UsageError(
            "a network that predicts the clip itself",
            "one that predicts noise, v or flow",
            "its last step forgets where it came from, so that it has no inverse",
        )
    places = ladder(schedule, steps)
    states = [P.upcast(clean)]
    for i in range(steps):
        z, here, there = states[-1], places[i], places[i + 1]
        if order == "midpoint":
            states.append(ode_step(denoise, z, here, there, schedule, order))
        else:
            # As is usual: the network is given what there is, and the time it is wanted for.
            found = _solve(schedule, _ask(denoise, z, there), z, here, there)
            for _ in range(refinements):
                found = _solve(schedule, _ask(denoise, found, there), z, here, there)
            states.append(found)
        if on_step is not None:
            on_step(i, steps, there.time, states[-1])
    return states


@torch.no_grad()
def resample(
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    order: Order = "euler",
    start: int = 0,
    stop: Optional[int] = None,
    on_step: Optional[OnStep] = None,
) -> Tensor:
    """The deterministic sampler on the ladder of :func:`invert`, all of it or from its step ``start`` to before ``stop``.

    Args:
        denoise: The network.
        noise: Latents before step ``start``.
        schedule: The family's schedule.
        steps: As for the inversion.
        order: As for the inversion.
        start: Steps counted from noise.
        stop: The end where not given.
        on_step: Called after each step with (index, count, time, latents).
    """
    check_method(schedule, order, 0)
    places, z = ladder(schedule, steps)[::-1], P.upcast(noise)
    for i in range(start, steps if stop is None else stop):
        z = ode_step(denoise, z, places[i], places[i + 1], schedule, order)
        if on_step is not None:
            on_step(i, steps, places[i].time, z)
    return z


def check_beta(beta: float) -> None:
    """Refuse what is no share."""
    if not 0.0 <= beta <= 1.0:
        raise UsageError(
            f"beta is {beta}", "a number from 0 (fresh noise) to 1 (inverted noise)", "0.3 to 0.5 are usual"
        )


def mix_noise(inverted: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """``√β z_inv + √(1-β) ε``: variance 1 is kept, and the correlation with the inverted noise is ``√β``.

    Args:
        inverted: What inversion gave.
        fresh: Standard normal noise.
        beta: 0 is fresh noise, 1 the inverted. Published recipes take 0.3 to 0.5; more leaks the clip's appearance.
    """
    check_beta(beta)
    return beta**0.5 * inverted + (1.0 - beta) ** 0.5 * fresh


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """``|a - b| / |b|`` of each sample."""
    difference = (found.double() - wanted.double()).flatten(1).norm(dim=1)
    return difference / wanted.double().flatten(1).norm(dim=1).clamp(min=1e-12)


def calls(steps: int, order: Order = "euler", refinements: int = 0) -> int:
    """Network calls of an inversion."""
    return steps * (2 if order == "midpoint" else 1 + refinements)
