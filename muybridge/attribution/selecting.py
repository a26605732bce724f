"""From scores to the clips that are trained on: top K, majority vote, controls; and without the most harmful."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from muybridge.attribution.checks import ranks
from muybridge.attribution.influence import Scores
from muybridge.data.content import text_key
from muybridge.errors import UsageError

How = Literal["vote", "mean", "random", "value"]


@dataclass(frozen=True)
class Ranked:
    """Clips from the most to the least wanted.

    Args:
        ids: All of them.
        columns: What they were ranked by, the first counts most; of each clip, in this order.
    """

    ids: list[str]
    columns: dict[str, list[float]]


def mean_percentile(scores: Scores) -> np.ndarray:
    """Share of clips that a clip is above, mean over queries; equal scores share their places."""
    count = len(scores.ids)
    if count == 1:
        return np.ones(1)
    total = np.zeros(count)
    for column in scores.values.T:
        total += ranks(column)
    return total / (scores.values.shape[1] * (count - 1))


def votes(scores: Scores, percentile: float = 90.0) -> np.ndarray:
    """Number of queries for which a clip is above the τ percentile (eq. 16)."""
    if not 0.0 <= percentile < 100.0:
        raise UsageError(f"percentile is {percentile}", "a number from 0 to below 100, such as 90")
    return (scores.values > np.percentile(scores.values, percentile, axis=0)).sum(1)


def rank(
    scores: Scores,
    how: How = "vote",
    percentile: float = 90.0,
    query: Optional[str] = None,
    values: Optional[Mapping[str, float]] = None,
    seed: int = 0,
) -> Ranked:
    """All clips, the most wanted first. Ties go by mean percentile rank over the queries, then by id.

    Args:
        scores: Of influence.
        how: ``vote`` of all queries (a generalist), ``mean`` score over queries, ``random``, or by ``value``, highest first.
        percentile: From which a query votes for a clip.
        query: Rank by this query's score alone (a specialist), whatever ``how`` says.
        values: Of each clip, where ``how`` is ``value``: motion magnitude, pixel similarity, or anything.
        seed: Of ``random``.
    """
    columns: dict[str, np.ndarray]
    if query is not None:
        columns = {"score": scores.of(query)}
    elif how == "vote":
        columns = {"votes": votes(scores, percentile).astype(float), "percentile": mean_percentile(scores)}
    elif how == "mean":
        columns = {"score": scores.values.mean(1), "percentile": mean_percentile(scores)}
    elif how == "random":
        columns = {"draw": np.array([int(text_key(f"{seed} {name}")[:12], 16) / 16**12 for name in scores.ids])}
    elif how == "value":
        given = values or {}
        lost = [name for name in scores.ids if name not in given or not math.isfinite(given[name])]
        if lost:
            raise UsageError(
                f"{len(lost)} of {len(scores.ids)} clips have no finite value, such as {', '.join(lost[:3])}",
                "a number for every clip",
            )
        columns = {"value": np.array([given[name] for name in scores.ids])}
    else:
        raise UsageError(f"selection by {how!r}", "vote, mean, random or value")
    # The last key counts most.
    order = np.lexsort([np.array(scores.ids), *(-column for column in reversed(columns.values()))])
    return Ranked([scores.ids[i] for i in order], {n: [float(c[i]) for i in order] for n, c in columns.items()})


def how_many(top: str | float | int, total: int) -> int:
    """``10%``, a share below 1 or a number of clips as a number of clips, at least one.

    Args:
        top: What is wanted.
        total: Of how many.
    """
    text = str(top).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError as error:
        raise UsageError(f"top is {top!r}", "a share such as 10%, or a number of clips such as 500") from error
    share = value / 100.0 if text.endswith("%") else value if value < 1.0 else None
    if not (value > 0.0 and (share is None or share <= 1.0)) or (share is None and value != int(value)):
        raise UsageError(f"top is {top!r}", "a share from above 0 to 100%, or a number of clips such as 500")
    count = round(share * total) if share is not None else int(value)
    if count > total:
        raise UsageError(f"{count} clips are wanted of {total}", f"at most {total}")
    return max(1, count)


def select(scores: Scores, top: str | float | int = "10%", drop: bool = False, **how: Any) -> list[str]:
    """The clips to train on, the most wanted first.

    Args:
        scores: Of influence.
        top: How many: ``10%``, a share, or a number.
        drop: Negative filtering: take all clips *but* this many of the most harmful. In a vote these are not the clips that
            few queries vote for, but those that most vote against: for which they are below the (100 - τ) percentile. Of a
            control, the last ones are dropped.
        how: As for :func:`rank`.
    """
    ranked, count = rank(scores, **how).ids, how_many(top, len(scores.ids))
    if not drop:
        return ranked[:count]
    if count == len(ranked):
        raise UsageError(f"all {count} clips would be dropped", "fewer")
    if how.get("query") is None and how.get("how", "vote") == "vote":
        harmful = set(rank(replace(scores, values=-scores.values), **how).ids[:count])
        return [name for name in ranked if name not in harmful]
    return ranked[: len(ranked) - count]


def overlap(scores: Scores, count: int) -> np.ndarray:
    """Share of the ``count`` best clips that each two queries have in common, (queries, queries)."""
    best = [set(rank(scores, query=query).ids[:count]) for query in scores.queries]
    return np.array([[len(a & b) / count for b in best] for a in best])


def similarity(clips: Iterable[tuple[str, np.ndarray]], queries: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean over queries of the cosine between what two clips look like (pixels, or latents, from which their mean is taken).

    Args:
        clips: Name and array of each clip, all of one shape.
        queries: Likewise.
    """
    sizes: set[int] = set()

    def flat(x: np.ndarray) -> np.ndarray:
        sizes.add(x.size)
        if len(sizes) > 1:
            raise UsageError(
                f"clips of {' and '.join(str(s) for s in sorted(sizes))} numbers are to be compared by similarity",
                "clips and queries of one size",
                "a cache of one size of clips for all, or another control",
            )
        centred = x.astype(np.float64).ravel() - x.mean()
        return centred / max(float(np.linalg.norm(centred)), 1e-30)

    total: Any = 0.0
    count = 0
    for query in queries:
        total, count = total + flat(query), count + 1
    asked = total / max(count, 1)
    return {name: float(flat(clip) @ asked) for name, clip in clips}


def describe(store: Path, scores: Scores, **settings: Any) -> dict[str, Any]:
    """How a selection was made, for its file."""
    return {
        "store": str(store),
        "clips": len(scores.ids),
        "queries": len(scores.queries),
        "excluded": len(scores.excluded),
        **{k: v for k, v in settings.items() if v is not None},
    }
