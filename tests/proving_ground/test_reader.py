"""The reader reads what is shown, on looks it has not seen, and is made anew by its command."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from muybridge.cli.front import main
from muybridge.errors import UsageError
from muybridge.proving_ground import COLOURS, World, draw_scene, render
from muybridge.proving_ground.motions import STATIC
from muybridge.proving_ground.reader import OTHER, Reader, card, colour_of, kinematics, mirrored
from muybridge.proving_ground.reader_training import WORLDS, scores, slow_waves, train
from muybridge.proving_ground.tracking import track

FRESH = 77
"""A seed that neither training nor the card's test has seen."""


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_card_says_how_the_shipped_weights_read(name: str):
    """On fresh clips, to what chance allows: 3.5 standard errors of the two shares, and half a clip more."""
    clips, known = 40, card()
    for kind, damaged in (("as drawn", False), ("damaged", True)):
        found = scores(Reader.shipped(), WORLDS[name], clips, FRESH, damaged)
        for what, value in found.items():
            said = known["scores"][name][kind][what]
            spread = (max(said * (1.0 - said), 0.01) * (1.0 / clips + 1.0 / known["tested"]["clips"])) ** 0.5
            assert abs(value - said) < 3.5 * spread + 0.5 / clips, (kind, what, value, said)


def test_the_world_of_the_shipped_model_is_read_almost_without_fault():
    known = card()["scores"]["the shipped model's"]["as drawn"]
    assert known["motion"] >= 0.98
    assert known["shape"] >= 0.98
    assert known["colour"] >= 0.995


def test_the_card_says_what_it_is_about():
    assert card()["parameters"] == sum(p.numel() for p in Reader.shipped().parameters())
    assert card()["command"].startswith("muybridge proving-ground-reader --clips")


def test_a_reader_learns_from_few_clips():
    """Chance is 1 in 12 and 1 in 6."""
    reader = train(clips=700, seed=3, motion_epochs=25, shape_epochs=6)
    read = scores(reader, World(size=32, anti_leak=False), 100, FRESH)
    assert read["motion"] > 0.8
    assert read["shape"] > 0.5
    assert read["colour"] > 0.97


def test_its_command_makes_the_reader_of_its_seed(tmp_path: Path):
    arguments = ["--clips", "200", "--tested", "1", "--seed", "5", "--out", str(tmp_path)]
    assert main(["proving-ground-reader", *arguments]) == 0
    made, again = Reader.load(tmp_path / "reader.safetensors").state_dict(), train(200, seed=5).state_dict()
    assert all(torch.equal(made[name], again[name]) for name in made)
    known = json.loads((tmp_path / "reader.json").read_text())
    assert known["command"] == "muybridge proving-ground-reader --clips 200 --seed 5 --tested 1"
    assert known["scores"].keys() == WORLDS.keys()
    assert main(["proving-ground-reader", "--clips", "3", "--out", str(tmp_path / "c")]) == 2


def test_slow_waves_of_a_block_are_a_projection():
    """All of them are the frames; half of them keep each block's mean, and keeping them again changes nothing."""
    values = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    assert np.abs(slow_waves(values, 16, 16) - values).max() < 1e-2
    half = slow_waves(values, 8, 5)
    assert np.abs(slow_waves(half, 8, 5) - half).max() < 1e-2
    assert np.abs(half - values).mean() > 10.0
    means = [v.reshape(2, 4, 4, 4, 4, 3).mean((2, 4)) for v in (half, values)]
    assert np.abs(means[0] - means[1]).max() < 1e-2


@pytest.mark.parametrize("anti_leak", [False, True])
def test_a_mirror_and_slowness_do_what_the_kinematics_say(anti_leak: bool):
    for index in range(10):
        frames = render(draw_scene(World(anti_leak=anti_leak), 4, index))
        seen = torch.from_numpy(kinematics(track(frames)))
        other = torch.from_numpy(kinematics(track(np.ascontiguousarray(frames[:, :, ::-1]))))
        # The angle is unwrapped from another start: all but whole turns.
        assert torch.allclose(mirrored(seen)[[0, 1, 2, 3, 4, 5, 6, 10]], other[[0, 1, 2, 3, 4, 5, 6, 10]], atol=1e-4)
        # A frame every half frame, where half of them are the mean of their neighbours, is the same motion at half speed.
        slow = np.repeat(frames, 2, 0)[:-1].astype(float)
        slow[1::2] = 0.5 * (slow[1::2] + slow[2::2])
        slower = torch.from_numpy(kinematics(track(slow.astype(np.uint8))))
        assert (slower - seen)[:2].abs().mean() < 0.05


def test_colour_survives_a_blur_noise_and_fading():
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        for texture in ("half", "dot"):
            for index in range(2):
                world = World(size=32, colours=(colour,), textures=(texture,))
                frames = render(draw_scene(world, 6, index)).astype(float)
                frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.8) for frame in frames])
                grey = frames.mean(-1, keepdims=True)
                spoilt = grey + 0.75 * (frames - grey) + rng.normal(0.0, 4.0, frames.shape)
                assert colour_of(np.clip(spoilt, 0, 255).astype(np.uint8)) == colour


def test_nothing_is_read_as_nothing_and_a_still_thing_as_still():
    frames = render(draw_scene(World(size=32), 0, 0))
    (gone, still) = Reader.shipped().read([np.full_like(frames, 100), np.repeat(frames[:1], 17, 0)])
    assert (gone.motion, gone.shape, gone.colour) == (OTHER, None, None)
    assert still.motion == STATIC
    assert still.shape is not None


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    frames = render(draw_scene(World(size=32), 0, 0))
    for wrong in (frames[:4], frames.astype(np.float32), frames[..., :2], frames[0]):
        with pytest.raises(UsageError):
            Reader.shipped().read([wrong])
    with pytest.raises(UsageError, match="proving-ground-reader"):
        Reader.load(tmp_path / "none.safetensors")
    with pytest.raises(RuntimeError, match="eval"):
        Reader().train().read([frames])
