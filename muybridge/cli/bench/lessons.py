"""Teaching motions from single clips, one after another: what `muybridge bench-customize` compares.

The proving ground's model knows six of the ten motions by their words, so a word of theirs would teach it nothing. Every motion
is taught under a word that the model has never seen, whose meaning can come from the clip alone. Six of the ten the model can
make and has to find; four it has never seen move. Then it is asked for subjects that share neither shape nor colour with the
clip's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from muybridge.cli.bench.methods import TEACHER, Method, Setting
from muybridge.cli.bench.parts import Part
from muybridge.customization.tau import RESULT
from muybridge.proving_ground import join_caption, look_of, split_caption
from muybridge.proving_ground.captions import subject_words
from muybridge.proving_ground.scene import World, draw_scene
from muybridge.proving_ground.small import as_options
from muybridge.whole import write_text

WORD = "wugs"
"""What every taught motion is called; no caption of the proving ground has it."""
CONFIG = "proving_ground/customize.yaml"
EVERYTHING = r"blocks\.\d+\.(attn1|attn2|ffn)\..*"
"""Every linear layer of the model's blocks."""
TOLD = "told"
"""The method whose prompts name the motion by its own word."""
PROBED = "vo-probed"
"""The method whose boundary is the probe's."""
MATCHING_FROM = 500
"""The published recipe of feature matching trains and acts from here on."""


def other_subjects(world: World, caption: str, count: int) -> list[str]:
    """Subjects that share neither shape nor colour with a caption's, spread over both."""
    its_shape, its_colour = look_of(caption)
    shapes = [shape for shape in world.shapes if shape != its_shape]
    colours = [colour for colour in world.colours if colour != its_colour]
    pairs = [(shapes[i % len(shapes)], colours[i % len(colours)]) for i in range(len(shapes) * len(colours))]
    return [subject_words(*pair) for pair in dict.fromkeys(pairs)][:count]


def methods(taus: Sequence[float] = (), probed: Path | None = None) -> tuple[Method, ...]:
    """What is compared.

    Args:
        taus: Boundaries to try.
        probed: Folder of a probe, whose boundary is tried too.
    """

    def lesson(name: str, title: str, *overrides: str) -> Method:
        return Method(name, title, CONFIG, overrides, True, forwards=40)

    sampled = ("--model.sampling.steps=20",)
    found = [
        Method("base", "before any lesson", TEACHER, sampled, forwards=40),
        Method(TOLD, "told the motion's own word, no lesson", TEACHER, sampled, forwards=40),
        lesson("plain", "every layer, all times", f"--model.adapter.targets={EVERYTHING}"),
        lesson("vo", "value and output, all times"),
    ]
    for tau in taus:
        found.append(lesson(f"vo-{tau:g}", f"value and output, from {tau:g} on", f"--model.tau.value={tau:g}"))
    if probed is not None:
        where = json.dumps({"value": None, "from_probe": str(probed)})
        found.append(lesson(PROBED, "value and output, from the probe's τ on", f"--model.tau={where}"))
    matching = ("--config=customize/matching.yaml", f"--model.tau.value={MATCHING_FROM}")
    return (
        *found,
        lesson("qk", "query and key, all times", '--model.adapter.projections=["q", "k"]'),
        lesson("matching", f"motion feature matching, from {MATCHING_FROM} on", *matching),
    )


def claims(chosen: Sequence[Method]) -> list[tuple[str, Method, Method]]:
    """What the papers say of one method against another, of those that are compared."""
    named = {method.name: method for method in chosen}
    said = [
        pair
        for name in named
        if name.startswith("vo-")
        for pair in (
            ("a boundary keeps the look out and costs no motion", name, "vo"),
            ("so does the whole recipe, against every layer at all times", name, "plain"),
        )
    ]
    said += [
        ("value and output carry motion, query and key hardly do", "vo", "qk"),
        ("matching attention maps transfers motion better than the plain loss", "matching", "vo"),
        # The other one acts at all times, so that it says as much of the boundary as of the loss.
        ("the same, where both act from one time on", "matching", f"vo-{MATCHING_FROM:g}"),
    ]
    return [(claim, named[one], named[other]) for claim, one, other in said if one in named and other in named]


@dataclass(frozen=True)
class Lesson(Setting):
    """One motion from one clip, under one seed.

    Args:
        motion: Which is taught.
        reference: Number of the clip among those of its motion; clips are the same under every seed.
    """

    motion: str = "roll"
    reference: int = 0

    @cached_property
    def taught(self) -> World:
        """Where the clip is from."""
        return replace(self.world, motions=(self.motion,))

    @cached_property
    def caption(self) -> str:
        """What the clip shows, in the judge's words."""
        return draw_scene(self.taught, self.reference, 0).caption

    @cached_property
    def wanted(self) -> list[str]:
        """What is asked for, in the judge's words."""
        how = split_caption(self.caption)[1]
        return [join_caption(subject, how) for subject in other_subjects(self.world, self.caption, self.clips)]

    @property
    def judged(self) -> int:
        return len(self.wanted)

    @property
    def truth(self) -> Path:
        return self.root / "truth.jsonl"

    @property
    def judging(self) -> list[str]:
        return [f"--reference={self.caption}"]

    @property
    def pace(self) -> float:
        return 0.06

    def asked(self, method: Method) -> Path:
        return self.truth if method.name == TOLD else self.root / "prompts.jsonl"

    def data(self, method: Method) -> list[str]:
        subject = split_caption(self.caption)[0]
        return [
            f"--data.videos={self.folder / 'clips/000000.mp4'}",
            f"--data.caption={join_caption(subject, WORD)}",
        ]

    def write_prompts(self) -> None:
        """What the model is asked for, and what that means."""
        for file, how in ((self.truth, None), (self.root / "prompts.jsonl", WORD)):
            lines = []
            for index, wanted in enumerate(self.wanted):
                prompt = wanted if how is None else join_caption(split_caption(wanted)[0], how)
                lines.append(json.dumps({"id": f"{index:04d}", "prompt": prompt}) + "\n")
            write_text(file, "".join(lines))

    def draw(self) -> Part:
        return Part(
            f"{self.label}clip",
            f"one clip: {self.caption}",
            (
                "proving-ground",
                "--clips=1",
                "--validation=0.0",
                f"--seed={self.reference}",
                f"--out={self.folder}",
                *as_options(self.taught),
            ),
            1.0,
            needs=(),
        )


def lessons(
    root: Path,
    model: str,
    world: World,
    seed: int,
    motions: Sequence[str],
    references: int,
    prompts: int,
    updates: int,
) -> list[Lesson]:
    """All that are taught under one seed.

    Args:
        root: Of the whole comparison.
        model: What they are taught to.
        world: What the model knows.
        seed: Of training and noise.
        motions: Which are taught.
        references: Clips of each, one after another.
        prompts: New subjects of each.
        updates: Of training.
    """
    found = []
    for motion in motions:
        for reference in range(references):
            name = f"seed-{seed}/{motion.replace(' ', '-')}-{reference}"
            found.append(
                Lesson(
                    root / name,
                    model,
                    world,
                    prompts,
                    1.0,
                    updates,
                    f"{name}/",
                    seed,
                    motion=motion,
                    reference=reference,
                )
            )
    return found


@dataclass(frozen=True)
class Probing:
    """Where the boundary is, asked of clips whose words the model knows.

    Args:
        root: Of the whole comparison.
        model: Which is asked.
        world: What it knows.
        clips: How many clips are inverted and sampled again.
        steps: Of the sampler.
    """

    root: Path
    model: str
    world: World
    clips: int = 12
    steps: int = 20

    @property
    def out(self) -> Path:
        """Where the result is."""
        return self.root / "probe"

    def found(self) -> dict[str, Any]:
        """The boundary ``tau``, or None and the ``reason``."""
        held = json.loads((self.out / RESULT).read_text(encoding="utf-8"))
        return {name: held[name] for name in ("tau", "reason", "spread", "clips") if name in held}

    def parts(self) -> list[Part]:
        """Draw, probe."""
        clips = self.root / "probe-clips"
        draw = ("proving-ground", f"--clips={self.clips}", "--validation=0.0", "--seed=1000", f"--out={clips}")
        ask = (
            "probe",
            f"--model={self.model}",
            f"--videos={clips / 'clips.parquet'}",
            f"--out={self.out}",
            f"--steps={self.steps}",
            f"--boundaries={min(10, self.steps)}",
            f"--frames=[{self.world.frames}]",
            f"--height={self.world.size}",
            f"--width={self.world.size}",
            "--alignment=reader",
            "--keep_bar=true",
        )
        return [
            Part(
                "probe.clips",
                f"{self.clips} clips of motions that the model knows",
                (*draw, *as_options(self.world)),
                1.0,
            ),
            Part(
                "probe",
                f"where motion ends and looks begin, on {self.clips} clips",
                ask,
                0.6 * self.steps * self.clips,
            ),
        ]
