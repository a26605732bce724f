"""Accuracy by the reader, and leakage, on clips whose score is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from muybridge.errors import UsageError
from muybridge.metrics import Leakage, ReaderAccuracy, leak
from muybridge.proving_ground import MOTIONS, SHAPES, Scene, World, draw_scene, render
from muybridge.proving_ground.captions import WORDS, join_caption, subject_words
from muybridge.proving_ground.reader import READS
from muybridge.video import to_pixels

COUNT = 30
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module", params=[False, True], ids=["natural", "anti-leak"])
def clips(request: pytest.FixtureRequest) -> list[tuple[Scene, np.ndarray]]:
    scenes = [
        draw_scene(World(size=64 if request.param else 32, anti_leak=request.param), 41, i, held_out=True)
        for i in range(COUNT)
    ]
    return [(scene, render(scene)) for scene in scenes]


def pixels(frames: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.stack([to_pixels(np.ascontiguousarray(f)) for f in frames])


def accuracy(clips: list[tuple[Scene, np.ndarray]], change: Change = lambda frames: frames) -> ReaderAccuracy:
    metric = ReaderAccuracy("motion")
    metric.update(pixels([change(frames) for _, frames in clips]), [scene.caption for scene, _ in clips])
    return metric


def test_real_clips_are_read_right_and_broken_ones_are_not(clips: list[tuple[Scene, np.ndarray]]):
    assert accuracy(clips).compute() >= 0.95

    frozen = accuracy(clips, lambda f: np.repeat(f[8:9], len(f), 0))
    assert frozen.compute() == 0.0
    assert frozen.confusion[:, READS.index("static")].sum() >= 0.95 * COUNT

    order = np.random.default_rng(1).permutation(17)
    assert accuracy(clips, lambda f: f[order]).compute() <= 0.15

    gone = accuracy(clips, lambda f: np.concatenate([f[:8], np.full_like(f[8:], 100)]))
    assert gone.compute() == 0.0

    # Every frame twice is the same motion at half speed.
    assert accuracy(clips, lambda f: np.repeat(f, 2, 0)).compute() >= 0.9


def test_backwards_some_motions_are_others(clips: list[tuple[Scene, np.ndarray]]):
    read = accuracy(clips, lambda f: f[::-1]).confusion
    for motion, reverse in (("stretch", "compress"), ("spin", "spin"), ("swing", "swing"), ("float", "float")):
        row = read[READS.index(motion)]
        assert row[READS.index(reverse)] >= 0.75 * row.sum(), motion
    assert read[READS.index("explode"), READS.index("explode")] == 0


def test_a_wrong_caption_is_not_read(clips: list[tuple[Scene, np.ndarray]]):
    """Accuracy of each attribute is that of the attribute alone."""
    some = clips[:10]
    shown = pixels([frames for _, frames in some])
    others = [join_caption(s.subject, WORDS[MOTIONS[(MOTIONS.index(s.motion) + 3) % 10]]) for s, _ in some]
    for what, expected in (("motion", 0.0), ("shape", 1.0), ("colour", 1.0)):
        metric = ReaderAccuracy(what)
        metric.update(shown, others)
        assert float(metric.compute()) == pytest.approx(expected, abs=0.11)
        low, high = metric.interval()
        assert low <= float(metric.compute()) <= high


def test_batches_add_up(clips: list[tuple[Scene, np.ndarray]]):
    whole, parts = ReaderAccuracy("shape"), ReaderAccuracy("shape")
    shown, captions = pixels([f for _, f in clips[:6]]), [s.caption for s, _ in clips[:6]]
    whole.update(shown, captions)
    parts.update(shown[:1], captions[:1])
    parts.update(shown[1:], captions[1:])
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.confusion, parts.confusion)
    with pytest.raises(UsageError):
        whole.update(shown, captions[:1])
    with pytest.raises(UsageError):
        ReaderAccuracy("size")  # type: ignore[arg-type]


# -- leakage -------------------------------------------------------------------------------------------------------


def looks(shape: str, colour: str, count: int = 4) -> torch.Tensor:
    """Natural clips of one look, whichever of training and validation it belongs to."""
    world = World(anti_leak=False, shapes=SHAPES)
    found, index = [], 0
    while len(found) < count:
        for held_out in (False, True):
            one = World(**{**world.__dict__, "colours": (colour,)})
            scene = draw_scene(one, 3, index, held_out, motion="slide")
            if scene.appearance.shape == shape:
                found.append(render(scene))
        index += 1
    return pixels(found[:count])


def caption(shape: str, colour: str) -> str:
    return join_caption(subject_words(shape, colour), "slides to the right")


def leakage(what: str, shown: torch.Tensor, asked: str, reference: str) -> Leakage:
    metric = Leakage(what)  # type: ignore[arg-type]
    metric.update(shown, [asked] * len(shown), [reference] * len(shown))
    return metric


def test_leakage_of_known_looks():
    red_star, blue_disk = looks("star", "red"), looks("disk", "blue")
    reference, other = caption("star", "red"), caption("disk", "blue")
    for what in ("shape", "colour"):
        # Asked for a blue disk after a red star: a blue disk leaks nothing, a red star all.
        assert leakage(what, blue_disk, other, reference).compute() == 0.0
        assert leakage(what, blue_disk, other, reference).excess == 0.0
        assert leakage(what, red_star, other, reference).compute() == 1.0
        assert leakage(what, red_star, other, reference).excess == 1.0
        assert leakage(what, torch.cat([red_star, blue_disk]), other, reference).compute() == 0.5
        # Asked for what the reference has, nothing can be told.
        assert len(leakage(what, red_star, reference, reference).values) == 0
    # One kind leaks without the other.
    half = looks("disk", "red")
    assert leakage("colour", half, other, reference).compute() == 1.0
    assert leakage("shape", half, other, reference).compute() == 0.0
    # Wrong, but not the reference's: below chance.
    assert leakage("shape", looks("cross", "blue"), other, reference).excess == pytest.approx(-0.25)


def test_guessing_leaks_nothing_above_chance():
    """Shapes read at random show the reference's in one of six clips; the excess is 0."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6000):
        want, had, read = (str(rng.choice(SHAPES)) for _ in range(3))
        one = leak("shape", caption(want, "red"), caption(had, "blue"), read)
        assert (one is None) == (want == had)
        found += [one] if one is not None else []
    assert np.mean([one.shown for one in found]) == pytest.approx(1.0 / 6.0, abs=0.02)
    assert np.mean([one.excess for one in found]) == pytest.approx(0.0, abs=0.02)
