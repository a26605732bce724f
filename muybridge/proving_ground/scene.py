"""What a clip shows, before any pixel: drawn from a seed and a number, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from muybridge.errors import UsageError, did_you_mean
from muybridge.proving_ground.appearance import (
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    Appearance,
    Ground,
    draw_appearance,
    draw_ground,
)
from muybridge.proving_ground.captions import join_caption, motion_words, subject_words
from muybridge.proving_ground.motions import FLOOR, MOTIONS, STATIC, Trajectory, draw_trajectory, turn

KINDS: dict[str, tuple[str, ...]] = {
    "motions": MOTIONS,
    "shapes": SHAPES,
    "colours": tuple(COLOURS),
    "textures": TEXTURES,
    "backgrounds": GROUNDS,
}
"""What a world may have some of."""


@dataclass(frozen=True)
class World:
    """What clips there are.

    Args:
        size: Height and width in pixels.
        frames: Frames of a clip.
        longest: With this, clips have from ``frames`` to so many frames.
        anti_leak: No single frame tells the motion.
        camera: Share of clips whose camera moves.
        distractors: Grey things that drift behind the sprite, in every clip.
        static: Share of clips in which nothing moves.
        backwards: Share of clips that are shown last frame first.
        motions: Which ones there are; they take turns.
        shapes: Which ones there are; likewise the next three.
        colours: Of the sprite.
        textures: Of the sprite.
        backgrounds: Behind it.
        scale: Size of sprites against the usual, 0.5 to 1.3.
        pace: Speed of what bounces, spins, swings, floats or bursts, against the usual, 0.6 to 1.5.
    """

    size: int = 64
    frames: int = 17
    longest: int = 0
    anti_leak: bool = True
    camera: float = 0.0
    distractors: int = 0
    static: float = 0.0
    backwards: float = 0.0
    motions: tuple[str, ...] = MOTIONS
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES
    backgrounds: tuple[str, ...] = GROUNDS
    scale: float = 1.0
    pace: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 2:
            raise UsageError(f"size is {self.size}", "an even number of pixels, 16 or more")
        if self.frames < 5 or (self.longest and self.longest < self.frames):
            raise UsageError(f"frames is {self.frames} and longest is {self.longest}", "5 or more, and no less or 0")
        for name in ("camera", "static", "backwards"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} is {getattr(self, name)}", "a share from 0 to 1")
        if self.distractors < 0:
            raise UsageError(f"distractors is {self.distractors}", "0 or more")
        if not 0.5 <= self.scale <= 1.3:
            raise UsageError(f"scale is {self.scale}", "0.5 to 1.3: larger sprites leave the picture")
        if not 0.6 <= self.pace <= 1.5:
            raise UsageError(f"pace is {self.pace}", "0.6 to 1.5: what is slower does not come back within a clip")
        for name, known in KINDS.items():
            object.__setattr__(self, name, tuple(getattr(self, name)))
            unknown = [given for given in getattr(self, name) if given not in known]
            if unknown or not getattr(self, name):
                given = f"no {name[:-1]} {unknown[0]!r}" if unknown else f"{name} is empty"
                raise UsageError(
                    given, f"some of {', '.join(known)}", did_you_mean(unknown[0], known) if unknown else ""
                )
        looks = [Appearance(s, c, self.textures[0], self.backgrounds[0]) for s in self.shapes for c in self.colours]
        if len({look.held_out for look in looks}) < 2:
            raise UsageError(
                f"shapes {', '.join(self.shapes)} in colours {', '.join(self.colours)}",
                "pairs for training and pairs that are kept for validation: one in four is",
                "name more shapes or colours",
            )

    @classmethod
    def of(cls, **settings: Any) -> World:
        """A world from options, of which one that is ``None`` was not given: all of a kind, or what is usual."""
        return cls(**{name: given for name, given in settings.items() if given is not None})


@dataclass(frozen=True)
class Sprite:
    """A shape on a trajectory."""

    shape: str
    texture: str
    colour: tuple[float, float, float]
    trajectory: Trajectory


@dataclass(frozen=True)
class Scene:
    """One clip.

    Args:
        name: Of the clip among those of its seed.
        motion: One of ``MOTIONS``, or ``static``.
        appearance: Of what moves.
        sprites: What is drawn, the farthest first; the last is what the caption speaks of.
        ground: Behind all of it.
        camera: Where the picture's origin is seen, per frame, (T, 2).
        size: Height and width in pixels.
        backwards: Whether the last frame comes first.
        parameters: Of the law.
    """

    name: str
    motion: str
    appearance: Appearance
    sprites: tuple[Sprite, ...]
    ground: Ground
    camera: np.ndarray
    size: int
    backwards: bool = False
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Length of the clip."""
        return len(self.camera)

    @property
    def subject(self) -> str:
        """Words for what moves."""
        return subject_words(self.appearance.shape, self.appearance.colour)

    @property
    def motion_words(self) -> str:
        """Words for how."""
        return motion_words(self.motion, self.parameters, self.backwards)

    @property
    def caption(self) -> str:
        """Both."""
        return join_caption(self.subject, self.motion_words)


def draw_scene(world: World, seed: int, index: int, held_out: bool = False, motion: str = "") -> Scene:
    """Clip number ``index`` of a seed. Motions take turns; all else is drawn independently of them.

    Args:
        world: What clips there are.
        seed: Of all clips.
        index: Number of the clip.
        held_out: Whether it has an appearance that is kept for validation.
        motion: This motion instead of the one whose turn it is.
    """
    if motion and motion not in (*MOTIONS, STATIC):
        raise UsageError(f"no motion {motion!r}", f"one of {', '.join(MOTIONS)}", did_you_mean(motion, MOTIONS))
    # One stream for each thing: an option that draws more must not change what else is seen.
    looks, moves, around = (np.random.default_rng([seed, index, part]) for part in range(3))
    options = (world.shapes, world.colours, world.textures, world.backgrounds)
    appearance = draw_appearance(looks, held_out, options)
    still, backwards, pans = around.random(3) < (world.static, world.backwards, world.camera)
    frames = int(around.integers(world.frames, max(world.longest, world.frames) + 1))
    motion = motion or (STATIC if still else world.motions[index % len(world.motions)])
    trajectory = draw_trajectory(motion, moves, frames, world.anti_leak, world.scale, world.pace)
    # The horizon of the world without leak is no floor: what rests on it is chance.
    horizon = float(around.uniform(0.55, 1.0)) if world.anti_leak else FLOOR
    ground = draw_ground(appearance.background, horizon, around)
    camera = _pan(around, frames) if pans else np.zeros((frames, 2))
    distractors = [_distractor(around, frames) for _ in range(world.distractors)]
    sprite = Sprite(
        appearance.shape,
        appearance.texture,
        COLOURS[appearance.colour],
        trajectory.reversed() if backwards else trajectory,
    )
    return Scene(
        f"{index:06d}",
        motion,
        appearance,
        (*distractors, sprite),
        ground,
        camera,
        world.size,
        bool(backwards),
        trajectory.parameters,
    )


def _pan(rng: np.random.Generator, frames: int) -> np.ndarray:
    """An even pan in any direction, over 5 to 15 % of the picture."""
    angle, way = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(0.05, 0.15)
    return np.linspace(-0.5, 0.5, frames)[:, None] * way * np.array([math.cos(angle), math.sin(angle)])


def _distractor(rng: np.random.Generator, frames: int) -> Sprite:
    """A small grey thing that drifts evenly."""
    radius, level = float(rng.uniform(0.03, 0.06)), float(rng.choice([0.25, 0.68]))
    start, way = rng.uniform(0.15, 0.85, 2), rng.uniform(-0.2, 0.2, 2)
    centre = start + np.linspace(0.0, 1.0, frames)[:, None] * way
    matrix = np.repeat(turn(np.array(rng.uniform(0.0, 2.0 * math.pi)))[None] * radius, frames, 0)
    shape = str(rng.choice(["disk", "square"]))
    return Sprite(shape, "shade", (level, level, level), Trajectory(centre[None], matrix[None], radius))
