"""A page that shows what was found: each query, the clips that help it most and harm it most, playing, and how scores spread."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from muybridge.attribution.influence import Scores
from muybridge.attribution.selecting import overlap, rank

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 1rem; }
figure { margin: 0; width: 11rem; } video { width: 100%; background: #eee; border-radius: 4px; }
figcaption { font-size: 12px; overflow-wrap: anywhere; } .lost { padding: 2.2rem .5rem; background: #eee; border-radius: 4px; }
table { border-collapse: collapse; font-size: 12px; } td, th { padding: .25rem .5rem; text-align: right; }
th { font-weight: normal; text-align: left; } .note { color: #555; }
"""


def _figure(name: str, score: float | None, videos: Mapping[str, Path], beside: Path) -> str:
    path = videos.get(name)
    said = html.escape(name) + (f"<br>{score:+.4f}" if score is not None else "")
    if path is None:
        shown = '<div class="lost">no video known</div>'
    else:
        source = html.escape(os.path.relpath(path.absolute(), beside.absolute()).replace(os.sep, "/"))
        shown = f'<video src="{source}" autoplay loop muted playsinline controls preload="metadata"></video>'
    return f"<figure>{shown}<figcaption>{said}</figcaption></figure>"


def histogram(values: np.ndarray, bins: int = 40, width: int = 480, height: int = 90) -> str:
    """Scores of one query as a drawing; bars of harmful clips are red."""
    counts, edges = np.histogram(values, bins)
    step, top = width / bins, max(int(counts.max()), 1)
    bars = []
    for i, count in enumerate(counts):
        tall = count / top * height
        colour = "#c0504d" if edges[i + 1] <= 0 else "#4f81bd"
        bars.append(
            f'<rect x="{i * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}" fill="{colour}"/>'
        )
    low, high = (f"{edge:+.3f}" for edge in (edges[0], edges[-1]))
    ends = (
        f'<text x="0" y="{height + 14}">{low}</text><text x="{width}" y="{height + 14}" text-anchor="end">{high}</text>'
    )
    box = f'viewBox="0 0 {width} {height + 18}" width="{width}" height="{height + 18}" font-size="11"'
    return f"<svg {box}>{''.join(bars)}{ends}</svg>"


def _overlaps(scores: Scores, count: int) -> str:
    shares = overlap(scores, count)
    head = "".join(f"<th>{i + 1}</th>" for i in range(len(scores.queries)))
    rows = []
    for i, name in enumerate(scores.queries):
        cells = "".join(f'<td style="background: rgba(79,129,189,{share:.2f})">{share:.0%}</td>' for share in shares[i])
        rows.append(f"<tr><th>{i + 1} {html.escape(name)}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def write_report(
    path: str | Path,
    scores: Scores,
    chosen: Sequence[str],
    settings: Mapping[str, object],
    videos: Mapping[str, Path],
    query_videos: Mapping[str, Path],
    shown: int = 8,
    most: int = 50,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: The .html file.
        scores: Of influence.
        chosen: The selection, best first.
        settings: How it was made.
        videos: Where the videos of the clips are; the page refers to them.
        query_videos: Likewise of the queries, which may have the same names.
        shown: Clips shown at each end.
        most: Queries shown.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items()
    )
    parts = [
        f"<h1>Where is this motion from?</h1><p>{len(chosen)} of {len(scores.ids)} clips selected for "
        f"{len(scores.queries)} queries.</p><table>{rows}</table>"
    ]
    if scores.excluded:
        listed = ", ".join(f"{html.escape(n)} ({why})" for n, why in list(scores.excluded.items())[:20])
        parts.append(f'<p class="note">{len(scores.excluded)} clips have no score: {listed}</p>')
    parts.append("<h2>Selected, most wanted first</h2>")
    parts.append(f'<div class="row">{"".join(_figure(n, None, videos, path.parent) for n in chosen[:shown])}</div>')
    if len(scores.queries) > 1:
        count = min(len(chosen), len(scores.ids))
        parts.append(f"<h2>Share of the {count} best clips that queries have in common</h2>{_overlaps(scores, count)}")
    for query in scores.queries[:most]:
        column, ranked = scores.of(query), rank(scores, query=query)
        helpful = list(zip(ranked.ids, ranked.columns["score"], strict=True))
        best, worst = helpful[:shown], helpful[::-1][:shown]
        harmful = float((column < 0).mean())
        parts.append(f"<h2>{html.escape(query)}</h2>")
        parts.append(f'<div class="row">{_figure(query, None, query_videos, path.parent)}<div>{histogram(column)}')
        parts.append(f'<p class="note">{harmful:.0%} of clips have a negative score</p></div></div>')
        for title, clips in (("Most helpful", best), ("Most harmful", worst)):
            figures = "".join(_figure(name, score, videos, path.parent) for name, score in clips)
            parts.append(f"<div>{title}</div><div class='row'>{figures}</div>")
    if len(scores.queries) > most:
        parts.append(f'<p class="note">{len(scores.queries) - most} more queries are not shown.</p>')
    text = f'<!doctype html><meta charset="utf-8"><title>Influence</title><style>{STYLE}</style>{"".join(parts)}\n'
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
