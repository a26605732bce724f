"""Means and spreads over seeds, as Markdown and JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import muybridge
from muybridge.cli.bench.comparison import FIGURES, Compared, read_compared
from muybridge.cli.bench.methods import Method, Setting
from muybridge.report import number
from muybridge.whole import write_text


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, with n - 1; nan for one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def shown(values: Sequence[float]) -> str:
    """``0.912 ± 0.013``; the mean alone of one seed, and a dash of none."""
    if not values:
        return "–"
    head = number(statistics.fmean(values))
    return head if len(values) == 1 else f"{head} ± {number(spread(values))}"


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
        data = {"about": self.about(), "methods": self.entries()}
        return write_results(root, self.markdown(data), data)

    def entries(self) -> list[dict[str, Any]]:
        """What is known of every method."""
        compared = self.compared()
        return [self.of(method, compared) for method in self.methods]

    def about(self) -> dict[str, Any]:
        """What was run, on what."""
        import torch

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
                seeds[str(one.setting.seed)] = {**summary, "distance": {"value": one.distance(method)}}
        names = [name for name in (*FIGURES, "distance") if seeds]
        values = {name: [seed[name]["value"] for seed in seeds.values()] for name in names}
        return {
            "name": method.name,
            "title": method.title,
            "config": method.config,
            "overrides": list(method.overrides),
            "mean": {name: statistics.fmean(v) for name, v in values.items()},
            "spread": {name: spread(v) if len(v) > 1 else None for name, v in values.items()},
            "seeds": seeds,
        }

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
                " under each seed. docs/proving-ground.md says what the figures are.",
                "",
                *self.lines(data["methods"]),
                "",
            ]
        )

    @staticmethod
    def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
        """A line a method, under a heading."""
        rows = []
        for entry in entries:
            seeds = entry["seeds"].values()
            cells = [shown([seed[name]["value"] for seed in seeds]) for name in (*FIGURES, "distance")]
            rows.append([entry["title"], *cells, str(len(seeds))])
        return table(["method", *FIGURES.values(), "distance", "seeds"], rows)
