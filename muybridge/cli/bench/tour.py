"""The demo's other jobs: a motion from one clip, and the training clips that a motion comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from datamodules.prompts import prompt_id
from muybridge.cli.bench.comparison import FIGURES, commands
from muybridge.cli.bench.lessons import other_subjects
from muybridge.cli.bench.methods import TEACHER, Method, Setting, pick
from muybridge.cli.bench.parts import Done, Part
from muybridge.metrics.base import share
from muybridge.proving_ground import MOTIONS, join_caption, look_of, motion_of, split_caption
from muybridge.proving_ground.scene import World, draw_scene
from muybridge.proving_ground.score_files import read_scores
from muybridge.proving_ground.small import as_options
from muybridge.report import Cell, Grid, Section, Table, Video

WAYS = {"base": "as it ships", "customized": "after one clip"}
BRIEF = {name: FIGURES[name] for name in ("motion", "law", "colour", "shape", "all", "static", "amount")}
"""What is told of these jobs, and headings."""
SHIPPED = pick(["teacher-50"])[0]
FINETUNED = Method(
    "finetuned-50",
    "finetuned on the selection, 50 steps",
    TEACHER,
    ("--trainer.limit_val_batches=0", "--data.num_workers=0"),
    trained=True,
    forwards=100,
)


@dataclass(frozen=True)
class Customization:
    """Teach the model a motion that it does not know, from one clip.

    Args:
        setting: The model, the world, the folder.
        motion: One that is not in the model's world.
        updates: Of training.
        tau: Time from which on the adapter acts.
        rank: Of the adapter, which sits on all four projections: a motion that was never seen needs more than a known one.
        learning_rate: Of AdamW.
        count: New subjects to show it on.
    """

    setting: Setting
    motion: str = "roll"
    updates: int = 300
    tau: float = 300.0
    rank: int = 8
    learning_rate: float = 5e-3
    count: int = 12

    @property
    def root(self) -> Path:
        """Where all of it goes."""
        return self.setting.root / "customization"

    @cached_property
    def world(self) -> World:
        """Where the clip is from."""
        assert self.motion in MOTIONS
        return replace(self.setting.world, motions=(self.motion,))

    @cached_property
    def caption(self) -> str:
        """Of the clip."""
        return draw_scene(self.world, self.setting.seed, 0).caption

    @cached_property
    def wanted(self) -> list[str]:
        """The same motion of subjects that share neither shape nor colour with the clip's; spread over both."""
        how = split_caption(self.caption)[1]
        return [join_caption(subject, how) for subject in other_subjects(self.world, self.caption, self.count)]

    def name(self, index: int, way: str) -> str:
        """Of a video, as `muybridge customize` calls it."""
        return f"{prompt_id(index, self.wanted[index])}-0-{way}"

    def write_prompts(self) -> None:
        """What is asked for, for those who make videos and for those who judge them."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "prompts.txt").write_text("".join(f"{p}\n" for p in self.wanted[1:]), encoding="utf-8")
        for way in WAYS:
            lines = [{"id": self.name(i, way), "prompt": prompt} for i, prompt in enumerate(self.wanted)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (self.root / f"{way}.jsonl").write_text(text, encoding="utf-8")

    def parts(self) -> list[Part]:
        """Draw the clip, train and sample, judge both."""
        s, clip = self.setting, self.root / "reference/clips/000000.mp4"
        draw = [
            "proving-ground",
            "--clips=1",
            "--validation=0.0",
            f"--seed={s.seed}",
            f"--out={self.root / 'reference'}",
        ]
        teach = [
            "customize",
            f"--model={s.model}",
            f"--reference={clip}",
            f"--caption={self.caption}",
            f"--prompt={self.wanted[0]}",
            f"--prompts={self.root / 'prompts.txt'}",
            f"--out={self.root / 'result'}",
            f"--tau={self.tau:g}",
            f"--updates={self.updates}",
            f"--rank={self.rank}",
            '--projections=["q", "k", "v", "o"]',
            f"--learning_rate={self.learning_rate:g}",
            f"--frames={s.world.frames}",
            f"--height={s.world.size}",
            f"--width={s.world.size}",
            "--steps=20",
            "--guidance=3.0",
            "--keep_bar=true",
            f"--seed={s.seed}",
        ]
        judge = [
            Part(
                f"customization.{way}.judge",
                f"customization, {title}: judged",
                (
                    "judge",
                    f"--videos={self.root / 'result/videos'}",
                    f"--prompts={self.root / f'{way}.jsonl'}",
                    f"--reference={self.caption}",
                    f"--out={self.root / f'{way}.json'}",
                ),
                0.06 * len(self.wanted),
            )
            for way, title in WAYS.items()
        ]
        weight = 10.0 + 0.1 * self.updates + 5.0 * len(self.wanted)
        return [
            Part(
                "customization.clip",
                "one clip of a motion that the model does not know",
                (*draw, *as_options(self.world)),
                1.0,
            ),
            Part(
                "customization.teach",
                f"customization: {self.updates} updates on that clip, then videos",
                tuple(teach),
                weight,
            ),
            *judge,
        ]

    def section(self, done: Mapping[str, Done]) -> Section:
        """Reference, before and after."""
        videos = self.root / "result/videos"
        reference = Video.read(videos / "reference.mp4")
        rows = [
            (prompt, (reference, *(Video.read(videos / f"{self.name(i, way)}.mp4") for way in WAYS)))
            for i, prompt in enumerate(self.wanted[:6])
        ]
        leaks = {"leak_shape": "the reference's shape", "leak_colour": "the reference's colour"}
        lines: list[tuple[Cell, ...]] = []
        for way, title in WAYS.items():
            summary = read_scores(self.root / f"{way}.json").summary
            lines.append((title, *(summary[name] for name in (*BRIEF, *leaks))))
        note = (
            f"{len(self.wanted)} clips of each; the last two columns are leakage: the look of the clip that was taught."
        )
        return Section(
            "One motion from one clip",
            (
                f"The model has never seen anything that is asked to `{self.motion}`. An adapter learns it from one clip, "
                f"`{self.caption}`, in {self.updates} updates, and is asked for it with other subjects.",
            ),
            (
                Grid(("the one clip", *WAYS.values()), tuple(rows), "The same noise in both columns of a row."),
                Table(("", *BRIEF.values(), *leaks.values()), tuple(lines), note),
            ),
            commands(done, "customization."),
        )


@dataclass(frozen=True)
class Selected(Setting):
    """The same clips, of which those that were selected are trained on."""

    @property
    def attribution(self) -> Attribution:
        """What selects them."""
        return Attribution(self)

    @property
    def pace(self) -> float:
        return 0.5

    def needs(self, method: Method) -> tuple[str, ...]:
        return (*super().needs(method), self.attribution.named("select"))

    def data(self, method: Method) -> list[str]:
        chosen = self.attribution
        return [*super().data(method), f"--data.cache={chosen.root / 'cache'}", f"--data.selection={chosen.selection}"]


@dataclass(frozen=True)
class Attribution:
    """Which training clips a query's motion comes from.

    Args:
        setting: The model, the world, the folder.
        top: Clips of each query that are looked at.
    """

    setting: Setting
    top: int = 10

    @property
    def root(self) -> Path:
        """Where all of it goes."""
        return self.setting.root / "attribution"

    @property
    def selection(self) -> Path:
        """The clips that help most."""
        return self.root / "selection.parquet"

    @property
    def selected(self) -> Selected:
        """Where the model is trained on these."""
        return Selected(**{field.name: getattr(self.setting, field.name) for field in fields(Setting)})

    def table(self, part: str) -> Path:
        """The clips of ``train``, which are the candidates, or of ``validation``, which are the queries."""
        return self.setting.folder / f"{part}.parquet"

    @property
    def common(self) -> list[str]:
        """What follows every verb that takes the clips."""
        s = self.setting
        return [
            "-c",
            TEACHER,
            f"--seed_everything={s.seed}",
            f"--model.backbone.path={s.model}",
            "--data=VideoData",
            f"--data.videos={self.table('train')}",
            f"--data.validation={self.table('validation')}",
            f"--data.frames={s.world.frames}",
            f"--data.height={s.world.size}",
            f"--data.width={s.world.size}",
            "--data.batch_size=16",
            "--data.num_workers=0",
        ]

    def cache(self) -> Part:
        """Latents, texts and motion weights."""
        return Part(
            f"{self.setting.label}attribution.cache",
            "attribution: clips encoded, with weights where they move",
            ("cache", *self.common, f"--out={self.root / 'cache'}", "--motion=DIS"),
            5.0 + 0.14 * self.setting.clips,
            needs=(self.setting.draw().name,),
        )

    def named(self, store: str) -> str:
        """The part that makes a store, or ``select``."""
        return f"{self.setting.label}attribution.{'gradients' if store == 'store' else store}"

    def gradients(self, store: str = "store", what: str = "", more: Sequence[str] = ()) -> Part:
        """Projected gradients of all clips.

        Args:
            store: Its folder, and the end of the part's name.
            what: Said of them.
            more: Further options.
        """
        capture = [
            f"--data.cache={self.root / 'cache'}",
            "--data.motion_weights=true",
            "--trainer.callbacks+=GradientCapture",
            f"--trainer.callbacks.out={self.root / store}",
        ]
        return Part(
            self.named(store),
            f"attribution: projected gradients of {self.setting.clips} clips{what}",
            ("attribute", *self.common, *capture, *more),
            5.0 + 0.1 * self.setting.clips,
            needs=(self.cache().name,),
        )

    def parts(self) -> list[Part]:
        """Cache clips with their motion weights, project gradients, select, finetune on what is selected."""
        select = [
            f"--store={self.root / 'store'}",
            "--top=20%",
            f"--videos={self.table('train')}",
            f"--query_videos={self.table('validation')}",
            f"--out={self.selection}",
            f"--report={self.root / 'report.html'}",
        ]
        needs = (self.gradients().name,)
        chosen = Part(self.named("select"), "attribution: the clips that help most", ("select", *select), 3.0, needs)
        return [self.cache(), self.gradients(), chosen, *self.selected.parts(FINETUNED)]

    def section(self, done: Mapping[str, Done]) -> Section:
        """Queries beside what helps them most, and how often that shows the same motion or look."""
        from muybridge.attribution.influence import influence
        from muybridge.attribution.store import InfluenceStore
        from muybridge.data.sources import list_clips

        scores = influence(InfluenceStore(self.root / "store"))
        known = {
            clip.id: (clip.caption or "", clip.path)
            for part in ("train", "validation")
            for clip in list_clips(self.setting.folder / f"{part}.parquet")
        }
        order = (-scores.values).argsort(axis=0, kind="stable")[: self.top]
        best = {q: [scores.ids[i] for i in order[:, column]] for column, q in enumerate(scores.queries)}
        same = {
            "motion": lambda a, b: motion_of(a) == motion_of(b),
            "shape": lambda a, b: look_of(a)[0] == look_of(b)[0],
            "colour": lambda a, b: look_of(a)[1] == look_of(b)[1],
        }
        rows: list[tuple[Cell, ...]] = []
        for name, alike in same.items():
            top = [alike(known[q][0], known[i][0]) for q, ids in best.items() for i in ids]
            everything = [alike(known[q][0], known[i][0]) for q in scores.queries for i in scores.ids]
            rows.append((f"same {name}", share(sum(top), len(top)), share(sum(everything), len(everything))))
        shown = []
        for motion in self.setting.world.motions:
            query = next((q for q in scores.queries if motion_of(known[q][0]) == motion), None)
            if query is not None:
                clips = [(known[i][0], known[i][1]) for i in best[query][:4]]
                row = (Video.read(known[query][1]), *(Video.read(path, caption) for caption, path in clips))
                shown.append((known[query][0], row))
        return Section(
            "Where a motion comes from",
            (
                "The gradient of the loss where a clip moves, projected to 4096 numbers, for each training clip and each held-out"
                " query. Clips whose gradients point the same way as a query's would help it most. `muybridge select` turns this "
                f"into a selection to train on, and writes a page of its own: `{self.root / 'report.html'}`.",
            ),
            (
                Grid(("the query", "helps most", "second", "third", "fourth"), tuple(shown)),
                Table(
                    ("", f"among the {self.top} that help most", "among all training clips"),
                    tuple(rows),
                    f"{len(scores.queries)} queries, {len(scores.ids)} training clips; none has a query's pair of shape and"
                    " colour. Intervals take each pair for itself, and so are somewhat narrow.",
                ),
                self.outcome(),
            ),
            commands(done, "attribution.", f"{FINETUNED.name}."),
        )

    def outcome(self) -> Table:
        """What the judge reads before and after training on the selection; captions and noise are the same."""
        rows: list[tuple[Cell, ...]] = []
        for method in (SHIPPED, FINETUNED):
            summary = read_scores(self.setting.scores(method)).summary
            rows.append((method.title, *(summary[name] for name in BRIEF)))
        note = (
            f"{self.setting.judged} clips of each, {self.setting.updates} updates on the selection, which is for all queries."
            " The model knows these motions: `muybridge bench-attribution` selects for one that it does not, against controls."
        )
        return Table(("", *BRIEF.values()), tuple(rows), note)
