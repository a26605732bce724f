"""Clips are a function of their seed, and what is said of them is true of their pixels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from datamodules import ProvingGroundData
from muybridge.cli.front import main
from muybridge.errors import UsageError
from muybridge.proving_ground import (
    MOTIONS,
    World,
    draw_scene,
    join_caption,
    motion_of,
    read_truth,
    render,
    render_with_truth,
    split_caption,
    write_clips,
)
from muybridge.video import read_frames


def digest(world: World, seed: int, count: int = 10) -> str:
    total = hashlib.sha256()
    for index in range(count):
        total.update(render(draw_scene(world, seed, index)).tobytes())
    return total.hexdigest()[:16]


GOLDEN = {True: "24d532cce42b8deb", False: "6221bba55b12e181"}


@pytest.mark.parametrize("anti_leak", [True, False])
def test_frames_are_bit_identical_from_the_seed(anti_leak: bool):
    world = World(size=32, anti_leak=anti_leak)
    assert digest(world, 3) == GOLDEN[anti_leak]
    assert digest(world, 4) != GOLDEN[anti_leak]


def test_options_change_only_what_they_say():
    plain, busy = World(size=32), World(size=32, camera=1.0, distractors=2)
    for index in range(10):
        a, b = draw_scene(plain, 0, index), draw_scene(busy, 0, index)
        assert a.caption == b.caption
        assert np.array_equal(a.sprites[-1].trajectory.centre, b.sprites[-1].trajectory.centre)
        assert len(b.sprites) == 3
        assert np.ptp(b.camera, axis=0).any()


def test_backwards_is_the_same_clip_last_frame_first():
    for index in range(10):
        forth = draw_scene(World(size=32, anti_leak=False), 0, index)
        back = draw_scene(World(size=32, anti_leak=False, backwards=1.0), 0, index)
        assert np.array_equal(render(forth)[::-1], render(back))
        assert back.caption == forth.caption + ", backwards"


def test_nothing_moves_in_a_static_clip_and_something_in_all_others():
    for index in range(10):
        frames = render(draw_scene(World(size=32, static=1.0), 0, index))
        assert (frames == frames[0]).all()
        moved = render(draw_scene(World(size=32), 0, index)).astype(int)
        assert np.abs(moved - moved[0]).max() > 30


@pytest.mark.parametrize("world", [World(anti_leak=False), World(), World(camera=1.0, distractors=2)])
def test_the_next_frame_brought_back_by_the_flow_is_this_one(world: World):
    """Inside the sprite, where it stays visible, to 4 grey levels on average (bilinear reading blurs texture edges); leaving
    the flow out must be far worse."""
    errors, unmoved = [], []
    for index in range(20):
        frames, truth = render_with_truth(draw_scene(world, 1, index))
        y, x = np.mgrid[0 : world.size, 0 : world.size].astype(np.float32)
        for t in range(0, len(frames) - 1, 3):
            flow = truth.flow[t]
            inside = cv2.erode(truth.mask[t].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            inside &= truth.visible[t]
            if inside.sum() < 5:
                continue
            back = cv2.remap(frames[t + 1], x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR).astype(float)
            errors.append(np.abs(back - frames[t])[inside].mean())
            unmoved.append(np.abs(frames[t + 1].astype(float) - frames[t])[inside].mean())
    assert len(errors) > 60
    assert np.mean(errors) < 4.0
    assert np.mean(unmoved) > 3.0 * np.mean(errors)


def test_tracks_step_as_the_flow_says():
    """At a visible point, the flow at its pixel is its own step but for the way from the point to the pixel's middle."""
    for index in range(10):
        _, truth = render_with_truth(draw_scene(World(), 2, index))
        for t in (0, 7, 15):
            seen = truth.track_visible[:, t]
            assert seen.any()
            here, after = truth.tracks[seen, t], truth.tracks[seen, t + 1]
            cell = here.astype(int)
            step = truth.flow[t][cell[:, 1], cell[:, 0]]
            assert np.abs(step - (after - here)).max() < 0.75
            assert truth.mask[t][cell[:, 1], cell[:, 0]].all()


def test_ground_that_nothing_passes_stands_still_or_pans():
    _, still = render_with_truth(draw_scene(World(), 0, 0))
    assert not still.flow[~still.mask[:-1]].any()
    scene = draw_scene(World(camera=1.0), 0, 0)
    _, panned = render_with_truth(scene)
    pan = np.diff(scene.camera, axis=0)[0] * scene.size
    assert np.allclose(panned.flow[~panned.mask[:-1]], pan, atol=1e-5)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_sprite_changes_as_its_motion_says_and_not_otherwise(motion: str):
    for index in range(5):
        way = draw_scene(World(), 5, index, motion=motion).sprites[-1].trajectory
        size = np.sqrt(np.abs(np.linalg.det(way.matrix)))[0]
        change = math.log(size[-1] / size[0])
        assert (change > 0.05) == (motion == "stretch")
        assert (change < -0.05) == (motion == "compress")
        assert abs(change) < 1e-9 or motion in ("stretch", "compress")
        # Distances of the wedges from one another, in the sprite's own coordinates.
        own = np.linalg.solve(way.matrix, (way.centre - way.centre[:1])[..., None])[..., 0]
        apart = np.linalg.norm(own, axis=-1).mean(0)
        assert (apart[-1] - apart[0] > 0.1) == (motion == "explode")


def test_captions_come_apart_and_say_the_motion():
    for index in range(30):
        scene = draw_scene(World(backwards=0.5), 0, index)
        subject, motion = split_caption(scene.caption)
        assert (subject, motion) == (scene.subject, scene.motion_words)
        assert join_caption(subject, motion) == scene.caption
        assert motion_of(scene.caption) == scene.motion
        assert scene.appearance.colour in subject
        assert scene.appearance.shape in subject
        assert scene.appearance.colour not in motion
    with pytest.raises(UsageError):
        split_caption("a red star rolls")
    with pytest.raises(UsageError):
        join_caption("a red | star", "rolls")


def test_a_folder_is_written_continued_and_guarded(tmp_path: Path):
    arguments = ["proving-ground", "--size", "32", "--truth", "true", "--out", str(tmp_path), "--longest", "20"]
    assert main([*arguments, "--clips", "12"]) == 0
    first = {f.name: f.read_bytes() for f in sorted(tmp_path.rglob("*0.*"))}
    assert main([*arguments, "--clips", "30"]) == 0
    assert all((next(tmp_path.rglob(name))).read_bytes() == content for name, content in first.items())
    rows = pq.read_table(tmp_path / "clips.parquet").to_pylist()
    assert [r["motion"] for r in rows] == list(MOTIONS) * 3
    seen = {s: {(r["shape"], r["colour"]) for r in rows if r["split"] == s} for s in ("train", "validation")}
    assert seen["train"]
    assert seen["validation"]
    assert not seen["train"] & seen["validation"]
    assert len({r["frames"] for r in rows}) > 2
    for r in rows[::9]:
        index = int(r["id"].split("/")[1])
        scene = draw_scene(World(size=32, longest=20), 0, index, r["split"] == "validation")
        frames, truth = render_with_truth(scene)
        written = read_frames(tmp_path / r["video"], range(r["frames"]))
        assert written.shape == frames.shape
        # H.264 keeps colour at half the resolution.
        assert np.abs(written.astype(int) - frames).mean() < 4.0
        held = read_truth(tmp_path / "truth" / f"{index:06d}.npz")
        assert all(np.array_equal(getattr(held, k), getattr(truth, k)) for k in truth.__dataclass_fields__)
        assert r["g"] == scene.parameters.get("g")
    assert main([*arguments[:2], "64", *arguments[3:], "--clips", "30"]) == 2


def test_two_folders_of_one_seed_hold_the_same(tmp_path: Path):
    """To the bit: tables, truth and videos, also where other things were encoded before."""
    for name in ("a", "b"):
        write_clips(tmp_path / name, World(size=32), 24, seed=9, truth=True)
        write_clips(tmp_path / f"{name}-other", World(size=32), 6, seed=10)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 6 + 2 * 24
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_datamodule_serves_held_out_appearances_for_validation(tmp_path: Path):
    data = ProvingGroundData(str(tmp_path / "w"), clips=24, validation_share=0.3, size=32, batch_size=4, num_workers=0)
    data.setup("fit")
    train, validation = list(data.train_dataloader()), list(data.val_dataloader())
    count = sum(len(b) for b in validation)
    assert sum(len(b) for b in train) >= 24 - count > 0
    assert train[0].pixels.shape == (4, 3, 17, 32, 32)
    subjects = [{split_caption(p)[0] for b in batches for p in b.prompts} for batches in (train, validation)]
    assert subjects[1]
    assert not subjects[0] & subjects[1]
    other = ProvingGroundData(str(tmp_path / "w"), clips=24, validation_share=0.3, size=32, world_seed=1)
    with pytest.raises(UsageError, match="seed"):
        other.setup("fit")


def test_motion_weights_come_from_the_cache(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]):
    options: dict[str, Any] = dict(clips=4, validation_share=0.5, size=16, frames=5, batch_size=2, num_workers=0)
    root = str(tmp_path / "w")
    ProvingGroundData(root, **options).setup("fit")
    model = ["--model=Finetuning", "--model.losses=[Denoising]", "--model.backbone=Pretrained"]
    model += [f"--model.backbone.path={tiny_checkpoint('wan')}"]
    data = ["--data=ProvingGroundData", *(f"--data.{name}={value}" for name, value in options.items())]
    where = [f"--data.folder={root}", f"--out={tmp_path / 'cache'}", "--motion=DIS", "--weights.floor=0.0"]
    assert main(["cache", *model, *data, *where]) == 0
    with pytest.raises(UsageError, match="there is no cache to read them from"):
        ProvingGroundData(root, motion_weights=True, **options)
    read = ProvingGroundData(root, motion_weights=True, cache=str(tmp_path / "cache"), **options)
    read.setup("fit")
    for batch in (*read.train_dataloader(), *read.val_dataloader()):
        assert batch.weights.shape == (len(batch), 1, *batch.latents.shape[2:])
        assert float(batch.weights.max()) > 0.1


def test_what_is_not_given_of_a_world_is_as_usual():
    assert World.of(size=32, motions=None, shapes=["disk", "star"]) == World(32, shapes=("disk", "star"))


def test_a_world_may_have_some_of_everything():
    world = World(
        size=32, motions=("slide", "swing"), shapes=("disk", "star"), colours=("red", "blue", "pink"), scale=1.3
    )
    scenes = [draw_scene(world, 0, index, held_out=bool(index % 3 == 0)) for index in range(40)]
    assert [s.motion for s in scenes[:4]] == ["slide", "swing", "slide", "swing"]
    assert {s.appearance.shape for s in scenes} == {"disk", "star"}
    assert {s.appearance.colour for s in scenes} == {"red", "blue", "pink"}
    assert all(s.appearance.held_out == (i % 3 == 0) for i, s in enumerate(scenes))
    plain = draw_scene(World(size=32, motions=("slide", "swing")), 0, 0)
    large = draw_scene(World(size=32, motions=("slide", "swing"), scale=1.3), 0, 0)
    assert large.sprites[-1].trajectory.radius == pytest.approx(1.3 * plain.sprites[-1].trajectory.radius)


@pytest.mark.parametrize("anti_leak", [False, True])
def test_a_world_of_another_pace_shows_the_same_clips_slower(anti_leak: bool):
    usual, slow = World(size=32, anti_leak=anti_leak), World(size=32, anti_leak=anti_leak, pace=0.7)
    # How what has a clock of its own goes with the pace; what takes the clip to get where it goes does not.
    power = {"period": -1, "omega": 1, "start": -1}
    seen = set()
    for index in range(40):
        one, other = draw_scene(usual, 3, index), draw_scene(slow, 3, index)
        assert one.caption == other.caption
        for name, value in one.parameters.items():
            expected = power.get(name, 0) if name != "g" or one.motion != "bounce" else 2
            assert other.parameters[name] == pytest.approx(value * 0.7**expected), (one.motion, name)
            seen.add((one.motion, name))
        if one.motion in ("slide", "roll", "free fall", "stretch", "compress") and not anti_leak:
            assert np.array_equal(one.sprites[-1].trajectory.matrix, other.sprites[-1].trajectory.matrix)
            assert np.array_equal(one.sprites[-1].trajectory.centre, other.sprites[-1].trajectory.centre)
    assert {("swing", "period"), ("spin", "omega"), ("bounce", "g"), ("float", "period")} <= seen


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"motions": ("slid",)}, "slide"),
        ({"backgrounds": ()}, "backgrounds is empty"),
        ({"scale": 2.0}, "0.5 to 1.3"),
        ({"pace": 0.3}, "0.6 to 1.5"),
        ({"shapes": ("disk",), "colours": ("red",)}, "one in four"),
    ],
)
def test_a_world_that_is_none_is_refused(wrong: dict, said: str):
    with pytest.raises(UsageError) as caught:
        World(**wrong)
    assert said in str(caught.value)


def test_a_folder_of_before_there_were_such_options_is_continued(tmp_path: Path):
    write_clips(tmp_path, World(size=32), 2, seed=1)
    settings = json.loads((tmp_path / "world.json").read_text())
    (tmp_path / "world.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k not in ("motions", "scale", "pace")})
    )
    assert len(write_clips(tmp_path, World(size=32), 3, seed=1)) == 3
    with pytest.raises(UsageError, match="scale"):
        write_clips(tmp_path, World(size=32, scale=1.2), 3, seed=1)
