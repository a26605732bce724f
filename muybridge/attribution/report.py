"""What was found, as a page: each query, the clips that help it most and harm it most, playing, and how scores spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from muybridge.attribution.influence import Scores
from muybridge.attribution.selecting import Ranked, overlap, rank
from muybridge.report import Cell, Grid, Histogram, Portion, Report, Section, Table, Video


def influence_report(
    page: str | Path,
    scores: Scores,
    chosen: Sequence[str],
    settings: Mapping[str, object],
    videos: Mapping[str, Path],
    query_videos: Mapping[str, Path],
    shown: int = 8,
    most: int = 50,
    embed_mib: float = 16.0,
) -> Report:
    """The page of some scores and a selection, for :func:`muybridge.report.write_report`.

    Args:
        page: The .html file it will be.
        scores: Of influence.
        chosen: The selection, best first.
        settings: How it was made.
        videos: Where the videos of the clips are.
        query_videos: Likewise of the queries, which may have the same names.
        shown: Clips shown at each end.
        most: Queries shown.
        embed_mib: The page holds its videos where they take at most so many MiB, and refers to the files otherwise.
    """
    asked = scores.queries[:most]
    ranked = {query: rank(scores, query=query) for query in asked}
    used = [*chosen[:shown]] + [n for r in ranked.values() for n in (*r.ids[:shown], *r.ids[::-1][:shown])]
    files = [f for f in (*(videos.get(n) for n in used), *(query_videos.get(q) for q in asked)) if f is not None]
    embedded = sum(f.stat().st_size for f in files if f.is_file()) <= embed_mib * 2**20

    def clip(name: str, score: Optional[float] = None, known: Mapping[str, Path] = videos) -> Video:
        file, said = known.get(name), name + (f" {score:+.4f}" if score is not None else "")
        if file is None:
            return Video(label=said, width=128)
        return Video.read(file, said, 128) if embedded else Video.linked(file, page, said, 128)

    def ends(ranking: Ranked) -> Grid:
        scored = list(zip(ranking.ids, ranking.columns["score"], strict=True))
        rows = [("helps most", scored[:shown]), ("harms most", scored[::-1][:shown])]
        count = len(rows[0][1])
        return Grid(
            tuple(str(i + 1) for i in range(count)),
            tuple((said, tuple(clip(*one) for one in clips)) for said, clips in rows),
        )

    def of(query: str) -> Section:
        column = scores.of(query)
        harmful = f"{float((column < 0).mean()):.0%} of {len(column)} clips have a negative score."
        return Section(
            query,
            (),
            (
                Grid(("",), (("the query", (clip(query, None, query_videos),)),)),
                Histogram(tuple(float(v) for v in column), harmful),
                ends(ranked[query]),
            ),
        )

    best = tuple(clip(name) for name in chosen[:shown])
    made = Table(("setting", ""), tuple((str(k), str(v)) for k, v in settings.items()))
    sections = [
        Section(
            "Selected, most wanted first",
            excluded(scores),
            (Grid(tuple(str(i + 1) for i in range(len(best))), (("selected", best),)), made),
        )
    ]
    if len(scores.queries) > 1:
        sections.append(in_common(scores, len(chosen), most))
    sections += [of(query) for query in asked]
    left = len(scores.queries) - len(asked)
    lead = f"{len(chosen)} of {len(scores.ids)} clips selected for {len(scores.queries)} queries."
    return Report(
        "Where is this motion from?", lead + (f" {left} queries are not shown." if left else ""), tuple(sections)
    )


def excluded(scores: Scores, most: int = 20) -> tuple[str, ...]:
    """Which clips have no score, in words."""
    if not scores.excluded:
        return ()
    listed = [f"{name} ({why})" for name, why in scores.excluded.items()]
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return (f"{len(listed)} clips have no score: {', '.join(listed[:most])}{more}.",)


def in_common(scores: Scores, count: int, most: int) -> Section:
    """How much the best clips of queries are the same ones."""
    shares = overlap(scores, count)[:most, :most]
    rows: list[tuple[Cell, ...]] = [
        (f"{i + 1} {name}", *(Portion(float(share)) for share in shares[i]))
        for i, name in enumerate(scores.queries[:most])
    ]
    columns = ("", *(str(i + 1) for i in range(len(rows))))
    return Section(f"Share of the {count} best clips that queries have in common", (), (Table(columns, tuple(rows)),))
