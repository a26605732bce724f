"""The motion-weighted loss is the plain one at weights of one, and eq. 9 elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.denoising import denoising_inputs, open_tiny

from muybridge.diffusion import DenoisingStep, shared_noise
from muybridge.errors import UsageError
from muybridge.losses import Denoising, MotionWeightedDenoising

Tiny = Callable[[str], Path]


def step_of(path: Path, frames: int | None = None) -> DenoisingStep:
    backbone = open_tiny(path)
    clean, t, text = denoising_inputs(backbone)
    clean = clean[:, :, :frames]
    noise = shared_noise(tuple(clean.shape[1:]), 0).expand_as(clean)
    schedule = backbone.schedule
    noisy = schedule.add_noise(clean, noise, t)
    with torch.no_grad():
        prediction = backbone(noisy, t, text)
    x0, target = schedule.to_x0(prediction, noisy, t), schedule.target(clean, noise, t)
    ones = torch.ones(len(clean), 1, *clean.shape[2:])
    return DenoisingStep(clean, noise, noisy, t, prediction, target, x0, text, ones, schedule)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_weights_of_one_give_the_plain_loss(name: str, tiny_checkpoint: Tiny) -> None:
    step = step_of(tiny_checkpoint(name))
    frames = step.clean.shape[2]
    plain = Denoising()(step)
    assert torch.equal(MotionWeightedDenoising(per_frame=False)(step), plain)
    assert torch.equal(MotionWeightedDenoising()(step), plain / frames)
    assert torch.equal(MotionWeightedDenoising("ones")(replace(step, weights=None)), plain / frames)


def test_a_clip_of_one_frame_gives_the_plain_loss_exactly(tiny_checkpoint: Tiny) -> None:
    step = step_of(tiny_checkpoint("wan"), frames=1)
    assert torch.equal(MotionWeightedDenoising()(step), Denoising()(step))


def test_it_is_equation_nine(tiny_checkpoint: Tiny) -> None:
    step = step_of(tiny_checkpoint("wan"))
    weights = torch.rand(step.weights.shape, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    squared = (step.prediction - step.target).double().square().mean(1)
    wanted = (weights[:, 0] * squared).mean((1, 2, 3)) / step.clean.shape[2]
    torch.testing.assert_close(MotionWeightedDenoising()(replace(step, weights=weights)).double(), wanted)
    # A place without weight has no gradient.
    prediction = step.prediction.clone().requires_grad_()
    weights[:, :, :, 0] = 0.0
    MotionWeightedDenoising()(replace(step, weights=weights, prediction=prediction)).sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[:, :, :, 0].any()
    assert prediction.grad[:, :, :, 1].all()


def test_the_draw_is_shared_by_all_clips_of_a_shape() -> None:
    shape = (4, 3, 8, 8)
    assert torch.equal(shared_noise(shape, 0), shared_noise(shape, 0))
    assert not torch.equal(shared_noise(shape, 0), shared_noise(shape, 1))
    assert not torch.equal(shared_noise(shape, 0)[:, :2], shared_noise((4, 2, 8, 8), 0))
    assert float(shared_noise((16, 21, 60, 104), 3).std()) == pytest.approx(1.0, abs=0.01)


def test_missing_or_wrong_weights_are_named(tiny_checkpoint: Tiny) -> None:
    step = step_of(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match="without motion weights"):
        MotionWeightedDenoising()(replace(step, weights=None))
    with pytest.raises(UsageError, match="of shape"):
        MotionWeightedDenoising()(replace(step, weights=torch.ones(2, 1, 1, 1, 1)))
    with pytest.raises(UsageError, match="motion or ones"):
        MotionWeightedDenoising("flow")  # type: ignore[arg-type]
