"""Is attribution right, on clips whose motion is known? What it finds, what it foretells, and what training on it gives.

The clips have motions that the model knows and motions that it does not. Queries are held-out clips, whose pair of shape and
colour no training clip has. A clip that a query's motion comes from should show the same motion: that is what attribution
*finds*. What it *foretells* is held against models that were really trained on halves of the clips. And a model that is trained
on clips that were selected for one motion should make that motion better than one trained on others: what it *gives*.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from muybridge.attribution.checks import datamodelling, ndcg, precision, shuffled
from muybridge.attribution.influence import Scores, influence, sweep
from muybridge.attribution.selecting import how_many, rank, similarity
from muybridge.attribution.store import InfluenceStore
from muybridge.cli.bench.methods import TEACHER, Method, Setting
from muybridge.cli.bench.parts import Part
from muybridge.cli.bench.tour import Attribution
from muybridge.data.cache import Cache
from muybridge.errors import UsageError
from muybridge.proving_ground.files import row, scenes
from muybridge.proving_ground.scene import Scene
from muybridge.whole import write_text

STORES: dict[str, tuple[str, tuple[str, ...]]] = {
    "motion": (", where they move", ()),
    "whole": (
        ", of the whole clip",
        ("--trainer.callbacks.loss=MotionWeightedDenoising", "--trainer.callbacks.loss.weights=ones"),
    ),
}
"""What gradients are taken of, and how that is said."""
CAPTIONLESS = "-captionless"
"""The same without captions: words name the motion, so that a gradient may have read rather than seen it."""
LOSSES = {"Denoising": "loss", "MotionWeightedDenoising": "loss where it moves"}
"""What is measured of a query under a model that was trained on a half of the clips, and headings."""
WEIGHTED = "motion-weighted attribution"
BY_CHANCE = f"{WEIGHTED}, clips shuffled: 95 of 100 draws are below"
"""How well scores foretell that know nothing of the clips."""
DAMPINGS = (0.1, 1.0, 10.0, 100.0)
SHOWN_DAMPING = 10.0
"""What `muybridge select` takes by itself; what a kernel finds is shown under this one."""
SELECTED = {
    "random": "{top} by chance",
    "magnitude": "{top} that move most",
    "similarity": "{top} that look most alike",
    "whole": "{top} by whole-video attribution",
    "motion": "{top} by motion-weighted attribution",
}
"""Ways to select clips for a motion, and their titles."""
LENGTHS = (9, 13, 17)
"""Frames of the clips by which the bias of length is measured."""


def methods(top: str, learning_rate: float) -> tuple[Method, ...]:
    """What is judged of each motion: the model as it ships, and finetuned on selections of one size, or on all clips."""
    sampled = ("--model.sampling.steps=20",)
    quick = ("--trainer.limit_val_batches=0", "--data.num_workers=0")
    trained = (*sampled, f"--model.optimizer.init_args.lr={learning_rate:g}", *quick)
    titles = {name: f"trained on the {title.format(top=top)}" for name, title in SELECTED.items()}
    return (
        Method("real", "real clips"),
        Method("base", "as it ships", TEACHER, sampled, forwards=40),
        *(Method(n, title, TEACHER, trained, True, forwards=40) for n, title in titles.items()),
        Method("full", "trained on all clips", TEACHER, trained, True, forwards=40),
    )


@dataclass(frozen=True)
class Asked(Setting):
    """One motion: captions of it that are sampled and judged, and the clips that are selected for it among another setting's.

    Args:
        source: Where the training clips are.
    """

    source: Setting | None = None

    @property
    def candidates(self) -> Setting:
        """Where the training clips are."""
        assert self.source is not None
        return self.source

    @property
    def pace(self) -> float:
        """Seconds of one update from cached latents."""
        return 0.5

    def selection(self, name: str) -> Path:
        """Where the clips of a way to select are listed."""
        return self.root / "selections" / f"{name}.parquet"

    def needs(self, method: Method) -> tuple[str, ...]:
        cached = (Attribution(self.candidates).cache().name,) if method.trained else ()
        chosen = (self.choosing(method.name),) if method.name in SELECTED else ()
        return (*super().needs(method), *cached, *chosen)

    def choosing(self, name: str) -> str:
        """The part that selects."""
        return f"{self.label}{name}.select"

    def data(self, method: Method) -> list[str]:
        cache = Attribution(self.candidates).root / "cache"
        chosen = [f"--data.selection={self.selection(method.name)}"] if method.name in SELECTED else []
        return [*self.candidates.data(method), f"--data.cache={cache}", *chosen]


@dataclass(frozen=True)
class Question:
    """What is asked of attribution under one seed.

    Args:
        setting: The model; all clips, the training clips of which are candidates and the validation clips queries.
        targets: Motions to train for.
        top: How many clips are selected.
        prompts: Captions of each motion that are sampled and judged.
        subsets: Models that are trained on halves of the clips.
        subset_updates: Updates of each of them.
        learning_rate: Of all training.
        compared: Clips whose full gradients are compared with projected ones; none leaves that out.
        dim: Numbers of a projected gradient.
        captionless: Whether gradients are taken without captions too.
    """

    setting: Setting
    targets: tuple[str, ...]
    top: str
    prompts: int
    subsets: int
    subset_updates: int
    learning_rate: float
    compared: int
    dim: int = 4096
    captionless: bool = True

    @property
    def attribution(self) -> Attribution:
        """Caches and stores of the clips."""
        return Attribution(self.setting)

    @cached_property
    def clips(self) -> dict[str, Scene]:
        """All clips by their id, before any is drawn."""
        s = self.setting
        return {row(scene)["id"]: scene for scene in scenes(s.world, s.clips, s.seed, s.validation)}

    @cached_property
    def candidates(self) -> list[str]:
        """Ids of the training clips."""
        return [name for name, scene in self.clips.items() if not scene.appearance.held_out]

    def queries(self, motion: str) -> list[str]:
        """Ids of the queries that show a motion."""
        return [n for n, scene in self.clips.items() if scene.appearance.held_out and scene.motion == motion]

    def asked(self, motion: str) -> Asked:
        """The setting of one motion."""
        s = self.setting
        return Asked(
            root=s.root / motion.replace(" ", "-"),
            model=s.model,
            world=replace(s.world, motions=(motion,)),
            clips=2 * self.prompts,
            validation=0.5,
            updates=s.updates,
            label=f"{s.label}{motion.replace(' ', '-')}/",
            seed=s.seed,
            source=s,
        )

    # -- halves ----------------------------------------------------------------------------------------------------

    def half(self, number: int) -> list[str]:
        """Ids of the clips that a model is trained on."""
        drawn = np.random.default_rng([self.setting.seed, number]).permutation(len(self.candidates))
        return [self.candidates[i] for i in sorted(drawn[: len(drawn) // 2])]

    def folder(self, number: int) -> Path:
        """Where a half's files are."""
        return self.setting.root / "halves" / f"{number:03d}"

    def write_halves(self) -> None:
        """Lists of the clips of each half, for training to read."""
        for number in range(self.subsets):
            write_text(self.folder(number) / "clips.txt", "".join(f"{name}\n" for name in self.half(number)))

    # -- parts -----------------------------------------------------------------------------------------------------

    def stores(self) -> list[Part]:
        """Clips, caches and gradients."""
        found = [self.setting.draw(), self.attribution.cache()]
        projection = ["--trainer.callbacks.projection=FastfoodProjection"]
        projection += [f"--trainer.callbacks.projection.dim={self.dim}"]
        for name, (what, loss) in STORES.items():
            more = [*loss, *projection]
            found.append(self.attribution.gradients(name, what, more))
            without = [*more, "--trainer.callbacks.captions=false"]
            if self.captionless:
                found.append(self.attribution.gradients(f"{name}{CAPTIONLESS}", f"{what}, without captions", without))
        return found

    def trained_half(self, number: int) -> Part:
        """Train on a half, and measure each query's losses."""
        s, here = self.setting, self.folder(number)
        watch = {"class_path": "ClipLosses", "init_args": {"out": str(here / "losses.parquet")}}
        watch["init_args"]["losses"] = [{"class_path": name} for name in LOSSES]  # type: ignore[index]
        arguments = (
            "fit",
            "-c",
            TEACHER,
            f"--seed_everything={s.seed}",
            f"--model.backbone.path={s.model}",
            f"--model.optimizer.init_args.lr={self.learning_rate:g}",
            f"--model.seed={s.seed}",
            f"--trainer.default_root_dir={here}",
            f"--trainer.callbacks={json.dumps([watch])}",
            "--trainer.enable_checkpointing=false",
            "--trainer.limit_val_batches=0",
            f"--trainer.max_steps={self.subset_updates}",
            *s.data(Method("half", "")),
            f"--data.cache={self.attribution.root / 'cache'}",
            "--data.motion_weights=true",
            "--data.num_workers=0",
            f"--data.selection={here / 'clips.txt'}",
        )
        return Part(
            f"{s.label}halves.{number:03d}",
            f"a model trained on half of the clips, number {number + 1} of {self.subsets}",
            arguments,
            8.0 + 0.5 * self.subset_updates,
            needs=(self.attribution.cache().name,),
        )

    def selected(self, motion: str, name: str) -> Part:
        """Select clips for a motion."""
        cache, asked = self.attribution.root / "cache", self.asked(motion)
        how = {
            "random": ["--by=random", f"--seed={self.setting.seed}"],
            "magnitude": ["--by=motion", f"--cache={cache}"],
            "similarity": ["--by=similarity", f"--cache={cache}", f"--query_cache={cache / 'validation'}"],
        }
        store = name if name in STORES else "motion"
        arguments = (
            "select",
            f"--store={self.attribution.root / store}",
            f"--query={json.dumps(self.queries(motion))}",
            f"--top={self.top}",
            *how.get(name, []),
            f"--out={asked.selection(name)}",
            "--report=",
        )
        what = f"the {SELECTED[name].format(top=self.top)} are selected for {motion}"
        return Part(asked.choosing(name), what, arguments, 2.0, (self.attribution.named(store),))

    def outcome(self, motion: str, chosen: Sequence[Method]) -> list[Part]:
        """Select for a motion, train, sample and judge."""
        asked = self.asked(motion)
        found = [asked.draw(), *(self.selected(motion, m.name) for m in chosen if m.name in SELECTED)]
        return [*found, *(part for method in chosen for part in asked.parts(method))]

    def checks(self) -> list[Part]:
        """What projection, one time and length do to scores."""
        if not self.compared:
            return []
        s, root, here = self.setting, self.attribution.root, Attribution(self.longer())
        capture = ["--trainer.callbacks+=GradientCapture"]
        cached = [f"--data.cache={root / 'cache'}", "--data.motion_weights=true", *capture]
        common = [option for option in here.common if not option.startswith(("--data.frames", "--data.validation"))]
        sizes = [{"frames": f, "height": s.world.size, "width": s.world.size} for f in LENGTHS]
        _, whole = STORES["whole"]
        lengths = [f"--data.buckets={json.dumps(sizes)}", *capture, *whole, "--dims=[]", "--times=0"]
        count, out = f"--clips={self.compared}", s.root / "checks"
        return [
            Part(
                f"{s.label}checks.projection",
                f"full gradients of {self.compared} clips against projected ones, and one time against seven",
                ("attribution-check", *self.attribution.common, *cached, count, f"--out={out / 'projection.md'}"),
                20.0 + 1.5 * self.compared,
                (self.attribution.cache().name,),
            ),
            self.longer().draw(),
            Part(
                f"{s.label}checks.length",
                f"the bias of length, over clips of {', '.join(str(f) for f in LENGTHS)} frames",
                ("attribution-check", *common, *lengths, count, f"--out={out / 'length.md'}"),
                10.0 + 0.3 * self.compared,
                (self.longer().draw().name,),
            ),
        ]

    def longer(self) -> Setting:
        """Clips of several lengths."""
        s = self.setting
        world = replace(s.world, frames=LENGTHS[0], longest=LENGTHS[-1])
        return replace(
            s, root=s.root / "lengths", label=f"{s.label}lengths/", world=world, clips=self.compared, validation=0.0
        )

    # -- what comes out --------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, Scores]:
        """Scores of every kind, and the controls, for all queries; of the same clips and queries each."""
        found: dict[str, Scores] = {}
        for name in STORES:
            store = InfluenceStore(self.attribution.root / name)
            said = WEIGHTED if name == "motion" else "whole-video attribution"
            found[said] = influence(store)
            found[f"{said}, centred"] = influence(store, centre=True)
            for damping, scores in zip(DAMPINGS, sweep(store, dampings=DAMPINGS), strict=True):
                found[f"{said}, kernel λ = {damping:g}"] = scores
            if self.captionless:
                found[f"{said}, without captions"] = influence(InfluenceStore(f"{store.path}{CAPTIONLESS}"))
        one = next(iter(found.values()))
        if any((s.ids, s.queries) != (one.ids, one.queries) for s in found.values()):
            raise UsageError(
                f"the stores of {self.attribution.root} hold different clips", "usable gradients of every clip in all"
            )
        return {**self.controls(one), **found}

    def controls(self, like: Scores) -> dict[str, Scores]:
        """What needs no gradient: chance, how much a clip moves, and how alike latents are."""
        cache = self.attribution.root / "cache"
        held, asked = Cache(cache), Cache(cache / "validation")
        clips = [(name, held.latents.read(name)["latents"].float().numpy()) for name in like.ids]
        moves = held.motion("mean")

        def scores(values: np.ndarray) -> Scores:
            return replace(like, values=np.broadcast_to(values, like.values.shape))

        alike = [similarity(clips, [asked.latents.read(q)["latents"].float().numpy()]) for q in like.queries]
        draws = rank(like, "random", seed=self.setting.seed)
        drawn = dict(zip(draws.ids, draws.columns["draw"], strict=True))
        return {
            "chance": scores(np.array([[drawn[name]] for name in like.ids])),
            "amount of motion": scores(np.array([[moves[name]] for name in like.ids])),
            "likeness of latents": scores(np.array([[one[name] for one in alike] for name in like.ids])),
        }

    def found(self, scores: dict[str, Scores]) -> dict[str, dict[str, float]]:
        """What the best clips of a query have in common with it, mean over queries."""
        one = next(iter(scores.values()))
        count = how_many(self.top, len(one.ids))

        def relevant(of: str) -> np.ndarray:
            def what(name: str) -> str:
                scene = self.clips[name]
                return scene.motion if of == "motion" else str(getattr(scene.appearance, of))

            return np.array([[what(n) == what(q) for q in one.queries] for n in one.ids])

        same = {of: relevant(of) for of in ("motion", "shape", "colour")}
        rows = {"all clips": {f"same {of}": float(r.mean()) for of, r in same.items()}}
        for name, kind in scores.items():
            if ", kernel" in name and not name.endswith(f"= {SHOWN_DAMPING:g}"):
                continue
            shares = {f"same {of}": float(precision(kind.values, r, count).mean()) for of, r in same.items()}
            rows[name] = {**shares, "NDCG of motion": float(ndcg(kind.values, same["motion"], count).mean())}
        return rows

    def foretold(self, scores: dict[str, Scores]) -> dict[str, dict[str, float]]:
        """The linear datamodelling score, mean over queries, and what chance stays below.

        λ of a kernel is chosen on the other half of the queries.
        """
        import pyarrow.parquet as pq

        one = next(iter(scores.values()))
        tables = [pq.read_table(self.folder(n) / "losses.parquet").to_pydict() for n in range(self.subsets)]
        members = [set(self.half(n)) for n in range(self.subsets)]
        subsets = np.array([[name in chosen for name in one.ids] for chosen in members])
        rows: dict[str, dict[str, float]] = {}
        for loss, heading in LOSSES.items():
            by_name = [dict(zip(t["id"], t[loss], strict=True)) for t in tables]
            losses = np.array([[values[q] for q in one.queries] for values in by_name])
            each = {name: datamodelling(kind.values, subsets, losses) for name, kind in scores.items()}
            for name, values in each.items():
                if ", kernel" not in name:
                    rows.setdefault(name, {})[heading] = float(values.mean())
            if WEIGHTED in scores:
                draws = shuffled(scores[WEIGHTED].values, subsets, losses, seed=self.setting.seed)
                rows.setdefault(BY_CHANCE, {})[heading] = float(np.quantile(draws, 0.95))
            for kind in dict.fromkeys(name.partition(", kernel")[0] for name in each if ", kernel" in name):
                swept = np.array([v for name, v in each.items() if name.startswith(f"{kind}, kernel")])
                rows.setdefault(f"{kind}, kernel", {})[heading] = held_out_choice(swept)
        return rows


def held_out_choice(swept: np.ndarray) -> float:
    """Mean over queries of what does best on the *other* half of them (every second one); of values (settings, queries)."""
    halves = np.arange(swept.shape[1]) % 2 == 0
    total = 0.0
    for mine in (halves, ~halves):
        # With a single query there is no other.
        best = int(swept[:, ~mine].mean(1).argmax()) if (~mine).any() else 0
        total += float(swept[best, mine].sum())
    return total / swept.shape[1]
