"""From a store of influence to a selection, and a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional, Union

from muybridge.errors import UsageError


def select(
    *,
    store: str,
    queries: Optional[str] = None,
    top: str = "10%",
    by: Literal["vote", "mean", "random", "motion", "similarity"] = "vote",
    query: Optional[Union[str, list[str]]] = None,
    percentile: float = 90.0,
    score: Literal["cosine", "dot", "kernel"] = "cosine",
    centre: bool = False,
    damping: float = 10.0,
    drop_harmful: bool = False,
    cache: Optional[str] = None,
    query_cache: Optional[str] = None,
    videos: Optional[str] = None,
    query_videos: Optional[str] = None,
    out: str = "selection.parquet",
    report: Optional[str] = "report.html",
    shown: int = 8,
    embed_mib: float = 16.0,
    seed: int = 0,
) -> None:
    """Select the clips that help some queries most, and write a page with the clips playing.

    Args:
        store: What `muybridge attribute` wrote.
        queries: Another store to take the queries from; the same where not given.
        top: How many clips: a share such as 10%, or a number.
        by: vote (of all queries), mean (score over queries), or a control: random, motion (magnitude), similarity (of pictures).
        query: Id of one query, to take what helps it most; or a list of ids, to have these alone vote.
        percentile: A query votes for the clips above this percentile of its scores.
        score: cosine, dot, or kernel (with the inverse of the damped second moment between the two).
        centre: Take the mean of the training gradients off first.
        damping: Of the kernel, in units of its mean eigenvalue; choose it on other queries than you report.
        drop_harmful: Take all clips but the ``top`` share of the most harmful.
        cache: A cache of the training clips, for the controls.
        query_cache: A cache of the queries, for similarity.
        videos: Folder or table of the training clips, to show them.
        query_videos: Likewise of the queries.
        out: The selection, for data.selection.
        report: The page; none where empty.
        shown: Clips at each end of a query's ranking that the page shows.
        embed_mib: The page holds its videos where they take at most so many MiB, and refers to the files otherwise.
        seed: Of random.
    """
    from muybridge.attribution.influence import influence
    from muybridge.attribution.report import influence_report
    from muybridge.attribution.selecting import describe, select
    from muybridge.attribution.store import InfluenceStore
    from muybridge.data.selection import write_selection
    from muybridge.report import write_report

    if Path(out).suffix != ".parquet":
        raise UsageError(f"out is {out}", "a name that ends in .parquet")
    train = InfluenceStore(store)
    asked = InfluenceStore(queries) if queries is not None else None
    scores = influence(train, asked, score, centre, damping)
    alone = query if isinstance(query, str) else None
    if query is not None:
        scores = scores.only([query] if isinstance(query, str) else query)
    values = None
    if by in ("motion", "similarity"):
        values = control(by, scores.ids, scores.queries, cache, query_cache)
    how: Any = "value" if values is not None else by
    settings = describe(
        Path(store),
        scores,
        top=top,
        by=by if alone is None else None,
        query=query,
        percentile=percentile if by == "vote" and alone is None else None,
        score=score,
        centre=centre or None,
        damping=damping if score == "kernel" else None,
        drop_harmful=drop_harmful or None,
        seed=seed if by == "random" else None,
    )
    options: dict[str, Any] = dict(how=how, percentile=percentile, query=alone, values=values, seed=seed)
    chosen = select(scores, top, drop_harmful, **options)
    print(f"{write_selection(out, chosen, meta=settings)}: {len(chosen)} of {len(scores.ids)} clips")
    if scores.excluded:
        print(f"  {len(scores.excluded)} clips without a usable gradient are left out")
    if report:
        known, asked_for = paths(videos), paths(query_videos)
        page = influence_report(report, scores, chosen, settings, known, asked_for, shown, embed_mib=embed_mib)
        print(write_report(report, page))


def paths(source: Optional[str]) -> dict[str, Path]:
    """Where the video of each clip of a source is."""
    from muybridge.data.sources import list_clips

    if source is None:
        return {}
    return {clip.id: Path(clip.path) for clip in list_clips(source, captions="optional")}


def control(
    by: str, ids: list[str], queries: list[str], cache: Optional[str], query_cache: Optional[str]
) -> dict[str, float]:
    """What a control ranks clips by."""
    from muybridge.attribution.selecting import similarity
    from muybridge.data.cache import Cache

    if cache is None:
        raise UsageError(f"by {by} without a cache", "a cache of the training clips", "--cache FOLDER")
    held = Cache(cache)
    if by == "motion":
        return held.motion("mean")
    if query_cache is None:
        raise UsageError("by similarity without a cache of the queries", "one", "--query_cache FOLDER")
    asked = Cache(query_cache)
    return similarity(
        ((name, held.latents.read(name)["latents"].float().numpy()) for name in ids),
        (asked.latents.read(name)["latents"].float().numpy() for name in queries),
    )
