"""Is it right? How much of a ranking survives the projection and a single time, what it finds, and what it foretells."""

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
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.flatnonzero(begins)
    places = (starts + np.append(starts[1:], len(values)) - 1) / 2
    found = np.empty(len(values))
    found[order] = places[np.cumsum(begins) - 1]
    return found


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


def datamodelling(values: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The linear datamodelling score of each query, (queries,).

    Scores foretell that a model that is trained on a subset S has a query's loss the lower, the larger ``Σ_{n in S} score(n, q)``
    is. The score is the rank correlation of the two over models that were really trained.

    Args:
        values: Scores, (clips, queries).
        subsets: Which clips each model was trained on, (models, clips).
        losses: Loss of each query under each model, (models, queries).
    """
    models, queries = losses.shape
    if models < 3 or subsets.shape != (models, len(values)) or values.shape[1] != queries:
        raise UsageError(
            f"scores of shape {values.shape}, subsets of {subsets.shape} and losses of {losses.shape}",
            "(clips, queries), (models, clips) and (models, queries), with 3 models or more",
        )
    foretold = subsets.astype(np.float64) @ values
    return np.array([rank_correlation(foretold[:, q], -losses[:, q]) for q in range(queries)])


def shuffled(
    values: np.ndarray, subsets: np.ndarray, losses: np.ndarray, draws: int = 200, seed: int = 0
) -> np.ndarray:
    """What :func:`datamodelling` comes to by chance, mean over queries, (draws,): clips have one another's scores.

    Scores keep all that they have in common over queries, and so does what the models have in common. So these are as far apart
    as scores that know nothing of the clips would be.
    """
    generator = np.random.default_rng(seed)
    return np.array(
        [datamodelling(values[generator.permutation(len(values))], subsets, losses).mean() for _ in range(draws)]
    )


def best_first(values: np.ndarray) -> np.ndarray:
    """Places of the clips from the highest score to the lowest, for each query, (clips, queries); equal ones as they come."""
    return np.argsort(-values, axis=0, kind="stable")


def precision(values: np.ndarray, relevant: np.ndarray, count: int) -> np.ndarray:
    """Share of the ``count`` best clips of each query that are relevant to it, (queries,).

    Args:
        values: Scores, (clips, queries).
        relevant: Which clips are relevant to which query, (clips, queries).
        count: How many of the best.
    """
    return np.take_along_axis(relevant, best_first(values), 0)[:count].mean(0)


def ndcg(values: np.ndarray, relevant: np.ndarray, count: int) -> np.ndarray:
    """``Σ_i rel_i / log2(i + 1)`` over the ``count`` best clips, against its largest possible value, (queries,)."""
    discount = 1.0 / np.log2(np.arange(count) + 2.0)
    found = (np.take_along_axis(relevant, best_first(values), 0)[:count] * discount[:, None]).sum(0)
    most = np.array([discount[: int(n)].sum() for n in np.minimum(relevant.sum(0), count)])
    return np.divide(found, most, out=np.zeros_like(found), where=most > 0)


@dataclass(frozen=True)
class LengthBias:
    """What the length of clips does to a score.

    Args:
        score: ``dot``, ``dot, with 1/F`` or ``cosine``.
        lengths: Rank correlation of a clip's length with its mean score for all others.
        alike: Share of each clip's best tenth that have its own length.
        chance: That share among all others.
    """

    score: str
    lengths: float
    alike: float
    chance: float


def length_bias(products: np.ndarray, frames: Sequence[int], per_frame: bool = True) -> list[LengthBias]:
    """How scores depend on the length of clips, with and without the factor 1/F of the loss, and as cosines.

    Args:
        products: Inner products of the clips' gradients, (clips, clips).
        frames: Latent frames of each clip.
        per_frame: Whether the loss of these gradients had the factor.
    """
    length = np.asarray(frames, np.float64)
    with_factor = products if per_frame else products / np.outer(length, length)
    norms = np.sqrt(np.diag(with_factor))
    scores = {
        "dot": with_factor * np.outer(length, length),
        "dot, with 1/F": with_factor,
        "cosine": with_factor / np.outer(norms, norms),
    }
    count = len(length)
    others = ~np.eye(count, dtype=bool)
    same = (length[:, None] == length[None]) & others
    found = []
    for name, score in scores.items():
        ranked = best_first(np.where(others, score, -np.inf))[: max(1, (count - 1) // 10)]
        alike = float(np.take_along_axis(same, ranked, 0).mean())
        mean = np.where(others, score, 0.0).sum(1) / (count - 1)
        found.append(LengthBias(name, rank_correlation(mean, length), alike, float(same.sum() / others.sum())))
    return found
