"""Displacement of clips whose motion is known, and what weights become of it."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from muybridge.errors import UsageError
from muybridge.motion import DIS, Displacement, MotionWeights, compensate_camera, magnitude, motion_weights
from muybridge.proving_ground import World, draw_scene, render_with_truth

SIDE = 64


def texture(size: int = 192) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (size, size, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.0), None, 0, 255, cv2.NORM_MINMAX)


def under(matrix: np.ndarray, shift: tuple[float, float], count: int = 4) -> np.ndarray:
    """Frames of a texture that a linear map about the middle, and a shift, carry on from frame to frame."""
    step = np.eye(3)
    middle = (SIDE - 1) / 2
    step[:2, :2] = matrix
    step[:2, 2] = middle - matrix @ [middle, middle] + shift
    carried, frames = np.eye(3), []
    carried[:2, 2] = [-(192 - SIDE) / 2] * 2
    for _ in range(count):
        frames.append(cv2.warpAffine(texture(), carried[:2], (SIDE, SIDE), flags=cv2.INTER_LINEAR))
        carried = step @ carried
    return np.stack(frames)


def rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def truth(matrix: np.ndarray, shift: tuple[float, float]) -> torch.Tensor:
    """The way of what is at each place of a frame, from the frame before."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    here = np.stack([x, y], -1)
    before = (here - np.array(shift)) @ np.linalg.inv(matrix).T
    return torch.from_numpy((here - before).transpose(2, 0, 1)).float()


@pytest.mark.parametrize(
    ("matrix", "shift"), [(np.eye(2), (2.0, -1.0)), (rotation(0.05), (0.0, 0.0)), (1.05 * np.eye(2), (0.0, 0.0))]
)
@pytest.mark.parametrize("occlusion", [False, True])
def test_known_flow_is_found_on_each_frames_own_grid(matrix: np.ndarray, shift: tuple[float, float], occlusion: bool):
    found = DIS(occlusion=occlusion)(under(matrix, shift))
    assert found.reference == "previous"
    assert found.vectors.shape == (4, 2, SIDE, SIDE)
    wanted = truth(matrix, shift)[:, 8:-8, 8:-8]
    for frame in found.vectors[1:]:
        assert float((frame[:, 8:-8, 8:-8] - wanted).abs().mean()) < 0.1
    # The first frame has none before it: its way is that to the second, on its own grid.
    first = found.vectors[0, :, 8:-8, 8:-8]
    assert float((first - wanted).abs().mean()) < 0.2
    assert found.visibility[..., 8:-8, 8:-8].mean() > 0.95
    assert 0.0 <= float(found.confidence.min()) <= float(found.confidence.max()) <= 1.0


def test_what_leaves_the_picture_is_not_seen():
    found = DIS(occlusion=True)(under(np.eye(2), (6.0, 0.0)))
    # What has come in at the left was not in the frame before.
    assert found.visibility[1:, :, :4].mean() < 0.1
    assert found.visibility[1:, :, 12:-12].mean() > 0.95


@pytest.mark.parametrize(
    ("motion", "side", "count"),
    [
        *(("slide", SIDE, 9), ("float", SIDE, 9), ("free fall", SIDE, 9)),
        # Rotation, slow enough to be followed from frame to frame, and zoom, in pixels enough to be seen.
        *(("spin", SIDE, 33), ("stretch", 256, 9), ("explode", 256, 9)),
    ],
)
def test_clips_of_the_proving_ground(motion: str, side: int, count: int):
    world = World(side, count, motions=(motion,))
    frames, known = render_with_truth(draw_scene(world, 0, 1))
    frames = frames[:9]
    mask, visible, flow = (torch.from_numpy(x[:n]) for x, n in ((known.mask, 9), (known.visible, 8), (known.flow, 8)))
    moving = mask[1:] & visible
    speed = float(flow.norm(dim=-1)[mask[:-1]].mean())
    assert speed > 0.5
    found = DIS()(frames)
    # It smooths a thing of ten pixels, and so sees it slower and larger than it is.
    assert 0.5 * speed < float(magnitude(found)[1:][moving].mean()) < 1.2 * speed
    weights = motion_weights(found, (9, side, side))[0, 1:]
    assert float(weights[moving].mean()) > 2 * float(weights[~moving].mean())


def test_a_still_clip_and_a_single_frame_have_no_motion():
    still = np.repeat(under(np.eye(2), (0, 0), 1), 5, axis=0)
    for frames in (still, still[:1]):
        found = DIS()(frames)
        weights = motion_weights(found, (1 + (len(frames) - 1) // 4, 8, 8))
        assert torch.equal(weights, torch.full_like(weights, 1e-6))
    # Noise of a codec is no motion either.
    noisy = np.clip(still.astype(int) + np.random.default_rng(1).integers(-2, 3, still.shape), 0, 255).astype(np.uint8)
    assert float(motion_weights(DIS()(noisy), (2, 8, 8)).max()) == pytest.approx(1e-6)
    assert float(motion_weights(DIS()(noisy), (2, 8, 8), MotionWeights(floor=0.0)).max()) > 0.1


def test_the_camera_is_taken_out():
    matrix = rotation(0.02) * 1.02
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    vectors = truth(matrix, (1.0, 2.0)).repeat(3, 1, 1, 1)
    inside = (x > 20) & (x < 34) & (y > 20) & (y < 34)
    vectors[:, 0] += 4.0 * inside
    ones = torch.ones(3, SIDE, SIDE)
    left = magnitude(compensate_camera(Displacement(vectors, ones, ones, "previous")))
    assert float(left[:, ~inside].max()) < 0.05
    assert float(left[:, inside].mean()) == pytest.approx(4.0, abs=0.05)
    moving = under(np.eye(2), (3.0, 0.0))
    assert float(magnitude(DIS()(moving)).mean()) > 2.5
    assert float(magnitude(DIS(camera="remove")(moving))[:, 8:-8, 8:-8].mean()) < 0.2


def known(lengths: torch.Tensor) -> Displacement:
    """A displacement to the right of given lengths."""
    ones = torch.ones_like(lengths)
    return Displacement(torch.stack([lengths, torch.zeros_like(lengths)], 1), ones, ones, "previous")


def test_weights_are_min_max_over_the_clip_and_averaged_over_the_frames_of_a_latent_frame():
    lengths = torch.arange(9.0)[:, None, None].expand(9, 16, 16).clone()
    weights = motion_weights(known(lengths), (3, 2, 2), MotionWeights(zeta=0.25))
    assert weights.shape == (1, 3, 2, 2)
    torch.testing.assert_close(weights[0, :, 0, 0], 0.25 + torch.tensor([0.0, 2.5, 6.5]) / 8)
    # A frame of its own for every frame, and a clip that moves everywhere alike.
    torch.testing.assert_close(motion_weights(known(lengths), (9, 16, 16))[0], 1e-6 + lengths / 8)
    alike = motion_weights(known(torch.full((5, 8, 8), 3.0)), (2, 4, 4), MotionWeights(zeta=0.0))
    torch.testing.assert_close(alike, torch.ones(1, 2, 4, 4))
    # What is hidden counts as still, where that is asked.
    shown = torch.ones(9, 16, 16)
    shown[:, :, 8:] = 0.0
    how = MotionWeights(zeta=0.0, only_visible=True)
    hidden = motion_weights(replace(known(lengths), visibility=shown), (3, 16, 16), how)
    torch.testing.assert_close(hidden[0, :, 0, 0], torch.tensor([0.0, 2.5, 6.5]) / 8)
    assert not hidden[..., 8:].any()


def test_weights_do_not_depend_on_how_fast_things_are():
    lengths = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0)) + 1.0
    torch.testing.assert_close(motion_weights(known(lengths), (2, 4, 4)), motion_weights(known(7 * lengths), (2, 4, 4)))


def test_every_pixel_counts_in_a_coarse_grid():
    lengths = torch.zeros(1, 64, 64)
    lengths[0, 0, 0] = 10.0
    shares = [motion_weights(known(lengths), (1, 8, 8), MotionWeights(antialias=a, zeta=0.0)) for a in (True, False)]
    assert float(shares[0].sum()) > 0
    assert float(shares[1].sum()) == 0.0


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="8 pixel frames and 3 latent frames"):
        motion_weights(known(torch.ones(8, 8, 8)), (3, 2, 2))
    with pytest.raises(UsageError, match="camera is 'off'"):
        DIS(camera="off")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uint8"):
        DIS()(np.zeros((2, 8, 8, 3)))
    assert DIS(camera="remove").key() != DIS().key()
