"""What is known so far of motions taught from single clips: tables as Markdown and JSON, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from muybridge.cli.bench.lessons import WORD, Lesson, claims
from muybridge.cli.bench.methods import Method
from muybridge.cli.bench.scoreboard import Scoreboard, shown, signed, spread, table, write_results
from muybridge.customization.report import save_figure
from muybridge.metrics.base import Estimate, mean
from muybridge.proving_ground.score_files import read_scores
from muybridge.proving_ground.scoring import Row
from muybridge.report import number

FIGURES: dict[str, str] = {
    "motion": "motion",
    "known": "of those the model can make",
    "new": "of those it has never seen",
    "law": "law",
    "prompt": "shape and colour as asked",
    "leak": "leaked look",
    "leak_shape": "leaked shape",
    "leak_colour": "leaked colour",
}
"""Which figures are shown, and their headings."""


def figures(rows: Sequence[Row], known: Sequence[str]) -> dict[str, list[float]]:
    """Every figure's values, one a clip.

    Args:
        rows: The judge's.
        known: Motions that the model can make.
    """
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for row in rows:
        found["motion"].append(float(row.motion))
        found["known" if row.asked_motion in known else "new"].append(float(row.motion))
        found["law"].append(float(row.law))
        found["prompt"].append((row.shape + row.colour) / 2.0)
        leaks = {"leak_shape": row.excess_shape, "leak_colour": row.excess_colour}
        for name, value in leaks.items():
            if value is not None:
                found[name].append(value)
        held = [value for value in leaks.values() if value is not None]
        if held:
            found["leak"].append(statistics.fmean(held))
    return found


class LessonsBoard:
    """The tables of some methods under some seeds.

    Args:
        lessons: Of every seed, all that is taught.
        methods: A line each.
        command: What made it, as typed into a shell.
        probed: What a probe says of the boundary.
    """

    def __init__(
        self,
        lessons: Sequence[Sequence[Lesson]],
        methods: Sequence[Method],
        command: str,
        probed: Optional[dict[str, Any]] = None,
    ) -> None:
        self.probed = probed
        self.lessons, self.methods, self.command = [list(some) for some in lessons], list(methods), command
        self._read: dict[Path, dict[str, list[float]]] = {}

    def read(self, lesson: Lesson, method: Method) -> Optional[dict[str, list[float]]]:
        """One lesson's figures, if they are there."""
        file = lesson.scores(method)
        if file not in self._read and file.is_file():
            self._read[file] = figures(read_scores(file).rows, lesson.world.motions)
        return self._read.get(file)

    def complete(self, method: Method) -> list[list[Lesson]]:
        """Seeds all of whose lessons are judged: means over some of the motions would not compare."""
        return [some for some in self.lessons if all(self.read(lesson, method) is not None for lesson in some)]

    def write(self, root: Path) -> tuple[Path, Path]:
        """``results.md``, ``results.json`` and ``results.png``."""
        data: dict[str, Any] = {
            "about": self.about(),
            "methods": [self.of(method) for method in self.methods],
            "claims": self.claims(),
        }
        self.draw(root / "results.png", data["methods"])
        return write_results(root, self.markdown(data), data)

    def about(self) -> dict[str, Any]:
        """What was run, on what."""
        one = self.lessons[0]
        common = Scoreboard([some[0] for some in self.lessons], self.methods, self.command).about()
        motions = list(dict.fromkeys(lesson.motion for lesson in one))
        return {**common, "motions": motions, "references": len(one) // len(motions), "probe": self.probed}

    def of(self, method: Method) -> dict[str, Any]:
        """A method's figures under every seed that is done."""
        seeds: dict[str, dict[str, Any]] = {}
        for some in self.complete(method):
            pooled: dict[str, list[float]] = {name: [] for name in FIGURES}
            for lesson in some:
                for name, values in (self.read(lesson, method) or {}).items():
                    pooled[name] += values
            seeds[str(some[0].seed)] = {n: mean(torch.tensor(v))._asdict() for n, v in pooled.items() if v}
        means = {n: [seed[n]["value"] for seed in seeds.values() if n in seed] for n in FIGURES}
        return {
            "name": method.name,
            "title": method.title,
            "config": method.config,
            "overrides": list(method.overrides),
            "mean": {name: statistics.fmean(v) for name, v in means.items() if v},
            "spread": {name: spread(v) if len(v) > 1 else None for name, v in means.items() if v},
            "seeds": seeds,
            "by_motion": self.by_motion(method),
        }

    def by_motion(self, method: Method) -> dict[str, float]:
        """Share of the clips of each motion in which it is read, over all seeds that are done."""
        found: dict[str, list[float]] = {}
        for some in self.complete(method):
            for lesson in some:
                found.setdefault(lesson.motion, []).extend((self.read(lesson, method) or {})["motion"])
        return {motion: statistics.fmean(values) for motion, values in found.items()}

    def difference(self, one: Method, other: Method, figure: str) -> Optional[Estimate]:
        """How much more of a figure one has than another: mean over clips that are taught from.

        Seeds teach from the same clips, so a clip's difference is the mean over the seeds that both have done, and counts once.
        """
        pairs: dict[tuple[str, int], list[float]] = {}
        for some in self.complete(one):
            for lesson in some:
                a, b = self.read(lesson, one), self.read(lesson, other)
                if a is not None and b is not None:
                    less = statistics.fmean(a[figure]) - statistics.fmean(b[figure])
                    pairs.setdefault((lesson.motion, lesson.reference), []).append(less)
        return mean(torch.tensor([statistics.fmean(v) for v in pairs.values()])) if len(pairs) > 1 else None

    def claims(self) -> list[dict[str, Any]]:
        """What the papers say, and what is measured."""
        found = []
        for said, one, other in claims(self.methods):
            entry: dict[str, Any] = {"claim": said, "one": one.title, "other": other.title}
            for figure in ("motion", "leak", "prompt"):
                estimate = self.difference(one, other, figure)
                entry[figure] = estimate._asdict() if estimate is not None else None
            found.append(entry)
        return found

    def markdown(self, data: dict[str, Any]) -> str:
        """The tables for people."""
        about, motions = data["about"], data["about"]["motions"]
        rows, by_motion = [], []
        for entry in data["methods"]:
            cells = [shown([s[name]["value"] for s in entry["seeds"].values() if name in s]) for name in FIGURES]
            rows.append([entry["title"], *cells, str(len(entry["seeds"]))])
            shares = entry["by_motion"]
            by_motion.append([entry["title"], *(number(shares[m]) if m in shares else "–" for m in motions)])
        compared = [
            [c["claim"], f"{c['one']} less {c['other']}", *(signed(c[name]) for name in ("motion", "leak", "prompt"))]
            for c in data["claims"]
        ]
        return "\n".join(
            [
                "# One motion from one clip",
                "",
                f"`{about['command']}`, muybridge {about['muybridge']}, torch {about['torch']}, {about['device']}.",
                "",
                f"{len(motions)} motions, {about['references']} clips of each, {about['judged']} new subjects of each clip, "
                f"{about['updates']} updates; every motion is called `{WORD}`, which the model has never seen. Mean ± standard "
                "deviation over seeds. docs/customization.md says what the figures are.",
                "",
                *table(["method", *FIGURES.values(), "seeds"], rows),
                "",
                *_said(about["probe"]),
                "How often each motion is read:",
                "",
                *table(["method", *motions], by_motion),
                "",
                "What the papers say, and the differences that are measured, with 95 % intervals of their mean over clips:",
                "",
                *table(["claim", "difference", "motion", "leaked look", "shape and colour as asked"], compared),
                "",
            ]
        )

    def draw(self, path: Path, entries: Sequence[dict[str, Any]]) -> Path:
        """Motion against leaked look, and against what was asked for; bars are standard deviations over seeds."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(13.0, 4.6), sharey=True)
        for axis, name in zip(axes, ("leak", "prompt"), strict=True):
            for entry in entries:
                if name in entry["mean"]:
                    bars = {k: entry["spread"][n] for k, n in (("xerr", name), ("yerr", "motion"))}
                    axis.errorbar(
                        entry["mean"][name], entry["mean"]["motion"], **bars, fmt="o", capsize=2, label=entry["title"]
                    )
            axis.set(xlabel=FIGURES[name], ylim=(-0.05, 1.05))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("motion read as taught")
        handles, labels = axes[1].get_legend_handles_labels()
        if handles:
            axes[1].legend(handles, labels, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
        return save_figure(figure, path)


def _said(probe: Optional[dict[str, Any]]) -> list[str]:
    """What the probe found, as a paragraph."""
    if probe is None:
        return []
    if probe["tau"] is None:
        return [f"The probe of {probe['clips']} clips finds no boundary: {probe['reason']}.", ""]
    spread = (
        f", with a standard deviation of {probe['spread']:.0f} between clips" if probe["spread"] is not None else ""
    )
    return [f"The probe of {probe['clips']} clips finds τ = {probe['tau']:.0f}{spread}.", ""]
