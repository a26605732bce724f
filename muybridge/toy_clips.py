"""Toy clips: one bright shape moving over a dark ground, with a caption that says what and where to.

They are drawn with anti-aliasing at real-valued positions, so that motion is smooth at any speed, and are a function of their
number alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from muybridge.errors import UsageError
from muybridge.video import Frames, write_video

SHAPES = ("disc", "square", "diamond")
COLOURS = {"red": (230, 60, 50), "green": (60, 200, 90), "blue": (70, 110, 240), "yellow": (240, 210, 60)}
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far places lie outside the shape's edge, in pixels; negative inside."""
    if shape == "disc":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius
    return (np.abs(x) + np.abs(y)) / math.sqrt(2.0) - radius


def draw(index: int, frames: int = 17, height: int = 64, width: int = 64) -> tuple[Frames, str]:
    """Clip number ``index`` and its caption."""
    rng = np.random.default_rng(index)
    shape = SHAPES[index % len(SHAPES)]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    direction = list(DIRECTIONS)[index % len(DIRECTIONS)]
    dx, dy = DIRECTIONS[direction]
    radius = min(height, width) * rng.uniform(0.1, 0.18)
    # From one side to the other along the direction, anywhere across it.
    across = rng.uniform(0.3, 0.7)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    ground = rng.uniform(15, 60, size=3)
    shade = ground * (0.7 + 0.6 * (y / height))[..., None]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        along = 0.25 + 0.5 * i / max(frames - 1, 1)
        cx = width * (across if dx == 0 else along if dx > 0 else 1 - along)
        cy = height * (across if dy == 0 else along if dy > 0 else 1 - along)
        inside = np.clip(0.5 - distance(shape, x - cx, y - cy, radius), 0.0, 1.0)[..., None]
        clip[i] = (shade * (1 - inside) + np.array(COLOURS[colour]) * inside).round()
    return clip, f"a {colour} {shape} moves {direction}"


def write_clips(
    out: str | Path, count: int = 8, frames: int = 17, height: int = 64, width: int = 64, fps: float = 8.0
) -> list[Path]:
    """Write clips as mp4 files, each with its caption in a .txt file beside it."""
    if count < 1:
        raise UsageError(f"{count} clips", "1 or more")
    paths = []
    for index in range(count):
        clip, caption = draw(index, frames, height, width)
        path = write_video(Path(out) / f"clip-{index:03d}.mp4", clip, fps)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths
