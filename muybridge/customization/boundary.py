"""From a probe's grid to one boundary: where changed words still change the look, and no longer the motion."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Optional

from muybridge.customization.probe import Cell

SEEN = 0.05
"""A change of flow similarity below this is none."""
TREND = 0.5
"""Share of all ups and downs of the alignment that its change from end to end must be: 1 where it only falls, 0.1 of noise."""
CLEAR = 0.1
"""How much better than chance a boundary must part the two."""


class Point(NamedTuple):
    """A boundary, and what comes of tampering on one side of it.

    Args:
        t: The time.
        logsnr: Log signal-to-noise ratio there.
        alignment: Mean over clips.
        similarity: Mean over clips.
    """

    t: float
    logsnr: float
    alignment: float
    similarity: float


def late(cells: Sequence[Cell]) -> list[Point]:
    """Tampering from each boundary to the end, from all of the sampling (first) to none of it (last)."""
    last = max(c.end for c in cells)
    groups: dict[int, list[Cell]] = {}
    for cell in (c for c in cells if c.end == last):
        groups.setdefault(cell.start, []).append(cell)
    # The untouched clip is the cell that begins at the end.
    return [
        _mean(groups[k], 0.0 if k == last else groups[k][0].t_start, groups[k][0].logsnr_start) for k in sorted(groups)
    ]


def early(cells: Sequence[Cell]) -> list[Point]:
    """Tampering from noise to each boundary, from none of the sampling (first) to all of it (last)."""
    last = max(c.end for c in cells)
    groups: dict[int, list[Cell]] = {}
    for cell in (c for c in cells if c.start in (0, last)):
        groups.setdefault(cell.end if cell.start == 0 else 0, []).append(cell)
    begin = next(c for c in cells if c.start == 0)
    return [
        _mean(groups[k], begin.t_start, begin.logsnr_start)
        if k == 0
        else _mean(groups[k], groups[k][0].t_end, groups[k][0].logsnr_end)
        for k in sorted(groups)
    ]


def _mean(cells: Sequence[Cell], t: float, logsnr: float) -> Point:
    alignment, similarity = (statistics.fmean(getattr(c, name) for c in cells) for name in ("alignment", "similarity"))
    return Point(t, logsnr, alignment, similarity)


@dataclass(frozen=True)
class Estimate:
    """One boundary, or why there is none.

    Args:
        t: The boundary as a timestep.
        clarity: Share of the change of look that is on its lower side plus share of the change of motion on its upper, less 1:
            1 where it parts the two completely, 0 where it is as good as none.
        reason: Why there is none.
    """

    t: Optional[float]
    clarity: float = 0.0
    reason: str = ""


def parting(curve: Sequence[Point]) -> Estimate:
    """The boundary below which a swap of the subject's words changes most of the look and least of the motion.

    With ``A`` the alignment and ``M`` the flow similarity of tampering from τ to the end, each scaled to 0..1 between tampering
    nowhere and everywhere, it maximises ``A(τ) + M(τ) - 1``.
    """
    whole, none = curve[0], curve[-1]
    if not whole.alignment > none.alignment:
        return Estimate(None, reason="the new words change nothing even when they are there from the first step on")
    ups_and_downs = sum(abs(b.alignment - a.alignment) for a, b in pairwise(curve))
    if whole.alignment - none.alignment < TREND * ups_and_downs:
        return Estimate(None, reason="what the new words change is no more than chance from one boundary to the next")
    if none.similarity - whole.similarity < SEEN:
        return Estimate(None, reason="the motion stays the same even when the words are new from the first step on")
    gain = [(p.alignment - none.alignment) / (whole.alignment - none.alignment) for p in curve]
    kept = [(p.similarity - whole.similarity) / (none.similarity - whole.similarity) for p in curve]
    clarity = [min(max(a, 0.0), 1.0) + min(max(m, 0.0), 1.0) - 1.0 for a, m in zip(gain, kept, strict=True)]
    best = max(clarity)
    if best < CLEAR:
        return Estimate(None, best, "look and motion change together: no boundary parts them")
    # Of a plateau, the middle.
    ties = [p.t for p, c in zip(curve, clarity, strict=True) if c >= best - 1e-9]
    return Estimate(ties[len(ties) // 2], best)


def half_way(curve: Sequence[Point]) -> Estimate:
    """The time at which tampering from there to the end changes half as much of the motion as tampering everywhere.

    For the cross-checks: swapped motion words, and fresh noise.
    """
    whole, none = curve[0], curve[-1]
    change = none.similarity - whole.similarity
    if change < SEEN:
        return Estimate(None, reason="the motion stays the same even when all of the sampling is tampered with")
    kept = [(p.similarity - whole.similarity) / change for p in curve]
    for (a, p), (b, q) in zip(zip(kept, curve, strict=True), zip(kept[1:], curve[1:], strict=True), strict=False):
        if a < 0.5 <= b:
            return Estimate(p.t + (q.t - p.t) * (0.5 - a) / (b - a), 1.0)
    return Estimate(None, reason="the motion never comes back half way")


def estimate(cells: Sequence[Cell]) -> Estimate:
    """The boundary of one swap, from the mean over its clips."""
    if cells[0].swap != "subject":
        return half_way(late(cells))
    clips = dict.fromkeys(c.clip for c in cells)
    curves = [late([c for c in cells if c.clip == clip]) for clip in clips]
    changes = [curve[0].alignment - curve[-1].alignment for curve in curves]
    if len(changes) > 1 and not statistics.fmean(changes) > statistics.stdev(changes) / len(changes) ** 0.5:
        return Estimate(None, reason="what the new words change differs between clips by more than it is on average")
    return parting(late(cells))


def by_clip(cells: Sequence[Cell]) -> dict[str, Estimate]:
    """The boundary of each clip by itself: their spread says how far the mean can be trusted."""
    clips = dict.fromkeys(c.clip for c in cells)
    return {name: estimate([c for c in cells if c.clip == name]) for name in clips}
