"""How much each training clip helps each query: inner products of stored vectors, streamed from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Optional

import numpy as np

from muybridge.attribution.store import Block, InfluenceStore, Key
from muybridge.errors import UsageError

Kind = Literal["cosine", "dot", "kernel"]


@dataclass(frozen=True)
class Scores:
    """Influence of clips on queries.

    Args:
        ids: The training clips, in order of their names.
        queries: The query clips, likewise.
        values: (clips, queries); positive helps, negative harms.
        excluded: Training clips and queries without a score, and why.
    """

    ids: list[str]
    queries: list[str]
    values: np.ndarray
    excluded: dict[str, str] = field(default_factory=dict)

    def of(self, query: str) -> np.ndarray:
        """Scores of all clips for one query."""
        return self.values[:, self._place(query)]

    def only(self, queries: Sequence[str]) -> Scores:
        """Scores for some of the queries."""
        places = sorted({self._place(query) for query in queries})
        return replace(self, queries=[self.queries[i] for i in places], values=self.values[:, places])

    def _place(self, query: str) -> int:
        if query not in self.queries:
            near = ", ".join(self.queries[:3])
            raise UsageError(f"no query {query!r} in the store", f"one of its {len(self.queries)}, such as {near}")
        return self.queries.index(query)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 (eq. 4)."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def influence(
    train: InfluenceStore,
    query: Optional[InfluenceStore] = None,
    kind: Kind = "cosine",
    centre: bool = False,
    damping: float = 1.0,
) -> Scores:
    r"""Scores of every training clip for every query.

    ``cosine``: ``1/|T| Σ_t <g_n/|g_n|, g_q/|g_q|>`` (eq. 1; with one time eq. 2, 5, 10). ``dot``: without the norms. ``kernel``:
    the cosine with ``(ΦᵀΦ/N + λ c I)⁻¹`` between the two, Φ being the unit vectors of the training clips and c the mean
    eigenvalue of ``ΦᵀΦ/N``. With several steps of training (TracIn) the mean runs over these too.

    Args:
        train: Holds the training clips.
        query: Holds the queries; the same store where not given.
        kind: Which score.
        centre: Take the mean of the training vectors off all vectors first, at each time.
        damping: λ of ``kernel``; large is the cosine.
    """
    return sweep(train, query, kind, centre, [damping])[0]


def sweep(
    train: InfluenceStore,
    query: Optional[InfluenceStore] = None,
    kind: Kind = "kernel",
    centre: bool = False,
    dampings: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
) -> list[Scores]:
    """Scores under several dampings, reading the store as often as for one. λ is to be chosen on other queries than are reported.

    Args:
        train: Holds the training clips.
        query: Holds the queries; the same store where not given.
        kind: Which score.
        centre: Take the mean of the training vectors off all vectors first.
        dampings: The λ.
    """
    if kind not in ("cosine", "dot", "kernel"):
        raise UsageError(f"score {kind!r}", "cosine, dot or kernel")
    if kind == "kernel" and not all(np.isfinite(d) and d > 0 for d in dampings):
        raise UsageError(f"damping {list(dampings)}", "numbers above 0, such as 0.1, 1 and 10")
    asked = query if query is not None else train
    if query is not None:
        query.check_like(train)
    ids, queries = train.ids("train"), asked.ids("query")
    for what, names, store, part in (("training clips", ids, train, "train"), ("queries", queries, asked, "query")):
        if not names:
            raise UsageError(
                f"{store.path} holds no {what}", f"at least one row of the part {part}", "muybridge attribute"
            )
    keys = train.keys("train")
    if keys != asked.keys("query"):
        raise UsageError(
            f"training clips are stored at {_said(keys)} and queries at {_said(asked.keys('query'))}",
            "the same steps and times",
            "let `muybridge attribute` finish both",
        )
    means, moments = _statistics(train, keys, centre, kind)
    fronts = [_front(asked, queries, keys, means, moments, kind, damping) for damping in dampings]
    values = [np.zeros((len(ids), len(queries)), np.float32) for _ in dampings]
    counts = np.zeros(len(ids), np.int64)
    place = {name: i for i, name in enumerate(ids)}
    for block in train.blocks("train"):
        for key, rows in _by_key(block):
            vectors = block.vectors[rows] - means[key] if centre else block.vectors[rows]
            vectors = vectors if kind == "dot" else unit(vectors)
            at = np.array([place[block.ids[i]] for i in rows])
            counts[at] += 1
            for value, front in zip(values, fronts, strict=True):
                value[at] += vectors @ front[key].T
    _complete(ids, counts, keys, train)
    excluded = {**train.excluded("train"), **asked.excluded("query")}
    return [Scores(ids, queries, value / len(keys), excluded) for value in values]


def _said(keys: Sequence[Key]) -> str:
    return ", ".join(f"{t:g}" + (f" (step {s})" if s else "") for s, t in keys) or "no time"


def _by_key(block: Block) -> list[tuple[Key, list[int]]]:
    rows: dict[Key, list[int]] = {}
    for i, key in enumerate(block.keys):
        rows.setdefault(key, []).append(i)
    return list(rows.items())


def _complete(names: Sequence[str], counts: np.ndarray, keys: Sequence[Key], store: InfluenceStore) -> None:
    short = [name for name, count in zip(names, counts, strict=True) if count != len(keys)]
    if short:
        raise UsageError(
            f"{len(short)} of {len(names)} clips of {store.path} lack some of {_said(keys)}, such as {', '.join(short[:3])}",
            "every clip at every step and time",
            "run the command that wrote it again: it goes on with what is missing",
        )


def _statistics(
    train: InfluenceStore, keys: Sequence[Key], centre: bool, kind: Kind
) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """Mean of the training vectors, and ``ΦᵀΦ/N``, at each time, where they are needed."""
    means = {key: np.zeros(train.dim) for key in keys}
    counts = dict.fromkeys(keys, 0)
    if centre:
        for block in train.blocks("train"):
            for key, rows in _by_key(block):
                means[key] += block.vectors[rows].sum(0, dtype=np.float64)
                counts[key] += len(rows)
        means = {key: (means[key] / max(counts[key], 1)).astype(np.float32) for key in keys}
    moments: dict[Key, np.ndarray] = {}
    if kind == "kernel":
        counts = dict.fromkeys(keys, 0)
        moments = {key: np.zeros((train.dim, train.dim)) for key in keys}
        for block in train.blocks("train"):
            for key, rows in _by_key(block):
                vectors = unit(block.vectors[rows] - means[key] if centre else block.vectors[rows])
                moments[key] += vectors.T @ vectors
                counts[key] += len(rows)
        moments = {key: moments[key] / max(counts[key], 1) for key in keys}
    return means, moments


def _front(
    store: InfluenceStore,
    queries: Sequence[str],
    keys: Sequence[Key],
    means: dict[Key, np.ndarray],
    moments: dict[Key, np.ndarray],
    kind: Kind,
    damping: float,
) -> dict[Key, np.ndarray]:
    """What training vectors are multiplied with, (queries, dim) at each time."""
    place = {name: i for i, name in enumerate(queries)}
    found = {key: np.zeros((len(queries), store.dim), np.float32) for key in keys}
    counts = np.zeros(len(queries), np.int64)
    for block in store.blocks("query"):
        for key, rows in _by_key(block):
            at = np.array([place[block.ids[i]] for i in rows])
            found[key][at] = block.vectors[rows] - means[key]
            counts[at] += 1
    _complete(queries, counts, keys, store)
    if kind == "dot":
        return found
    for key in keys:
        found[key] = unit(found[key])
        if kind == "kernel":
            moment = moments[key]
            scale = float(np.trace(moment)) / len(moment)
            # Scaled so that a large damping gives the cosine itself.
            damped = moment / scale + damping * np.eye(len(moment))
            found[key] = (np.linalg.solve(damped, found[key].T.astype(np.float64)).T * damping).astype(np.float32)
    return found
