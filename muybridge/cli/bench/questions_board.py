"""What is known so far of attribution under some seeds, as Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muybridge.attribution.influence import Scores
from muybridge.cli.bench.methods import Method
from muybridge.cli.bench.questions import CAPTIONLESS, LOSSES, STORES, Question
from muybridge.cli.bench.scoreboard import Scoreboard, shown, spread, table, write_results
from muybridge.cli.verbs.attribution_check import markdown as check_tables

Rows = Mapping[str, Mapping[str, float]]
"""By name of a line, by heading."""


class Board:
    """The tables of some questions.

    Args:
        questions: One a seed.
        methods: What is judged.
        command: What made it, as typed into a shell.
    """

    def __init__(self, questions: Sequence[Question], methods: Sequence[Method], command: str) -> None:
        self.questions, self.methods, self.command = list(questions), list(methods), command
        motions = self.questions[0].targets
        self.boards = {
            motion: Scoreboard([q.asked(motion) for q in self.questions], methods, command) for motion in motions
        }
        self._scores: dict[int, dict[str, Scores]] = {}
        self._foretold: dict[int, dict[str, dict[str, float]]] = {}

    def scores(self, question: Question) -> dict[str, Scores]:
        """All scores of a seed, computed once."""
        seed = question.setting.seed
        if seed not in self._scores:
            self._scores[seed] = question.scores()
        return self._scores[seed]

    def foretold(self, question: Question) -> dict[str, dict[str, float]]:
        """What one seed's scores foretell, worked out once: a board is written after every part."""
        seed = question.setting.seed
        if seed not in self._foretold:
            self._foretold[seed] = question.foretold(self.scores(question))
        return self._foretold[seed]

    def attributed(self) -> list[Question]:
        """Those whose gradients are all there."""
        ends = {True: ("", CAPTIONLESS), False: ("",)}
        names = [[f"attribution.{name}{end}" for name in STORES for end in ends[q.captionless]] for q in self.questions]
        return [q for q, parts in zip(self.questions, names, strict=True) if all(_done(q, name) for name in parts)]

    def retrained(self) -> list[Question]:
        """Those whose halves are all trained."""
        halves = [[f"halves.{number:03d}" for number in range(q.subsets)] for q in self.questions]
        ready = self.attributed()
        return [
            q
            for q, names in zip(self.questions, halves, strict=True)
            if names and q in ready and all(_done(q, n) for n in names)
        ]

    def write(self, root: Path) -> tuple[Path, Path]:
        """``results.md`` and ``results.json``."""
        attributed, retrained = self.attributed(), self.retrained()
        checks = self.questions[0].setting.root / "checks"
        data = {
            "about": self.about(),
            "found": gathered([q.found(self.scores(q)) for q in attributed]),
            "foretold": gathered([self.foretold(q) for q in retrained]),
            "given": {motion: board.entries() for motion, board in self.boards.items()},
            "checks": {
                file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(checks.glob("*.json"))
            },
        }
        return write_results(root, self.markdown(data), data)

    def about(self) -> dict[str, Any]:
        """What was run, on what."""
        one = self.questions[0]
        common = next(iter(self.boards.values())).about()
        return {
            **common,
            "candidates": len(one.candidates),
            "queries": len(one.clips) - len(one.candidates),
            "top": one.top,
            "dim": one.dim,
            "subsets": one.subsets,
            "subset_updates": one.subset_updates,
            "learning_rate": one.learning_rate,
        }

    def markdown(self, data: dict[str, Any]) -> str:
        """The tables for people."""
        about = data["about"]
        found = ("same motion", "NDCG of motion", "same shape", "same colour")
        lines = [
            "# Is attribution right?",
            "",
            f"`{about['command']}`, muybridge {about['muybridge']}, torch {about['torch']}, {about['device']}.",
            "",
            "Mean ± standard deviation over seeds. docs/attribution.md says what is asked.",
            "",
            "## What it finds",
            "",
            f"Share of the best {about['top']} of {about['candidates']} clips that show a query's motion, shape or colour, mean "
            f"over {about['queries']} queries.",
            "",
            *rows_of(data["found"], found),
            "",
            "## What it foretells",
            "",
            "Linear datamodelling score: rank correlation of the summed scores of half the clips with a query's loss, negated, "
            f"over {about['subsets']} models trained on halves for {about['subset_updates']} updates; mean over queries.",
            "",
            *rows_of(data["foretold"], tuple(LOSSES.values())),
            "",
            "## What training on it gives",
            "",
            f"{about['updates']} updates each; {about['judged']} clips of each method under each seed. "
            "docs/proving-ground.md says what the figures are.",
        ]
        for motion, entries in data["given"].items():
            lines += ["", f"Clips selected for `{motion}`:", "", *Scoreboard.lines(entries)]
        titles = {
            "projection": "Full and projected gradients, one time and seven",
            "length": "Clips of several lengths",
        }
        for name, measured in data["checks"].items():
            lines += ["", f"## {titles[name]}", "", check_tables(measured)]
        return "\n".join([*lines, ""])


def _done(question: Question, name: str) -> bool:
    return (question.setting.root.parent / "done" / f"{question.setting.label}{name}.json").is_file()


def gathered(seeds: Sequence[Rows]) -> dict[str, dict[str, Any]]:
    """Mean, spread and every seed's value of each line's figures."""
    found: dict[str, dict[str, Any]] = {}
    for name in seeds[0] if seeds else ():
        for heading in seeds[0][name]:
            values = [seed[name][heading] for seed in seeds]
            entry = {
                "mean": statistics.fmean(values),
                "spread": spread(values) if len(values) > 1 else None,
                "seeds": values,
            }
            found.setdefault(name, {})[heading] = entry
    return found


def rows_of(found: Mapping[str, Mapping[str, Any]], headings: Sequence[str]) -> list[str]:
    """The lines of a table."""
    rows = [
        [name, *(shown(entry[heading]["seeds"] if heading in entry else ()) for heading in headings)]
        for name, entry in found.items()
    ]
    return table(["", *headings], rows)
