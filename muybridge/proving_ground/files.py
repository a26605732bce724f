"""A folder of clips: H.264 files, tables that list them, and beside each clip what is true of it.

- ``clips.parquet``: all clips; ``train.parquet`` and ``validation.parquet`` are its two parts
- ``train_prompts.jsonl`` and ``validation_prompts.jsonl``: the captions of the two parts with the clips' ids
- ``world.json``: the settings; a folder is continued only with the same
- ``clips/000000.mp4``
- ``truth/000000.npz``: flow, visible, mask, tracks, track_visible, where asked for
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from muybridge.begun import begin
from muybridge.errors import UsageError
from muybridge.proving_ground.render import Truth, render, render_with_truth
from muybridge.proving_ground.scene import Scene, World, draw_scene
from muybridge.video import write_video
from muybridge.whole import whole, write_text

SETTINGS = "world.json"
PARTS = ("train", "validation")
PARAMETERS = (
    "g",
    "restitution",
    "omega",
    "period",
    "amplitude",
    "length",
    "direction",
    "ratio",
    "factor",
    "axis",
    "start",
)
"""Columns of the tables for what laws have as parameters; empty where a clip's law has none such."""
CRF = 10
"""x264's quality: a sprite of ten pixels has no room for artefacts."""


def is_validation(index: int, share: float) -> bool:
    """Whether a clip has an appearance that is kept for validation; spread evenly, and over all motions."""
    return (index * 0.6180339887498949) % 1.0 < share


def scenes(world: World, count: int, seed: int, validation: float) -> Iterable[Scene]:
    """The scenes of a folder, in order."""
    return (draw_scene(world, seed, index, is_validation(index, validation)) for index in range(count))


def row(scene: Scene) -> dict[str, Any]:
    """A clip's line in the tables."""
    look = scene.appearance
    return {
        "video": f"clips/{scene.name}.mp4",
        "caption": scene.caption,
        "id": f"clips/{scene.name}",
        "split": PARTS[look.held_out],
        "motion": scene.motion,
        "shape": look.shape,
        "colour": look.colour,
        "texture": look.texture,
        "background": look.background,
        "backwards": scene.backwards,
        "frames": scene.frames,
        **{name: scene.parameters.get(name) for name in PARAMETERS},
    }


def write_clips(
    out: str | Path,
    world: World,
    count: int,
    seed: int = 0,
    validation: float = 0.1,
    fps: float = 8.0,
    truth: bool = False,
    tell: Callable[[], None] = lambda: None,
) -> list[Scene]:
    """Write a folder of clips; one that was begun with the same settings is continued.

    Args:
        out: The folder.
        world: What clips there are.
        count: How many; a folder may be given more later.
        seed: Of all of them.
        validation: Share of clips whose pair of shape and colour no training clip has.
        fps: Frames per second of the files.
        truth: Write what is true of each clip too.
        tell: Called after each clip.
    """
    if count < 1 or not 0.0 <= validation < 1.0:
        raise UsageError(f"{count} clips, a share of {validation} for validation", "1 or more, and 0 up to less than 1")
    root = Path(out)
    settings = {**asdict(world), "seed": seed, "validation": validation, "fps": fps}
    # Count and truth may differ, and a folder may hold other things beside its clips.
    begin(root / SETTINGS, settings, "clips", asdict(World()), alone=False, todo="write to another folder")
    drawn = []
    for scene in scenes(world, count, seed, validation):
        drawn.append(scene)
        video, beside = root / "clips" / f"{scene.name}.mp4", root / "truth" / f"{scene.name}.npz"
        if truth and not (beside.is_file() and video.is_file()):
            frames, known = render_with_truth(scene)
            write_video(video, frames, fps, CRF, exact=True)
            _write_truth(beside, known)
        elif not video.is_file():
            write_video(video, render(scene), fps, CRF, exact=True)
        tell()
    _write_tables(root, [row(scene) for scene in drawn])
    return drawn


def read_truth(path: str | Path) -> Truth:
    """What is true of a clip, as written beside it."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist", "a .npz file of the folder truth", "write the clips with --truth true"
        )
    with np.load(file) as held:
        return Truth(**{name: held[name] for name in Truth.__dataclass_fields__})


def _write_truth(file: Path, truth: Truth) -> None:
    with whole(file, suffix=True) as temporary:
        np.savez_compressed(temporary, **{name: getattr(truth, name) for name in Truth.__dataclass_fields__})


def _write_tables(root: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = [(name, pa.float64()) for name in PARAMETERS]
    kinds: dict[str, Any] = {"backwards": pa.bool_(), "frames": pa.int64(), **dict(numbers)}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    for name in ("clips", *PARTS):
        part = [r for r in rows if name in ("clips", r["split"])]
        with whole(root / f"{name}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(part, schema=schema), temporary)
        if name in PARTS:
            lines = [json.dumps({"id": r["id"], "prompt": r["caption"]}) + "\n" for r in part]
            write_text(root / f"{name}_prompts.jsonl", "".join(lines))


def held(root: str | Path) -> int:
    """How many clips a folder's table lists; 0 where there is none."""
    import pyarrow.parquet as pq

    file = Path(root) / "clips.parquet"
    return int(pq.read_metadata(file).num_rows) if file.is_file() else 0
