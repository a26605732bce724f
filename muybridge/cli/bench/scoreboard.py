"""Means and spreads over seeds, as Markdown and JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

import muybridge
from muybridge.cli.bench.comparison import FIGURES, Compared, read_compared
from muybridge.cli.bench.methods import Method, Setting
from muybridge.metrics.base import mean
from muybridge.proving_ground.scoring import Row
from muybridge.report import number
from muybridge.whole import write_text

COLUMNS = {**FIGURES, "distance": "distance", "seconds": "seconds a clip"}
"""What is known of a method under one seed, and headings."""


PLAIN, ADDED = "dmd", "msm-"
"""A student without motion score matching; how the names of those with it begin."""
CHANGED = ("motion", "law", "law_score", "amount", "smoothness")
"""Figures whose differences between them are shown."""


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, with n - 1; nan for one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def shown(values: Sequence[float]) -> str:
    """``0.912 ± 0.013``; the mean alone of one seed, and a dash of none."""
    if not values:
        return "–"
    head = number(statistics.fmean(values))
    return head if len(values) == 1 else f"{head} ± {number(spread(values))}"


def signed(estimate: Optional[Mapping[str, Any]]) -> str:
    """``+0.120 [+0.020, +0.220]``; a dash where there is none."""
    if estimate is None:
        return "–"
    return f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def write_results(root: Path, markdown: str, data: dict[str, Any]) -> tuple[Path, Path]:
    """``results.md`` for people and ``results.json`` for programs, each whole or not at all."""
    files = root / "results.md", root / "results.json"
    for file, text in zip(files, (markdown, json.dumps(data, indent=2) + "\n"), strict=True):
        write_text(file, text)
    return files


class Scoreboard:
    """What is known so far of some methods under some seeds.

    Args:
        settings: One a seed.
        methods: A line each.
        command: What made it, as typed into a shell.
    """

    def __init__(self, settings: Sequence[Setting], methods: Sequence[Method], command: str) -> None:
        self.settings, self.methods, self.command = list(settings), list(methods), command
        self._floors: dict[int, float] = {}

    def compared(self) -> list[Compared]:
        """The tables of every seed that has real clips already."""
        found = []
        for setting in self.settings:
            if setting.scores(self.methods[0]).is_file():
                compared = read_compared(setting, self.methods, self._floors.get(setting.seed))
                self._floors[setting.seed] = compared.floor
                found.append(compared)
        return found

    def write(self, root: Path) -> tuple[Path, Path]:
        """``results.md`` and ``results.json``."""
        data = {"about": self.about(), "methods": self.entries(), "changes": self.changes()}
        return write_results(root, self.markdown(data), data)

    def entries(self) -> list[dict[str, Any]]:
        """What is known of every method."""
        compared = self.compared()
        return [self.of(method, compared) for method in self.methods]

    def about(self) -> dict[str, Any]:
        """What was run, on what."""
        one = self.settings[0]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "command": self.command,
            "model": one.model,
            "muybridge": muybridge.__version__,
            "torch": torch.__version__,
            "device": gpu or platform.processor() or platform.machine(),
            "updates": one.updates,
            "judged": one.judged,
            "seeds": [setting.seed for setting in self.settings],
        }

    def of(self, method: Method, compared: Sequence[Compared]) -> dict[str, Any]:
        """A method's figures under every seed that is done."""
        seeds = {}
        for one in compared:
            if method.name in one.scores:
                summary = {name: estimate._asdict() for name, estimate in one.scores[method.name].summary.items()}
                seconds = one.setting.seconds(method)
                timed = {} if seconds is None else {"seconds": {"value": seconds}}
                seeds[str(one.setting.seed)] = {**summary, "distance": {"value": one.distance(method)}, **timed}
        values = {name: _values(seeds, name) for name in COLUMNS if _values(seeds, name)}
        return {
            "name": method.name,
            "title": method.title,
            "config": method.config,
            "overrides": list(method.overrides),
            "mean": {name: statistics.fmean(v) for name, v in values.items()},
            "spread": {name: spread(v) if len(v) > 1 else None for name, v in values.items()},
            "seeds": seeds,
        }

    def changes(self) -> list[dict[str, Any]]:
        """What motion score matching changes: differences to the same student without it, clip by clip, over all seeds of both.

        Clips of one caption and one noise are compared, so that what captions and noise do to both is not counted as chance.
        """
        found = []
        compared = self.compared()
        for method in self.methods:
            pairs: list[tuple[Row, Row]] = []
            for one in compared:
                if method.name.startswith(ADDED) and {method.name, PLAIN} <= set(one.scores):
                    rows = (one.scores[name].rows for name in (method.name, PLAIN))
                    pairs += zip(*rows, strict=True)
            if not pairs:
                continue
            if any(a.caption != b.caption for a, b in pairs):
                raise ValueError(f"{method.name} and {PLAIN} were judged on different captions")
            figures = {
                name: mean(torch.tensor([float(getattr(a, name)) - float(getattr(b, name)) for a, b in pairs]))
                for name in CHANGED
            }
            found.append({"name": method.name, "title": method.title, **{k: v._asdict() for k, v in figures.items()}})
        return found

    def markdown(self, data: dict[str, Any]) -> str:
        """The table for people."""
        about = data["about"]
        return "\n".join(
            [
                "# What becomes of motion",
                "",
                f"`{about['command']}`, muybridge {about['muybridge']}, torch {about['torch']}, {about['device']}.",
                "",
                f"Mean ± standard deviation over seeds; {about['judged']} clips and {about['updates']} updates of each method"
                " under each seed. docs/proving-ground.md says what the figures are; seconds are of sampling a clip, starting"
                " included.",
                "",
                *self.lines(data["methods"]),
                "",
                *self._changed(data["changes"]),
            ]
        )

    @staticmethod
    def _changed(changes: Sequence[dict[str, Any]]) -> list[str]:
        """The differences for people, if there are any."""
        if not changes:
            return []
        rows = [
            [entry["title"], *(signed(entry[name]) for name in CHANGED), str(entry["motion"]["clips"])]
            for entry in changes
        ]
        return [
            "What motion score matching changes: differences to DMD alone, clip by clip, with 95 % intervals of their mean:",
            "",
            *table(["", *(FIGURES[name] for name in CHANGED), "clips"], rows),
            "",
        ]

    @staticmethod
    def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
        """A line a method, under a heading."""
        rows = []
        for entry in entries:
            cells = [shown(_values(entry["seeds"], name)) for name in COLUMNS]
            rows.append([entry["title"], *cells, str(len(entry["seeds"]))])
        return table(["method", *COLUMNS.values(), "seeds"], rows)


def _values(seeds: Mapping[str, Mapping[str, Any]], name: str) -> list[float]:
    """A figure under all seeds that have it."""
    return [seed[name]["value"] for seed in seeds.values() if name in seed]
