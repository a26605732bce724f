"""What things look like: shapes as signed distances, colours, textures and grounds as functions of place.

All are defined at real-valued places, so that a sprite or a camera may move by any fraction of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("disk", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.95, 0.92, 0.12),
    "green": (0.12, 0.80, 0.22),
    "cyan": (0.10, 0.85, 0.88),
    "blue": (0.15, 0.28, 0.95),
    "purple": (0.60, 0.15, 0.88),
    "pink": (0.98, 0.30, 0.65),
}
TEXTURES = ("half", "dot", "stripe", "shade")
"""Each is darker on one side, so that a turn can be seen even on a disk."""
GROUNDS = ("black", "grey", "light", "gradient", "noise", "checker")
REACH = 1.25
"""No shape of radius 1 has a point farther out."""


@dataclass(frozen=True)
class Appearance:
    """How a clip looks, whatever moves in it.

    Args:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        texture: One of ``TEXTURES``.
        background: One of ``GROUNDS``.
    """

    shape: str
    colour: str
    texture: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this pair of shape and colour is kept for validation: one in four, every shape and colour among them."""
        return (3 * SHAPES.index(self.shape) + list(COLOURS).index(self.colour)) % 4 == 0


def draw_appearance(rng: np.random.Generator, held_out: bool, options: Sequence[Sequence[str]]) -> Appearance:
    """Any appearance of the training or the held-out combinations, all equally likely.

    Args:
        rng: Where it comes from.
        held_out: Which of the two.
        options: Shapes, colours, textures and grounds to draw from.
    """
    while True:
        found = Appearance(*(names[int(rng.integers(len(names)))] for names in options))
        if found.held_out == held_out:
            return found


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far places lie outside a shape of radius 1; negative inside.

    Every shape's second moments are the same in all directions, so that a change of its proportions is a deformation and never
    a turn.
    """
    if shape == "disk":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.70) - 0.30
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 0.38, b - 1.0), np.maximum(a - 1.0, b - 0.38))
    if shape == "triangle":
        return np.maximum(np.maximum(y - 0.6, 0.866 * x - 0.5 * y - 0.6), -0.866 * x - 0.5 * y - 0.6)
    if shape == "star":
        return (np.hypot(x, y) - (0.76 + 0.30 * np.cos(5.0 * np.arctan2(x, -y)))) * 0.75
    raise KeyError(shape)


def brightness(texture: str, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """The share of its colour that a place shows, 0.3 to 1. Edges are one pixel wide.

    Args:
        texture: One of ``TEXTURES``.
        x: To the right, where the shape has radius 1.
        y: Down.
        pixel: Width of a pixel in the same unit.
    """

    def inside(edge: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - edge / pixel, 0.0, 1.0)

    if texture == "half":
        return 1.0 - 0.62 * inside(x)
    if texture == "dot":
        return 1.0 - 0.70 * inside(np.hypot(x - 0.42, y) - 0.40)
    if texture == "stripe":
        return 1.0 - 0.68 * inside(np.abs(x - 0.40) - 0.24)
    if texture == "shade":
        return 0.66 + 0.34 * np.clip(x, -1.0, 1.0)
    raise KeyError(texture)


@dataclass(frozen=True)
class Ground:
    """What is behind: grey, so that what is coloured is the sprite.

    Args:
        kind: One of ``GROUNDS``.
        horizon: Below this height (1 is the lower edge of the picture) it is darker.
        waves: Of ``noise``: wave vectors and phases, (N, 3).
    """

    kind: str
    horizon: float
    waves: np.ndarray

    def __call__(self, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
        """Grey level, 0 to 1, at places in units of the picture's side."""
        if self.kind == "gradient":
            level = 0.475 + 0.225 * np.sin(2.0 * (x - 0.5))
        elif self.kind == "noise":
            phases = self.waves[:, 0, None, None, None] * x + self.waves[:, 1, None, None, None] * y
            level = 0.42 + 0.05 * np.sin(phases + self.waves[:, 2, None, None, None]).sum(0)
        elif self.kind == "checker":
            product = np.sin(8.0 * math.pi * x) * np.sin(8.0 * math.pi * y)
            level = 0.42 + 0.08 * np.clip(product / (8.0 * math.pi * pixel), -1.0, 1.0)
        else:
            level = np.zeros_like(x) + {"black": 0.06, "grey": 0.42, "light": 0.80}[self.kind]
        below = np.clip(0.5 + (y - self.horizon) / pixel, 0.0, 1.0)
        return level + below * (0.05 - 0.28 * level)


def draw_ground(kind: str, horizon: float, rng: np.random.Generator) -> Ground:
    """A ground with its own random waves."""
    angle, length = rng.uniform(0.0, 2.0 * math.pi, 6), rng.uniform(8.0, 40.0, 6)
    waves = np.stack([length * np.cos(angle), length * np.sin(angle), rng.uniform(0.0, 2.0 * math.pi, 6)], -1)
    return Ground(kind, horizon, waves)
