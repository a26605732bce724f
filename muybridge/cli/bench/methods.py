"""Ways to make clips of given captions: what the demo and the benchmark compare.

A method is a config and what is changed in it. Nothing else is said of any: all are trained, sampled and judged by the same
lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muybridge.cli.bench.parts import Part, read_done
from muybridge.errors import UsageError, did_you_mean
from muybridge.proving_ground.scene import World
from muybridge.proving_ground.small import SMALL, as_options


@dataclass(frozen=True)
class Method:
    """One way to make clips.

    Args:
        name: In files and on the command line.
        title: In tables.
        config: What makes the clips; those of the world itself where there is none.
        overrides: Options on top of the config.
        trained: Whether it is trained first.
        base: The option that says which model it begins with.
        forwards: Forward passes of one clip, to tell how long sampling takes.
    """

    name: str
    title: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    trained: bool = False
    base: str = "--model.backbone.path"
    forwards: int = 8


TEACHER, STUDENT = "proving_ground/finetune.yaml", "proving_ground/distill.yaml"

FEW_STEPS = ("--model.sampling.steps=[1000, 900, 750, 500]", "--model.sampling.guidance=1.0")
"""How students of the config are sampled."""


def distilled(name: str, title: str, overrides: tuple[str, ...] = ()) -> Method:
    """A student of four steps."""
    return Method(name, title, STUDENT, overrides, True, "--model.teacher.path", forwards=4)


def motion_score(weight: float, normalizer: str) -> tuple[str, ...]:
    """Motion score matching beside what the config has."""
    return (
        "--model.losses+=MotionScoreMatching",
        f"--model.losses.weight={weight}",
        f"--model.losses.normalizer={normalizer}",
    )


METHODS: tuple[Method, ...] = (
    Method("real", "real clips"),
    Method("teacher-50", "teacher, 50 steps", TEACHER, forwards=100),
    Method("teacher-4", "teacher, 4 steps", TEACHER, ("--model.sampling.steps=4",)),
    Method("teacher-2", "teacher, 2 steps", TEACHER, ("--model.sampling.steps=2",), forwards=4),
    Method("undistilled", "student before distillation, 4 steps", TEACHER, FEW_STEPS, forwards=4),
    Method("finetuned-4", "finetuned teacher, 4 steps", TEACHER, ("--model.sampling.steps=4",), trained=True),
    distilled("dmd", "DMD, 4 steps"),
    *(
        distilled(f"msm-{kind}-{weight:g}", f"DMD + MSM (λ = {weight:g}, {kind}), 4 steps", motion_score(weight, kind))
        for kind in ("shared", "own")
        for weight in (0.5, 1.0, 2.0)
    ),
)
"""What is compared."""


def pick(names: Sequence[str], methods: Sequence[Method] = METHODS) -> tuple[Method, ...]:
    """Some of them, in the order of the list."""
    known = [method.name for method in methods]
    for name in names:
        if name not in known:
            raise UsageError(f"no method {name!r}", f"some of {', '.join(known)}", did_you_mean(name, known))
    if not names or len(set(names)) < len(names):
        raise UsageError(f"methods are {list(names)}", f"some of {', '.join(known)}, each once")
    return tuple(method for method in methods if method.name in names)


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Args:
        root: The folder of one seed.
        model: The pipeline that methods begin with.
        world: Where the clips are from.
        clips: How many clips there are.
        validation: Share of them whose captions are sampled and judged; their looks are in no training clip.
        updates: Of training, as ``trainer.max_steps`` counts them.
        label: Goes before the names of parts.
        seed: Of clips, training and samples.
        batch_size: Videos made together.
    """

    root: Path
    model: str
    world: World
    clips: int
    validation: float
    updates: int
    label: str = ""
    seed: int = 0
    batch_size: int = 16

    @property
    def work(self) -> Path:
        """The folder of the whole comparison, in which ``label`` is this one's."""
        return self.root.parents[len(Path(self.label).parts) - 1] if self.label else self.root

    @property
    def folder(self) -> Path:
        """Where the clips are."""
        return self.root / "clips"

    @property
    def prompts(self) -> Path:
        """What is sampled and judged."""
        return self.folder / "validation_prompts.jsonl"

    @property
    def judged(self) -> int:
        """About how many clips are judged of each method."""
        return round(self.clips * self.validation)

    @property
    def truth(self) -> Path:
        """What videos are judged by."""
        return self.prompts

    @property
    def judging(self) -> list[str]:
        """Further options of the judge of videos."""
        return []

    @property
    def pace(self) -> float:
        """Seconds of one update, as far as that is known."""
        return 1.2

    def asked(self, method: Method) -> Path:
        """The prompts that a method is given."""
        return self.prompts

    def scores(self, method: Method) -> Path:
        """Where the judge's table of a method is."""
        return self.root / method.name / "scores.json"

    def video(self, method: Method, name: str) -> Path:
        """Where a method's clip is."""
        return (self.root / method.name / "videos" if method.config else self.folder) / f"{name}.mp4"

    def options(self, method: Method) -> list[str]:
        """What follows every verb that runs a method's config."""
        options = [
            "-c",
            method.config,
            f"--seed_everything={self.seed}",
            f"{method.base}={self.model}",
            *method.overrides,
        ]
        if method.trained:
            run = self.root / method.name / "run"
            options += [f"--trainer.default_root_dir={run}", f"--model.seed={self.seed}", *self.data(method)]
        return options

    def data(self, method: Method) -> list[str]:
        """Where training finds clips, or prompts."""
        if method.base == "--model.teacher.path":
            return [f"--data.prompts={self.folder / 'train_prompts.jsonl'}"]
        return [
            f"--data.folder={self.folder}",
            f"--data.clips={self.clips}",
            f"--data.validation_share={self.validation}",
            f"--data.world_seed={self.seed}",
            # The configs speak of the model's own world.
            *as_options(self.world, SMALL, "--data."),
        ]

    def needs(self, method: Method) -> tuple[str, ...]:
        """Names of the parts that a method's first part reads from."""
        return (self.draw().name,)

    def seconds(self, method: Method) -> float | None:
        """That sampling a clip took, with its share of starting; None where nothing was sampled."""
        sampled = [part for part in self.parts(method) if part.name == f"{self.label}{method.name}.sample"]
        done = read_done(self.work, sampled[0]) if sampled else None
        return None if done is None else done.seconds / self.judged

    def draw(self) -> Part:
        """The clips."""
        return Part(
            f"{self.label}clips",
            f"{self.clips} clips, {self.judged} of them with looks that no training clip has",
            (
                "proving-ground",
                f"--clips={self.clips}",
                f"--validation={self.validation}",
                f"--seed={self.seed}",
                f"--out={self.folder}",
                *as_options(self.world),
            ),
            0.01 * self.clips,
            needs=(),
        )

    def parts(self, method: Method) -> list[Part]:
        """Train, sample, judge."""
        here, options, parts = self.root / method.name, self.options(method), []
        needs = self.needs(method)
        if method.trained:
            arguments = ("fit", *options, f"--trainer.max_steps={self.updates}", "--ckpt_path=last")
            parts.append(
                Part(
                    f"{self.label}{method.name}.fit",
                    f"{method.title}: {self.updates} updates",
                    arguments,
                    8.0 + self.pace * self.updates,
                    needs,
                )
            )
            needs = (parts[-1].name,)
        judged = ["judge", f"--videos={self.folder / 'validation.parquet'}"]
        if method.config:
            last = ["--ckpt_path=last"] if method.trained else []
            where = [f"--prompts={self.asked(method)}", f"--out={here / 'videos'}"]
            more = [f"--seed={self.seed}", f"--batch_size={self.batch_size}"]
            parts.append(
                Part(
                    f"{self.label}{method.name}.sample",
                    f"{method.title}: {self.judged} videos",
                    ("sample", *options, *last, *where, *more),
                    4.0 + 0.008 * method.forwards * self.judged,
                    needs,
                )
            )
            needs = (parts[-1].name,)
            judged = ["judge", f"--videos={here / 'videos'}", f"--prompts={self.truth}", *self.judging]
        parts.append(
            Part(
                f"{self.label}{method.name}.judge",
                f"{method.title}: judged",
                (*judged, f"--out={self.scores(method)}"),
                0.06 * self.judged,
                needs,
            )
        )
        return parts
