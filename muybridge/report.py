"""One HTML file that shows results to look at: videos that play side by side, tables with intervals, pictures, commands.

The page is a function of the dataclasses here and of nothing else. It asks for nothing from outside: videos and pictures stand in
it as base64, and there is no script. Only videos that are too many for one file may be linked instead.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional
from urllib.parse import quote

import numpy as np

from muybridge.errors import UsageError
from muybridge.metrics.base import Estimate
from muybridge.whole import write_text

SMALL_FILE = 2**16
"""A clip of fewer bytes has few pixels: they are shown as squares, not blurred."""


@dataclass(frozen=True)
class Portion:
    """A share of something, on a ground that is the stronger the larger it is.

    Args:
        value: 0 to 1.
    """

    value: float


Cell = str | Estimate | Portion
"""Text, a mean with its interval, or a share."""


@dataclass(frozen=True)
class Video:
    """A clip; with neither bytes nor a link, the place of one that is not known.

    Args:
        mp4: The bytes of an H.264 file.
        label: Said below it, and to those who can't see it.
        width: Pixels of the page; small clips are scaled up without blurring them.
        link: Where the file is, seen from the page, where the page does not hold it.
    """

    mp4: bytes = b""
    label: str = ""
    width: int = 112
    link: str = ""

    @classmethod
    def read(cls, path: str | Path, label: str = "", width: int = 112) -> Video:
        """The clip in a file."""
        file = Path(path)
        if not file.is_file():
            raise UsageError(f"{file} does not exist", "an .mp4 file")
        return cls(file.read_bytes(), label, width)

    @classmethod
    def linked(cls, path: str | Path, page: str | Path, label: str = "", width: int = 112) -> Video:
        """The clip in a file that the page refers to: both then have to be moved together."""
        way = os.path.relpath(Path(path).absolute(), Path(page).absolute().parent)
        return cls(b"", label, width, quote(way.replace(os.sep, "/")))


@dataclass(frozen=True)
class Grid:
    """Clips side by side.

    Args:
        columns: Headings.
        rows: A label, and a clip or nothing for each column.
        note: Said below.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Optional[Video], ...]], ...]
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [label for label, videos in self.rows if len(videos) != len(self.columns)]
        if wrong:
            raise ValueError(f"the row {wrong[0]!r} has not as many videos as there are columns, {len(self.columns)}")


@dataclass(frozen=True)
class Table:
    """Numbers and words; the first cell of a row is its heading.

    Args:
        columns: Headings.
        rows: As many cells each.
        note: Said below.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [row[0] for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"the row {wrong[0]!r} has not as many cells as there are columns, {len(self.columns)}")


@dataclass(frozen=True)
class Picture:
    """A still.

    Args:
        png: The bytes of a PNG file.
        label: Said below it.
    """

    png: bytes
    label: str = ""

    @classmethod
    def read(cls, path: str | Path, label: str = "") -> Picture:
        """The picture in a file."""
        return cls(Path(path).read_bytes(), label)


@dataclass(frozen=True)
class Histogram:
    """How some values spread; bars below zero have another colour.

    Args:
        values: All of them.
        label: Said below.
        bins: Number of bars.
    """

    values: tuple[float, ...]
    label: str = ""
    bins: int = 40

    def __post_init__(self) -> None:
        if not self.values or not np.isfinite(self.values).all():
            raise ValueError("a histogram of no values, or of some that are not finite")


@dataclass(frozen=True)
class Command:
    """What made something.

    Args:
        line: As typed into a shell.
        seconds: How long it took.
    """

    line: str
    seconds: Optional[float] = None


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: Its heading.
        text: Paragraphs; words between backticks are code.
        parts: What is shown.
        commands: What made it.
    """

    title: str
    text: tuple[str, ...] = ()
    parts: tuple[Grid | Table | Picture | Histogram, ...] = ()
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True)
class Report:
    """The whole page.

    Args:
        title: Its heading.
        lead: What it is, in a few sentences.
        sections: In their order.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]


STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --soft: #64605a; --line: #dcd8d1;
  --accent: #9a4a12; --harm: #b3261e; --help: #2f6f9f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #171614; --card: #211f1c; --ink: #ece8e1; --soft: #a8a198; --line: #3b3833;
    --accent: #f0a56b; --harm: #f2857d; --help: #7db8e0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
.lead, .note, .interval, figcaption, summary { color: var(--soft); }
.note { font-size: .9rem; margin-top: .5rem; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem; margin-top: 1.5rem; }
.wide { overflow-x: auto; margin: 1rem 0 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
thead th { font-size: .82rem; max-width: 11rem; overflow-wrap: break-word; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 8rem; max-width: 14rem; overflow-wrap: break-word; }
.grid th, .grid td { border: 0; padding: .35rem .5rem; }
.grid thead th { width: 8rem; max-width: 8rem; }
.grid tbody th { font-weight: 400; vertical-align: middle; width: 12rem; }
.interval { display: block; font-size: .74rem; white-space: nowrap; }
figure { margin: 0; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
video, img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px;
  background: var(--line); }
td video { max-width: none; }
video.smooth { image-rendering: auto; }
.lost { padding: 1.5rem .5rem; border-radius: 4px; background: var(--line); color: var(--soft); font-size: .8rem; }
svg { display: block; max-width: 100%; height: auto; font-size: 11px; fill: var(--help); }
svg .harm { fill: var(--harm); }
svg text { fill: var(--soft); }
.portion { background: color-mix(in srgb, var(--help) calc(100% * var(--part)), transparent); text-align: right; }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: .5rem 0 0; padding: .75rem; background: var(--ground); border: 1px solid var(--line); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
""".strip()


def render(report: Report) -> str:
    """The page."""
    links = "".join(f'<a href="#part-{i}">{_text(s.title)}</a>' for i, s in enumerate(report.sections))
    sections = "\n".join(_section(i, section) for i, section in enumerate(report.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(report.title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>{_text(report.title)}</h1>
<p class="lead">{_words(report.lead)}</p>
<nav>{links}</nav>
{sections}
</main>
</body>
</html>
"""


def write_report(path: str | Path, report: Report) -> Path:
    """The page as a file, written whole or not at all."""
    return write_text(path, render(report))


def number(value: float) -> str:
    """``0.934``, ``1.000``, ``12.3``, ``1240``: three decimals for shares, three digits above them."""
    if value != value:
        return "–"
    above = int(f"{abs(value):.2e}".partition("e")[2]) if abs(value) > 1.0 else -1
    return f"{value:.{max(0, 2 - above)}f}"


def _text(words: str) -> str:
    return html.escape(words)


def _words(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words))


def _section(index: int, section: Section) -> str:
    shown = {Grid: _grid, Table: _table, Picture: _picture, Histogram: _histogram}
    lines = [f'<section id="part-{index}">', f"<h2>{_text(section.title)}</h2>"]
    lines += [f"<p>{_words(paragraph)}</p>" for paragraph in section.text]
    lines += [shown[type(part)](part) for part in section.parts]  # type: ignore[operator]
    if section.commands:
        lines.append(_commands(section.commands))
    return "\n".join([*lines, "</section>"])


def _note(note: str) -> str:
    return f'<p class="note">{_words(note)}</p>' if note else ""


def _rows(head: Iterable[str], body: Iterable[str], kind: str = "") -> str:
    columns = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    rows = "\n".join(f"<tr>{cells}</tr>" for cells in body)
    classes = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{classes}><thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _grid(grid: Grid) -> str:
    body = (
        f'<th scope="row">{_text(label)}</th>' + "".join(f"<td>{_video(v) if v else ''}</td>" for v in videos)
        for label, videos in grid.rows
    )
    return _rows(("", *grid.columns), body, "grid") + _note(grid.note)


def _video(video: Video) -> str:
    said = f' aria-label="{_text(video.label)}"' if video.label else ""
    below = f"<figcaption>{_text(video.label)}</figcaption>" if video.label else ""
    if video.mp4 or video.link:
        source = f"data:video/mp4;base64,{base64.b64encode(video.mp4).decode('ascii')}" if video.mp4 else video.link
        kind = "" if 0 < len(video.mp4) < SMALL_FILE else ' class="smooth"'
        if not video.mp4:
            kind += ' preload="metadata"'
        shown = (
            f'<video autoplay loop muted playsinline{kind} width="{video.width}"{said} src="{_text(source)}"></video>'
        )
    else:
        shown = '<div class="lost">no video known</div>'
    # The caption must not be wider than what it speaks of.
    return f'<figure style="width: {video.width}px">{shown}{below}</figure>'


def _table(table: Table) -> str:
    body = (f'<th scope="row">{_cell(row[0])}</th>' + "".join(_data(cell) for cell in row[1:]) for row in table.rows)
    return _rows(table.columns, body) + _note(table.note)


def _data(cell: Cell) -> str:
    if isinstance(cell, Portion):
        return f'<td class="portion" style="--part: {0.8 * cell.value:.2f}">{_cell(cell)}</td>'
    return f"<td>{_cell(cell)}</td>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _words(cell)
    if isinstance(cell, Portion):
        return f"{cell.value:.0%}"
    return f'{number(cell.value)}<span class="interval">{number(cell.low)} to {number(cell.high)}</span>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    below = f"<figcaption>{_text(picture.label)}</figcaption>" if picture.label else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(picture.label)}">'
    return f'<figure class="wide">{image}{below}</figure>'


def _histogram(drawn: Histogram, width: int = 480, height: int = 90) -> str:
    counts, edges = np.histogram(drawn.values, drawn.bins)
    step, most, bars = width / drawn.bins, int(counts.max()), []
    for i, count in enumerate(counts):
        tall = count / most * height
        kind = ' class="harm"' if edges[i + 1] <= 0 else ""
        place = f'x="{i * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        bars.append(f"<rect{kind} {place}></rect>")
    low, high = (f"{edge:+.3g}" for edge in (edges[0], edges[-1]))
    ends = (
        f'<text x="0" y="{height + 14}">{low}</text><text x="{width}" y="{height + 14}" text-anchor="end">{high}</text>'
    )
    box = f'viewBox="0 0 {width} {height + 18}" width="{width}" height="{height + 18}" role="img"'
    below = f"<figcaption>{_text(drawn.label)}</figcaption>" if drawn.label else ""
    said = f' aria-label="{_text(drawn.label)}"' if drawn.label else ""
    return f'<figure class="wide"><svg {box}{said}>{"".join(bars)}{ends}</svg>{below}</figure>'


def _commands(commands: Iterable[Command]) -> str:
    lines = []
    for command in commands:
        took = f"  # {command.seconds:.0f} s" if command.seconds is not None else ""
        lines.append(_text(command.line + took))
    return "<details><summary>Commands that made this</summary><pre>" + "\n".join(lines) + "</pre></details>"
