"""How likely a clean sample is under a model, by its probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Optional

import torch
from torch import Tensor

from muybridge.diffusion import predictions as P
from muybridge.diffusion.inversion import Node, node
from muybridge.diffusion.ode import ode_times
from muybridge.diffusion.samplers import Denoiser
from muybridge.diffusion.schedules import FlowSchedule, NoiseSchedule
from muybridge.errors import UsageError

Generators = Sequence[torch.Generator]


def _angle(schedule: NoiseSchedule, at: Node) -> float:
    """The parameter of the path: ``σ`` for flow, the angle with ``α = cos θ`` for variance-preserving families."""
    if isinstance(schedule, FlowSchedule):
        return at.sigma
    return float(torch.atan2(torch.tensor(at.sigma), torch.tensor(at.alpha)))


def velocity(denoise: Denoiser, z: Tensor, at: Node, schedule: NoiseSchedule) -> Tensor:
    """``dz/dθ = α' x̂0 + σ' ε̂``: the flow prediction, or the v prediction, whatever the network says."""
    prediction = denoise(z, torch.full((z.shape[0],), at.time, device=z.device))
    alpha, sigma = (torch.tensor(c, dtype=z.dtype, device=z.device) for c in (at.alpha, at.sigma))
    x0, eps = P.to_x0_eps(prediction.to(z.dtype), z, alpha, sigma, schedule.prediction)
    return eps - x0 if isinstance(schedule, FlowSchedule) else alpha * eps - sigma * x0


def basis(z: Tensor) -> Iterator[Tensor]:
    """Every unit vector of a sample, the same for all samples: with these as probes the trace is exact."""
    size = z[0].numel()
    for i in range(size):
        probe = torch.zeros(size, dtype=z.dtype, device=z.device)
        probe[i] = 1.0
        yield probe.view(1, *z.shape[1:]).expand_as(z)


def signs(z: Tensor, probes: int, generators: Generators) -> list[Tensor]:
    """Random signs: their quadratic forms have the trace as their mean (Hutchinson)."""
    drawn = [
        torch.stack([torch.randint(0, 2, z.shape[1:], generator=g).to(z.dtype) * 2 - 1 for g in generators])
        for _ in range(probes)
    ]
    return [d.to(z.device) for d in drawn]


def _with_trace(
    denoise: Denoiser, z: Tensor, at: Node, schedule: NoiseSchedule, probes: Optional[list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The velocity, and the trace of its derivative."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(denoise, z, at, schedule)
        total = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        count = 0
        for probe in basis(z) if probes is None else probes:
            (product,) = torch.autograd.grad(v, z, probe, retain_graph=True)
            total = total + (product * probe).flatten(1).sum(1)
            count += 1
    return v.detach(), total if probes is None else total / count


def log_likelihood(
    denoise: Denoiser,
    clean: Tensor,
    schedule: NoiseSchedule,
    log_density_of_noise: Callable[[Tensor], Tensor],
    steps: int = 50,
    probes: Optional[int] = 1,
    generators: Optional[Generators] = None,
) -> Tensor:
    """``log p(x)`` of each sample in nats: ``log p(z_T) + ∫ tr(∂v/∂z) dθ`` along the ODE from the sample to noise.

    Heun's steps, so the error falls with the square of their number; two passes forward and backward a step, for each probe a
    backward pass more. The model's own noise ends at unit variance: families without zero terminal SNR are off by what is
    left of the sample there.

    Args:
        denoise: The network, without guidance (a guided score is that of no density).
        clean: Samples (B, C, F, H, W).
        schedule: The family's schedule.
        log_density_of_noise: Of the noise that the model was trained under, one number a sample.
        steps: Steps of the ODE.
        probes: Random probes of the trace; ``None`` takes all unit vectors, which is exact and only for tiny samples.
        generators: One for each sample, for its probes.
    """
    if probes is not None and (probes < 1 or generators is None or len(generators) != len(clean)):
        raise UsageError(
            f"{probes} probes and {0 if generators is None else len(generators)} generators for {len(clean)} samples",
            "at least 1 probe, and a generator for each sample",
        )
    z = P.upcast(clean).detach()
    drawn = signs(z, probes, generators or ()) if probes is not None else None
    # From clean to noise. No entry of a table has no noise; the network is told its cleanest time there.
    times = ode_times(schedule, steps)
    first = Node(float(schedule.snap(torch.tensor(0.0))), 1.0, 0.0)
    places = [first, *(node(schedule, t) for t in reversed(times[:-1]))]
    if places[1].time == first.time:
        raise UsageError(f"a likelihood in {steps} steps", "fewer steps: the family's network knows no more times")
    gained = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
    for here, there in pairwise(places):
        h = _angle(schedule, there) - _angle(schedule, here)
        v, trace = _with_trace(denoise, z, here, schedule, drawn)
        v_next, trace_next = _with_trace(denoise, z + h * v, there, schedule, drawn)
        z = z + 0.5 * h * (v + v_next)
        gained = gained + 0.5 * h * (trace + trace_next)
    return log_density_of_noise(z) + gained
