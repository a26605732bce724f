"""Motion amount and smoothness of fields and clips whose values are known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from muybridge.errors import UsageError
from muybridge.metrics import MotionAmount, MotionSmoothness, dis_flow, motion_amount, motion_smoothness
from muybridge.proving_ground import World, draw_scene, render
from muybridge.video import to_pixels

SIDE = 64


def field(matrix: np.ndarray, shift: tuple[float, float] = (0.0, 0.0), count: int = 6) -> torch.Tensor:
    """Flow of places about the middle under a linear map and a shift."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    flow = np.stack([x, y], -1) @ (matrix - np.eye(2)).T + shift
    return torch.from_numpy(flow).permute(2, 0, 1).float().repeat(1, count, 1, 1, 1)


def rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def test_amount_of_known_fields():
    assert motion_amount(field(np.eye(2))) == 0.0
    assert motion_amount(field(np.eye(2), (3.0, 4.0))) == pytest.approx(5.0 / SIDE)
    # |R - 1| r = 2 sin(angle / 2) r, and (z - 1) r for a zoom; the mean r of all pixels of a square is 0.3826 of its side.
    assert motion_amount(field(rotation(0.1)), 1.0) == pytest.approx(2 * np.sin(0.05) * 0.3826, rel=1e-2)
    assert motion_amount(field(1.05 * np.eye(2)), 1.0) == pytest.approx(0.05 * 0.3826, rel=1e-2)


def test_smoothness_of_known_fields():
    assert motion_smoothness(field(np.eye(2), (2.0, 1.0))) == pytest.approx(1.0, abs=1e-5)
    assert motion_smoothness(field(np.eye(2))) == 0.0
    # A turn by an angle changes a velocity v by 2 sin(angle / 2) |v|; a zoom z by (z - 1) |v| of (z + 1) |v|.
    assert motion_smoothness(field(rotation(0.2))) == pytest.approx(1.0 - np.sin(0.1), abs=1e-3)
    assert motion_smoothness(field(0.9 * np.eye(2))) == pytest.approx(1.0 - 0.1 / 1.9, abs=1e-3)
    there_and_back = field(np.eye(2), (2.0, 0.0)).clone()
    there_and_back[:, 1::2] *= -1
    assert motion_smoothness(there_and_back) == pytest.approx(0.0, abs=1e-5)


def moving(step: tuple[float, float], jitter: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(0)
    big = cv2.GaussianBlur(rng.uniform(0, 255, (160, 160, 3)).astype(np.uint8), (0, 0), 2.0)
    big = cv2.normalize(big, None, 0, 255, cv2.NORM_MINMAX)
    frames = []
    for t in range(8):
        x, y = 48 - t * step[0] + rng.normal(0, jitter), 48 - t * step[1] + rng.normal(0, jitter)
        frames.append(cv2.warpAffine(big, np.float32([[1, 0, -x], [0, 1, -y]]), (SIDE, SIDE), flags=cv2.INTER_LINEAR))
    return to_pixels(np.stack(frames))[None]


def test_estimated_flow_gives_the_same():
    still, even, uneven = moving((0, 0)), moving((2, 1)), moving((2, 1), jitter=1.5)
    flow = dis_flow(even)
    assert flow.shape == (1, 7, 2, SIDE, SIDE)
    inner = flow[..., 8:-8, 8:-8].mean((0, 1, 3, 4))
    assert torch.allclose(inner, torch.tensor([2.0, 1.0]), atol=0.1)
    amount, smooth = MotionAmount(share=1.0), MotionSmoothness()
    for clip in (still, even, uneven):
        amount.update(clip)
        smooth.update(clip)
    assert amount.values[0] < 1e-3
    assert amount.values[1] == pytest.approx(5**0.5 / SIDE, rel=0.1)
    assert smooth.values[0] == 0.0
    assert smooth.values[1] > 0.9
    assert smooth.values[2] < smooth.values[1] - 0.1
    assert amount.compute() == pytest.approx(float(amount.values.mean()))


def test_flow_given_is_what_counts():
    metric = MotionAmount()
    metric.update(moving((2, 1)), field(np.eye(2), (3.0, 4.0)))
    assert metric.compute() == pytest.approx(5.0 / SIDE)
    with pytest.raises(UsageError):
        motion_smoothness(field(np.eye(2), count=1))


def test_amount_and_smoothness_of_clips_that_were_tampered_with():
    """Of the same clips frozen, shuffled, run backwards and shown at half speed; what a caption says changes neither."""
    scenes = [
        draw_scene(World(anti_leak=False), 3, i, motion=m)
        for i, m in enumerate(("slide", "roll", "float", "free fall"))
    ]
    frames = [render(scene) for scene in scenes]
    order = np.random.default_rng(0).permutation(17)

    def figures(change) -> tuple[torch.Tensor, torch.Tensor]:
        flow = dis_flow(torch.stack([to_pixels(np.ascontiguousarray(change(f))) for f in frames]))
        return motion_amount(flow), motion_smoothness(flow)

    amount, smooth = figures(lambda f: f)
    assert (amount > 0.01).all()
    still, none = figures(lambda f: np.repeat(f[8:9], 17, 0))
    assert still.max() < 1e-3
    assert none.max() == 0.0
    jumps, rough = figures(lambda f: f[order])
    assert (jumps > 1.2 * amount).all()
    assert (rough < smooth - 0.1).all()
    back, also_smooth = figures(lambda f: f[::-1])
    assert torch.allclose(back, amount, rtol=0.15)
    assert torch.allclose(also_smooth, smooth, atol=0.1)
    # Every frame twice: half of the steps are none, so a step has half the length, and no velocity lasts.
    half, stop_and_go = figures(lambda f: np.repeat(f, 2, 0)[:-1])
    assert torch.allclose(half, 0.5 * amount, rtol=0.02)
    assert stop_and_go.max() < 0.1
