"""The law score of clips whose score is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from muybridge.errors import UsageError
from muybridge.metrics import LawScore, law_score
from muybridge.proving_ground import MOTIONS, World, draw_scene, render
from muybridge.proving_ground.laws import LAWS, judge
from muybridge.video import to_pixels

COUNT = 50


@pytest.fixture(scope="module", params=[False, True], ids=["natural", "anti-leak"])
def clips(request: pytest.FixtureRequest) -> list[tuple[str, np.ndarray]]:
    scenes = [draw_scene(World(anti_leak=request.param), 21, i) for i in range(COUNT)]
    return [(scene.motion, render(scene)) for scene in scenes]


def scored(clips: list[tuple[str, np.ndarray]], change=lambda frames: frames) -> LawScore:
    metric = LawScore()
    for motion, frames in clips:
        metric.update(to_pixels(np.ascontiguousarray(change(frames)))[None], [motion])
    return metric


def noisy(frames: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0.0, 255.0 * sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def blurred(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 0.8) for frame in frames])


def test_real_clips_score_high_and_broken_ones_low(clips: list[tuple[str, np.ndarray]]):
    real = scored(clips)
    assert real.compute() > 0.75
    assert real.accuracy >= 0.96
    low, high = real.interval()
    assert low < float(real.compute()) < high

    frozen = scored(clips, lambda f: np.repeat(f[8:9], len(f), 0))
    assert frozen.compute() < 0.02
    assert frozen.confusion[:, LAWS.index("static")].sum() == COUNT

    order = np.random.default_rng(1).permutation(17)
    assert scored(clips, lambda f: f[order]).compute() < 0.1

    gone = scored(clips, lambda f: np.concatenate([f[:8], np.full_like(f[8:], 100)]))
    assert gone.compute() == 0.0
    assert gone.confusion[:, -1].sum() == COUNT

    wrong = [(MOTIONS[(MOTIONS.index(m) + 3) % 10], f) for m, f in clips]
    assert scored(wrong).compute() < 0.1

    # Robust, in this order: blur and a little noise cost little, more noise more.
    assert scored(clips, blurred).compute() > 0.6
    little, much = (float(scored(clips, lambda f, s=s: noisy(f, s)).compute()) for s in (0.02, 0.12))
    assert float(real.compute()) + 0.03 > little > much
    assert little > 0.6


def test_backwards_a_stretched_thing_is_compressed_and_a_turn_goes_on():
    for index in range(6):
        for motion, reverse in (("stretch", "compress"), ("compress", "stretch"), ("spin", "spin"), ("swing", "swing")):
            frames = render(draw_scene(World(), 8, index, motion=motion))
            fits = judge(frames[::-1])
            assert max(fits, key=lambda name: fits[name].score) == reverse
        fits = judge(render(draw_scene(World(anti_leak=False), 8, index, motion="explode"))[::-1])
        assert fits["explode"].score < 0.05


def test_parameters_are_recovered_and_stretched_time_shows_in_them():
    """g and omega within 25 %, their median within 3 %; shown at half speed, a turn is half as fast and g a quarter."""
    wrong = []
    for index in range(8):
        for motion, name, power in (("spin", "omega", 1), ("free fall", "g", 2)):
            scene = draw_scene(World(size=64), 13, index, motion=motion)
            frames = render(scene)
            fitted = judge(frames)[motion].parameters[name]
            wrong.append(abs(fitted / scene.parameters[name] - 1.0))
            slow = judge(np.repeat(frames, 2, 0))[motion].parameters[name]
            assert slow == pytest.approx(fitted / 2**power, rel=0.25)
    assert max(wrong) < 0.25
    assert np.median(wrong) < 0.03


def test_a_metric_is_the_mean_of_its_function_and_merges():
    scenes = [draw_scene(World(), 2, i) for i in range(4)]
    pixels = torch.stack([to_pixels(render(scene)) for scene in scenes])
    motions = [scene.motion for scene in scenes]
    own, best = law_score(pixels, motions)
    metric = LawScore()
    metric.update(pixels[:1], motions[:1])
    metric.update(pixels[1:], motions[1:])
    assert torch.allclose(metric.values, own)
    assert metric.compute() == pytest.approx(float(own.mean()))
    assert metric.confusion.sum() == 4
    assert [LAWS[i] for i in best] == motions
    with pytest.raises(UsageError, match="spni"):
        law_score(pixels[:1], ["spni"])
