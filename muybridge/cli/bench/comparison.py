"""What the judge says of several methods, as sections of a report and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datamodules.prompts import read_prompts
from muybridge.cli.bench.methods import Method, Setting
from muybridge.cli.bench.parts import Done
from muybridge.metrics.base import Estimate
from muybridge.proving_ground import motion_of
from muybridge.proving_ground.score_files import read_scores
from muybridge.proving_ground.scoring import Scores, real_scores
from muybridge.report import Cell, Command, Grid, Section, Table, Video

FIGURES: dict[str, str] = {
    "motion": "motion",
    "law": "law",
    "law_score": "fit of the law",
    "colour": "colour",
    "shape": "shape",
    "all": "all three",
    "static": "nothing moves",
    "amount": "amount of motion",
    "smoothness": "smoothness",
}
"""Which figures of the judge are shown, and their headings."""

MEANING = (
    "`motion`, `colour` and `shape`: share of clips in which a reader that was trained on real clips sees what the caption asks "
    "for; `all three` at once. `law`: the law of that motion fits the tracked object best of all, and `fit of the law` says how "
    "well, 0 to 1. `nothing moves`: share of clips that stand still. `amount of motion` is the speed of what moves and "
    "`smoothness` how even it is, both from optical flow: a student that goes stiff loses amount. `distance` is Fréchet's, "
    "between what the motion reader sees in these clips and in real ones; for real clips, between two drawings of the world. "
    "Below each number is its 95 % interval over clips."
)


@dataclass(frozen=True)
class Compared:
    """The judge's tables of one setting.

    Args:
        setting: What the methods share.
        scores: By name of the method; those that are there.
        floor: Distance between two drawings of the world.
    """

    setting: Setting
    scores: Mapping[str, Scores]
    floor: float

    def distance(self, method: Method) -> float:
        """To real clips; of real clips, to others of the same world."""
        return self.scores[method.name].distance(self.scores["real"]) if method.config else self.floor


def read_compared(setting: Setting, methods: Sequence[Method], floor: float | None = None) -> Compared:
    """The tables that are there; one of real clips is among the methods.

    Args:
        setting: What the methods share.
        methods: Which ones.
        floor: Distance between two drawings of the world, where it is known already.
    """
    scores = {m.name: read_scores(setting.scores(m)) for m in methods if setting.scores(m).is_file()}
    if floor is None:
        others = real_scores(setting.world, len(scores["real"].rows), seed=setting.seed + 10**6)
        floor = others.distance(scores["real"])
    return Compared(setting, scores, floor)


def side_by_side(setting: Setting, methods: Sequence[Method], rows: int = 1) -> Grid:
    """A caption of every motion, and each method's clip of it."""
    ids, prompts = read_prompts(str(setting.prompts))
    chosen: list[tuple[str, str]] = []
    for motion in setting.world.motions:
        chosen += [(name, prompt) for name, prompt in zip(ids, prompts, strict=True) if motion_of(prompt) == motion][
            :rows
        ]
    return Grid(
        tuple(method.title for method in methods),
        tuple((prompt, tuple(Video.read(setting.video(m, name)) for m in methods)) for name, prompt in chosen),
        "The same noise in every column of a row but the first.",
    )


def judged(compared: Compared, methods: Sequence[Method]) -> Table:
    """A line a method."""
    rows: list[tuple[Cell, ...]] = []
    for method in methods:
        summary = compared.scores[method.name].summary
        rows.append((method.title, *(summary[name] for name in FIGURES), f"{compared.distance(method):.2f}"))
    count = len(next(iter(compared.scores.values())).rows)
    return Table(("", *FIGURES.values(), "distance"), tuple(rows), f"{count} clips of each. {MEANING}")


def by_motion(compared: Compared, methods: Sequence[Method]) -> Table:
    """How often each motion is read where it was asked for."""
    shares = {m.name: compared.scores[m.name].by_motion() for m in methods}
    empty = Estimate(float("nan"), 0.0, 1.0, 0)
    motions = compared.setting.world.motions
    rows: list[tuple[Cell, ...]] = []
    for motion in motions:
        rows.append((motion, *(shares[m.name].get(motion, empty) for m in methods)))
    return Table(
        ("asked for", *(m.title for m in methods)),
        tuple(rows),
        "Share of clips in which the motion that was asked for is read.",
    )


def commands(done: Mapping[str, Done], *names: str) -> tuple[Command, ...]:
    """What made some parts; a name that ends in a dot means all that begin so."""
    chosen = [
        name
        for wanted in names
        for name in done
        if name == wanted or (wanted.endswith(".") and name.startswith(wanted))
    ]
    return tuple(Command(done[name].command, done[name].seconds) for name in chosen)


def sections(compared: Compared, methods: Sequence[Method], done: Mapping[str, Done]) -> tuple[Section, ...]:
    """Clips to look at, and what the judge says of them."""
    setting = compared.setting
    return (
        Section(
            "Side by side",
            (
                "A sprite moves by one of six laws. Every caption here names a shape in a colour that no training clip has. "
                f"The model that ships makes clips in 50 steps; the students have {setting.updates} iterations of distillation "
                "behind them, which is little: `muybridge bench-motion` runs the same at full strength.",
            ),
            (side_by_side(setting, methods),),
            commands(
                done,
                f"{setting.label}clips",
                *(f"{setting.label}{m.name}.{w}" for m in methods for w in ("fit", "sample")),
            ),
        ),
        Section(
            "What the judge reads",
            (
                "Real clips are the ceiling. The teacher at the students' number of steps is the baseline that distillation has "
                "to beat; it is guided, and so takes twice the network's calls of a student. A student before distillation is "
                "the teacher under the students' sampler and without guidance: what the updates began with.",
            ),
            (judged(compared, methods),),
            commands(done, *(f"{setting.label}{m.name}.judge" for m in methods)),
        ),
        Section("Motion by motion", (), (by_motion(compared, methods),)),
    )
