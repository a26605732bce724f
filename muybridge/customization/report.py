"""What a probe leaves on disk: a table of cells, curves and a heat map, and one recommended boundary with its spread."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muybridge.backbones.base import Backbone
from muybridge.customization.boundary import Estimate, Point, by_clip, early, estimate, late
from muybridge.customization.probe import Cell
from muybridge.customization.tau import RESULT
from muybridge.diffusion.boundaries import Boundary
from muybridge.errors import UsageError
from muybridge.whole import whole, write_text

TABLE = "grid.csv"
SETTINGS = "settings.json"


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """A table, one cell a row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(cells[0].row()))
    writer.writeheader()
    writer.writerows(cell.row() for cell in cells)
    write_text(path, out.getvalue())


def read_cells(path: Path) -> list[Cell]:
    """What :func:`write_cells` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Cell.of_row(row) for row in csv.DictReader(file)]


def refuse_other_words(path: Path, target: str) -> None:
    """Refuse to keep cells into which another caption was put than would be now."""
    made = read_cells(path)[0].target
    if made not in ("", target):
        raise UsageError(
            f"{path} is there and was made with the words {made!r}",
            f"{target!r}, as is asked for now",
            "choose another --out, or remove the file",
        )


def _place(found: Estimate, backbone: Backbone) -> dict[str, Any]:
    if found.t is None:
        return {"tau": None, "reason": found.reason}
    units = {unit: Boundary.of_time(found.t, unit, backbone.schedule).value for unit in ("logsnr", "sigma", "fraction")}
    plain = {unit: value if math.isfinite(value) else str(value) for unit, value in units.items()}
    return {"tau": found.t, **plain, "clarity": found.clarity}


def conclude(folder: Path, cells: Sequence[Cell], backbone: Backbone, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the table, the pictures and the result; the boundary is that of the first swap at the first length.

    Args:
        folder: Where to.
        cells: All cells of all clips.
        backbone: Whose they are.
        settings: What made them.
    """
    write_cells(folder / TABLE, cells)
    parts = []
    for swap, frames in dict.fromkeys((c.swap, c.frames) for c in cells):
        some = [c for c in cells if (c.swap, c.frames) == (swap, frames)]
        single = by_clip(some)
        times = [e.t for e in single.values() if e.t is not None]
        parts.append(
            {
                "swap": swap,
                "frames": frames,
                "clips": len(single),
                **_place(estimate(some), backbone),
                "by_clip": {name: e.t for name, e in single.items()},
                "spread": statistics.stdev(times) if len(times) > 1 else None,
                "range": [min(times), max(times)] if times else None,
            }
        )
    result = {
        "model": backbone.checkpoint.given,
        "family": backbone.family,
        **parts[0],
        "cross_checks": parts[1:],
        "settings": settings,
    }
    draw(folder, cells, parts)
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    return result


# -- pictures ----------------------------------------------------------------------------------------------------------


def _finite(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.logsnr)]


def draw(folder: Path, cells: Sequence[Cell], parts: Sequence[dict[str, Any]]) -> list[Path]:
    """``heatmap-….png`` and ``curves-….png`` of every swap and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for part in parts:
        some = [c for c in cells if (c.swap, c.frames) == (part["swap"], part["frames"])]
        name = f"{part['swap']}-{part['frames']}f"
        what = {"alignment": "text alignment to the new caption", "similarity": "flow similarity to the reference"}
        if part["swap"] != "noise":
            figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4.2))
            for axis, (key, title) in zip(axes, what.items(), strict=True):
                _heat(pyplot, axis, some, key)
                axis.set(
                    title=title, xlabel="tampering begins at time (logSNR)", ylabel="tampering ends at time (logSNR)"
                )
            made.append(save_figure(figure, folder / f"heatmap-{name}.png"))
        figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 5.6), sharex="col")
        for column, unit in enumerate(("timestep", "logSNR")):
            for row, (key, title) in enumerate(what.items()):
                for label, points in (("from here to the end", late(some)), ("from noise to here", early(some))):
                    shown = points if unit == "timestep" else _finite(points)
                    x = [p.t if unit == "timestep" else p.logsnr for p in shown]
                    axes[row][column].plot(x, [getattr(p, key) for p in shown], "o-", ms=3, label=label)
                axes[row][column].set_ylabel(title, fontsize=8)
                axes[row][column].grid(alpha=0.3)
                if part["tau"] is not None:
                    place = part["tau"] if unit == "timestep" else part["logsnr"]
                    if not isinstance(place, str):
                        axes[row][column].axvline(place, color="black", lw=1, ls="--")
            axes[1][column].set_xlabel(unit + (" (1000 is noise)" if column == 0 else ""))
        axes[0][0].legend(frameon=False, fontsize=8, title="tampered", title_fontsize=8)
        made.append(save_figure(figure, folder / f"curves-{name}.png"))
    return made


def _heat(pyplot: Any, axis: Any, cells: Sequence[Cell], key: str) -> None:
    starts = sorted({c.start for c in cells if c.end > c.start})
    ends = sorted({c.end for c in cells if c.end > c.start})
    values = [[math.nan] * len(starts) for _ in ends]
    for i, end in enumerate(ends):
        for j, start in enumerate(starts):
            found = [getattr(c, key) for c in cells if (c.start, c.end) == (start, end)]
            if found:
                values[i][j] = statistics.fmean(found)
    picture = axis.imshow(values, origin="upper", aspect="auto", cmap="viridis")
    places = {c.start: (c.t_start, c.logsnr_start) for c in cells}
    places |= {c.end: (c.t_end, c.logsnr_end) for c in cells if c.end > c.start}
    said = {step: f"{time:.0f} ({logsnr:.1f})" for step, (time, logsnr) in places.items()}
    axis.set_xticks(range(len(starts)), [said[s] for s in starts], rotation=60, fontsize=7)
    axis.set_yticks(range(len(ends)), [said[e] for e in ends], fontsize=7)
    pyplot.colorbar(picture, ax=axis)


def save_figure(figure: Any, path: Path) -> Path:
    """A PNG; the figure is closed."""
    from matplotlib import pyplot

    figure.tight_layout()
    with whole(path, suffix=True) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    return path
