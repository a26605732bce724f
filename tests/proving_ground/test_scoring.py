"""The judge's table, on clips whose score is known, and the figures it is made of."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from muybridge.errors import UsageError
from muybridge.metrics.base import bootstrap, mean, share
from muybridge.proving_ground import Scene, World, draw_scene, render
from muybridge.proving_ground.reader import Reader
from muybridge.proving_ground.scoring import Scores, frechet, read_clips, real_scores
from muybridge.proving_ground.small import SMALL

COUNT = 48
SEVENTEEN = dataclasses.replace(SMALL, frames=17)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(SEVENTEEN, 31, index, held_out=True) for index in range(COUNT)]


@pytest.fixture(scope="module")
def clips(scenes: list[Scene]) -> list[np.ndarray]:
    return [render(scene) for scene in scenes]


@pytest.fixture(scope="module")
def real(scenes: list[Scene], clips: list[np.ndarray]) -> Scores:
    return read_clips(clips, [scene.caption for scene in scenes])


def test_real_clips_are_what_they_say(real: Scores, scenes: list[Scene]):
    figures = real.summary
    for name in ("motion", "shape", "colour", "all", "law"):
        assert figures[name].value >= 0.95, name
        assert figures[name].clips == COUNT
        assert figures[name].low < figures[name].value <= figures[name].high
    assert figures["static"].value == figures["absent"].value == 0.0
    assert figures["law_score"].value > 0.8
    assert "leak_shape" not in figures
    assert [row.caption for row in real.rows] == [scene.caption for scene in scenes]
    assert real.by_motion().keys() == set(SEVENTEEN.motions)
    assert sum(e.clips for e in real.by_motion().values()) == COUNT
    assert json.loads(json.dumps(real.table()))[3]["read_motion"] == real.rows[3].read_motion
    assert "motion" in str(real)


def test_spoilt_clips_are_scored_as_spoilt(real: Scores, scenes: list[Scene], clips: list[np.ndarray]):
    captions = [scene.caption for scene in scenes]
    order = np.random.default_rng(1).permutation(17)
    some = slice(0, 24)

    frozen = read_clips([np.repeat(f[8:9], 17, 0) for f in clips[some]], captions[some])
    assert frozen.summary["static"].value >= 0.95
    assert frozen.summary["motion"].value <= 0.05
    assert frozen.summary["shape"].value >= 0.9
    assert frozen.summary["smoothness"].value == 0.0

    shuffled = read_clips([f[order] for f in clips[some]], captions[some])
    assert shuffled.summary["motion"].value < 0.2
    assert shuffled.summary["law"].value < 0.35
    assert shuffled.summary["law_score"].value < 0.1
    assert shuffled.summary["smoothness"].value < real.summary["smoothness"].value - 0.2

    gone = read_clips([np.full_like(f, 107) for f in clips[:2]], captions[:2])
    assert gone.summary["absent"].value == 1.0
    assert gone.summary["all"].value == 0.0
    assert [row.read_law for row in gone.rows] == [None, None]

    # Another motion's caption; the subject is the same.
    wrong = [
        f"{a.split(' | ')[0]} | {b.split(' | ')[1]}" for a, b in zip(captions, captions[1:] + captions, strict=False)
    ]
    swapped = read_clips(clips[some], wrong[some])
    assert swapped.summary["motion"].value == 0.0
    assert swapped.summary["shape"].value >= 0.95


def features(frames: list[np.ndarray]) -> Scores:
    return Scores((), np.stack([read.features for read in Reader.shipped().read(frames)]))


def test_the_distance_of_motions_tells_worlds_from_drawings(real: Scores, clips: list[np.ndarray]):
    again = features([render(draw_scene(SEVENTEEN, 32, index, held_out=True)) for index in range(COUNT)])
    two = dataclasses.replace(SEVENTEEN, motions=("spin", "slide"))
    fewer = features([render(draw_scene(two, 33, index, held_out=True)) for index in range(COUNT)])
    frozen = features([np.repeat(f[8:9], 17, 0) for f in clips])
    near, few, far = real.distance(again), real.distance(fewer), real.distance(frozen)
    assert near < 0.5 * few
    assert near < 0.2 * far
    assert real.distance(real) == pytest.approx(0.0, abs=1e-6)


def test_what_is_drawn_is_the_ceiling():
    world = World(size=32, anti_leak=False)
    ceiling = real_scores(world, 10, seed=5)
    assert [row.asked_motion for row in ceiling.rows] == list(world.motions)
    assert ceiling.summary["motion"].value >= 0.9
    assert real_scores(world, 2, seed=5).rows == ceiling.rows[:2]


def test_frechets_distance_of_known_normal_laws():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet(a, a + shift) == pytest.approx(float((shift**2).sum()), rel=1e-9)
    # Twice as wide: tr(Σ) (2 - 1)².
    about = a - a.mean(0)
    assert frechet(about, 2.0 * about) == pytest.approx(float(np.trace(np.cov(a.T))), rel=1e-9)
    assert frechet(a, rng.normal(size=(4000, 3))) < 0.02
    # Fewer clips than dimensions: the covariances have no inverse, and none is needed.
    thin = rng.normal(size=(5, 64))
    assert frechet(thin, thin + 1.0) == pytest.approx(64.0, rel=1e-6)
    with pytest.raises(UsageError):
        frechet(a, a[:, :2])


def test_intervals_of_known_shares_and_means():
    # Wilson (1927) for 5 of 10, and for none of 20.
    assert share(5, 10)[:3] == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert share(0, 20)[:3] == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)
    assert math.isnan(share(0, 0).value)
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(values)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20.0, rel=0.1)
    assert mean(values).value == pytest.approx(float(values.mean()))


def test_lists_of_other_lengths_are_refused(clips: list[np.ndarray], scenes: list[Scene]):
    captions = [scene.caption for scene in scenes]
    for given in (
        (clips[:2], captions[:3]),
        ([], []),
        (clips[:1], captions[0]),
        (clips[:2], captions[:2], captions[:1]),
    ):
        with pytest.raises(UsageError):
            read_clips(*given)
    with pytest.raises(UsageError, match="one shape"):
        read_clips(clips[:1], ["a red thing | rolls"])
