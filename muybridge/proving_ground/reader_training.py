"""How the reader is made: clips are drawn, damaged and shown to its networks, and it is tested on looks it has never seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from muybridge.proving_ground.appearance import SHAPES
from muybridge.proving_ground.motions import MOTIONS, STATIC
from muybridge.proving_ground.reader import OTHER, READS, VIEWS, Reader, kinematics, mirrored, pictures
from muybridge.proving_ground.render import render
from muybridge.proving_ground.scene import World, draw_scene
from muybridge.proving_ground.small import SMALL
from muybridge.proving_ground.tracking import track
from muybridge.video import Frames

LENGTHS = (17, 17, 17, 17, 17, 9, 13, 25, 33, 5, 7)
SCALES = (1.0, 1.15, 1.25, 1.3)
PACES = (1.0, 1.0, 0.85, 0.7)


# -- clips as models make them -------------------------------------------------------------------------------------


def damage(frames: Frames, rng: np.random.Generator) -> Frames:
    """A clip as an encoder, an autoencoder or a camera would give it back; one in four is left as it is.

    Blur in space and a little in time, gain, offset and faded colours, noise, and either the block transform of a lossy codec
    with its colours at half the resolution, or what is left of small blocks when only their slowest waves are kept, as an
    autoencoder of few channels keeps them.
    """
    import cv2

    if rng.random() < 0.25:
        return frames
    values: np.ndarray = frames.astype(np.float32)
    height, width = frames.shape[1:3]
    if rng.random() < 0.5:
        sigma = float(rng.uniform(0.3, 0.9)) * width / 32.0
        values = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in values])
    if rng.random() < 0.3:
        share = float(rng.uniform(0.0, 0.2))
        values[1:-1] = (1.0 - share) * values[1:-1] + 0.5 * share * (values[:-2] + values[2:])
    if rng.random() < 0.4:
        grey = values.mean(-1, keepdims=True)
        values = grey + float(rng.uniform(0.75, 1.1)) * (values - grey)
        values = float(rng.uniform(0.85, 1.1)) * values + float(rng.uniform(-12.0, 12.0))
    codec = rng.random()
    if codec < 0.35:
        values = slow_waves(values, light=int(rng.integers(4, 13)), colour=int(rng.integers(2, 7)))
    if rng.random() < 0.4:
        values = values + rng.normal(0.0, rng.uniform(1.0, 6.0), values.shape)
    found = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    if codec > 0.65:
        quality = [int(cv2.IMWRITE_JPEG_QUALITY), int(rng.integers(50, 96))]
        _, written = cv2.imencode(".jpg", found.reshape(-1, width, 3), quality)
        found = np.asarray(cv2.imdecode(written, cv2.IMREAD_COLOR))
    return found.reshape(-1, height, width, 3)


def slow_waves(values: np.ndarray, light: int, colour: int, block: int = 4) -> np.ndarray:
    """Frames (T, H, W, 3) of which each block keeps some waves of the cosine transform, the slowest first.

    Args:
        values: The frames; their sides are multiples of ``block``.
        light: Waves of the mean of the channels that are kept.
        colour: The same of what the channels differ from it by.
        block: Side of a block.
    """
    place = (2 * np.arange(block) + 1) * np.pi / (2 * block)
    waves = np.cos(np.arange(block)[:, None] * place[None]) * np.sqrt(2.0 / block)
    waves[0] /= np.sqrt(2.0)
    both = np.einsum("ia,jb->ijab", waves, waves).reshape(block**2, block**2)
    order = np.argsort(np.add.outer(np.arange(block), np.arange(block)).reshape(-1), kind="stable")

    def kept(part: np.ndarray, count: int) -> np.ndarray:
        some = both[order[:count]]
        frames, height, width, channels = part.shape
        cut = part.reshape(frames, height // block, block, width // block, block, channels).transpose(0, 1, 3, 5, 2, 4)
        flat = cut.reshape(-1, block**2) @ some.T @ some
        back = flat.reshape(frames, height // block, width // block, channels, block, block).transpose(0, 1, 4, 2, 5, 3)
        return back.reshape(part.shape)

    grey = values.mean(-1, keepdims=True)
    return (kept(grey, light) + kept(values - grey, colour)).astype(np.float32)


class Example(NamedTuple):
    """A clip and what is to be read of it.

    Args:
        frames: Its frames.
        motion: One of ``READS``.
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
    """

    frames: Frames
    motion: str
    shape: str
    colour: str


def examples(count: int, seed: int) -> Iterator[Example]:
    """Training clips: both worlds, two sizes, several scales, paces and lengths, looks that are not kept for validation."""
    kinds = (*MOTIONS, STATIC, OTHER)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        world = World(
            size=32 if rng.random() < 0.75 else 64,
            frames=int(rng.choice(LENGTHS)),
            anti_leak=bool(rng.random() < 0.45),
            scale=float(rng.choice(SCALES)),
            pace=float(rng.choice(PACES)),
        )
        motion = kinds[index % len(kinds)]
        scene = draw_scene(world, seed, index, motion=str(rng.choice(MOTIONS)) if motion == OTHER else motion)
        frames = render(scene)
        if motion == OTHER:
            frames = _senseless(frames, scene.motion, world, seed, index, rng)
        yield Example(damage(frames, rng), motion, scene.appearance.shape, scene.appearance.colour)


def _senseless(frames: Frames, motion: str, world: World, seed: int, index: int, rng: np.random.Generator) -> Frames:
    """A clip that obeys no law: its frames in any order, or two motions one after the other, or a burst run backwards."""
    if motion == "explode" and rng.random() < 0.7:
        return np.ascontiguousarray(frames[::-1])
    if rng.random() < 0.6:
        return frames[rng.permutation(len(frames))]
    other = str(rng.choice([name for name in MOTIONS if name != motion]))
    # The same sprite, elsewhere and otherwise.
    after = render(draw_scene(world, seed, index, motion=other))
    cut = int(rng.integers(len(frames) // 3, len(frames) - len(frames) // 3))
    return np.concatenate([frames[:cut], after[cut:]])


# -- training ------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Examples as the networks see them.

    Args:
        kinematic: (N, CHANNELS, MOMENTS).
        images: (N, VIEWS, SIDE, SIDE, 3), uint8.
        motion: Numbers among ``READS``, (N,).
        shape: Numbers among ``SHAPES``, (N,).
    """

    kinematic: torch.Tensor
    images: torch.Tensor
    motion: torch.Tensor
    shape: torch.Tensor


def tabulate(count: int, seed: int, tell: Callable[[], None] = lambda: None) -> Table:
    """Draw examples and keep what the networks see of them; those without a sprite throughout are left out."""
    kept: list[tuple[np.ndarray, np.ndarray, int, int]] = []
    for example in examples(count, seed):
        seen = track(example.frames)
        tell()
        if seen.present:
            numbers = READS.index(example.motion), SHAPES.index(example.shape)
            kept.append((kinematics(seen), pictures(example.frames, seen), *numbers))
    kinematic, images, motion, shape = zip(*kept, strict=True)
    return Table(
        torch.from_numpy(np.stack(kinematic)),
        torch.from_numpy(np.stack(images)),
        torch.tensor(motion),
        torch.tensor(shape),
    )


def train(
    clips: int = 12000,
    seed: int = 0,
    motion_epochs: int = 60,
    shape_epochs: int = 8,
    tell: Callable[[], None] = lambda: None,
) -> Reader:
    """A reader, a function of its arguments alone (on one machine with one number of threads).

    Args:
        clips: How many it is shown.
        seed: Of the clips, the weights and the order.
        motion_epochs: Times that the motion network sees each.
        shape_epochs: Times that the shape network sees each.
        tell: Called after each clip that was drawn.
    """
    table = tabulate(clips, seed, tell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader().train()
        _fit_motion(reader.motion, table, motion_epochs)
        _fit_shape(reader.shape, table, shape_epochs)
    return reader.eval()


def _fit_motion(net: nn.Module, table: Table, epochs: int, batch: int = 128) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(table.motion) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(table.motion)).split(batch):
            given = table.kinematic[part]
            given = torch.where(torch.rand(len(part), 1, 1) < 0.5, mirrored(given), given)
            given = given + 0.12 * torch.rand(len(part), 1, 1) * torch.randn_like(given)
            loss = nn.functional.cross_entropy(net(given)[0], table.motion[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _fit_shape(net: nn.Module, table: Table, epochs: int, batch: int = 64, views: int = 3) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-3)
    steps = epochs * -(-len(table.shape) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(table.shape)).split(batch):
            images = table.images[part][:, torch.randperm(VIEWS)[:views]]
            images = torch.rot90(images, int(torch.randint(4, (1,))), (2, 3))
            images = images.flip(3) if torch.rand(1) < 0.5 else images
            loss = nn.functional.cross_entropy(net(images), table.shape[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


# -- testing -------------------------------------------------------------------------------------------------------

WORLDS: dict[str, World] = {
    "the shipped model's": SMALL,
    "natural, 32 pixels": World(size=32, anti_leak=False),
    "natural, 64 pixels": World(size=64, anti_leak=False),
    "without leak, 32 pixels": World(size=32),
    "without leak, 64 pixels": World(size=64),
}
"""Where a reader is tested."""


def test_clips(world: World, count: int, seed: int, damaged: bool) -> Iterator[Example]:
    """Clips with looks that no training clip has."""
    for index in range(count):
        scene = draw_scene(world, seed, index, held_out=True)
        frames = render(scene)
        if damaged:
            frames = damage(frames, np.random.default_rng([seed, index]))
        yield Example(frames, scene.motion, scene.appearance.shape, scene.appearance.colour)


def scores(reader: Reader, world: World, count: int, seed: int, damaged: bool = False) -> dict[str, float]:
    """Share of clips of a world whose motion, shape and colour are read right."""
    shown = list(test_clips(world, count, seed, damaged))
    read = reader.read([example.frames for example in shown])
    return {
        name: float(np.mean([getattr(r, name) == getattr(e, name) for r, e in zip(read, shown, strict=True)]))
        for name in ("motion", "shape", "colour")
    }


def make(
    out: str | Path, clips: int = 12000, seed: int = 0, tested: int = 150, tell: Any = lambda: None
) -> dict[str, Any]:
    """Train a reader, test it, and write ``reader.safetensors`` and ``reader.json``."""
    started = time.process_time()
    reader = train(clips, seed, tell=tell)
    seconds = time.process_time() - started
    reader.save(Path(out) / "reader.safetensors")
    known = describe(reader, clips, seed, tested, seconds)
    (Path(out) / "reader.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return known


def describe(reader: Reader, clips: int, seed: int, tested: int, seconds: float) -> dict[str, Any]:
    """A reader's card: how it was made, and what it reads of looks that it has not seen."""
    return {
        "made": date.today().isoformat(),
        "command": f"muybridge proving-ground-reader --clips {clips} --seed {seed} --tested {tested}",
        "seed": seed,
        "clips": clips,
        "processor_seconds": round(seconds),
        "torch": torch.__version__.split("+")[0],
        "parameters": sum(p.numel() for p in reader.parameters()),
        "tested": {"clips": tested, "seed": seed + 1, "looks": "pairs of shape and colour that no training clip has"},
        "scores": {
            name: {
                kind: {key: round(value, 3) for key, value in scores(reader, world, tested, seed + 1, dark).items()}
                for kind, dark in (("as drawn", False), ("damaged", True))
            }
            for name, world in WORLDS.items()
        },
    }
