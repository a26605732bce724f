"""Is it right? How much of a ranking survives the projection, and a single time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muybridge.attribution.projection import Projection
from muybridge.errors import UsageError


def ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value among all, equal ones sharing theirs."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation: that of the ranks."""
    x, y = ranks(np.asarray(a).ravel()), ranks(np.asarray(b).ravel())
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / max(float(np.sqrt((x * x).sum() * (y * y).sum())), 1e-30))


def cosines(vectors: Tensor) -> np.ndarray:
    """Cosines of all pairs of rows."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[first, second].numpy()


@dataclass(frozen=True)
class Fidelity:
    """What a projection keeps of the cosines between full gradients.

    Args:
        projection: Its kind.
        dim: Its numbers.
        correlation: Rank correlation of all cosines.
        error: Root mean square of their errors.
        theory: What independent rows would give, ``√(mean (1 - c²)²) / √D'``.
    """

    projection: str
    dim: int
    correlation: float
    error: float
    theory: float


def fidelity(
    gradients: Mapping[str, Tensor],
    make: Callable[[int], Projection],
    dims: Sequence[int] = (128, 256, 512, 1024, 2048),
) -> list[Fidelity]:
    """Projected against full gradients of some clips.

    Args:
        gradients: (clips, numel) by canonical name.
        make: Gives the projection to so many numbers.
        dims: How many.
    """
    count = len(next(iter(gradients.values())))
    if count < 3:
        raise UsageError(f"{count} clips", "3 or more, or there is nothing to rank")
    products = sum(g.double() @ g.double().T for g in gradients.values())
    assert isinstance(products, Tensor)
    length = products.diagonal().sqrt()
    if not bool((length > 0).all()) or not bool(torch.isfinite(length).all()):
        raise UsageError("some clips have a gradient of zero or one that is not finite", "clips with usable gradients")
    first, second = torch.triu_indices(count, count, 1)
    true = (products / (length[:, None] * length))[first, second].numpy()
    found = []
    for dim in dims:
        projection = make(dim)
        out = projection.zeros(count)
        for name, gradient in gradients.items():
            projection.add(out, name, gradient)
        kept = cosines(out)
        error, theory = np.sqrt(np.mean((kept - true) ** 2)), np.sqrt(np.mean((1 - true**2) ** 2) / dim)
        found.append(Fidelity(projection.kind, dim, rank_correlation(kept, true), float(error), float(theory)))
    return found
