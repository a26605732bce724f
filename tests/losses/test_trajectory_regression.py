"""Regression on trajectories: zero at their ends alone, and only noisy frames count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muybridge.diffusion import Conditioning, DenoisingStep, FlowSchedule, TrajectoryStep
from muybridge.errors import UsageError
from muybridge.losses import TrajectoryRegression

SHAPE = (2, 3, 4, 2, 2)


def step(x0: Tensor, clean: Tensor, t: Tensor) -> TrajectoryStep:
    zeros = torch.zeros(SHAPE)
    return TrajectoryStep(clean, zeros, t, zeros, x0, Conditioning(torch.zeros(2, 1, 1)), FlowSchedule())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_it_is_the_mean_square_over_noisy_frames(pair: tuple[Tensor, Tensor]) -> None:
    x0, clean = pair
    t = torch.tensor([[757.0, 757.0, 0.0, 0.0], [0.0, 1000.0, 522.0, 757.0]])
    loss = TrajectoryRegression()(step(x0, clean, t))
    wanted = [(x0[0, :, :2] - clean[0, :, :2]).square().mean(), (x0[1, :, 1:] - clean[1, :, 1:]).square().mean()]
    assert torch.allclose(loss, torch.stack(wanted), rtol=1e-6, atol=0)


def test_the_gradient_is_the_difference_and_clean_frames_have_none(pair: tuple[Tensor, Tensor]) -> None:
    x0, clean = pair
    x0.requires_grad_()
    t = torch.tensor([[757.0, 757.0, 0.0, 0.0]] * 2)
    TrajectoryRegression()(step(x0, clean, t)).sum().backward()
    assert x0.grad is not None
    wanted = 2.0 * (x0 - clean).detach() / (3 * 2 * 2 * 2)
    assert torch.allclose(x0.grad[:, :, :2], wanted[:, :, :2], rtol=1e-6, atol=0)
    assert not bool(x0.grad[:, :, 2:].any())


def test_it_is_zero_at_the_end_and_where_all_is_clean(pair: tuple[Tensor, Tensor]) -> None:
    x0, clean = pair
    assert TrajectoryRegression()(step(clean, clean, torch.full((2,), 500.0))).tolist() == [0.0, 0.0]
    assert TrajectoryRegression()(step(x0, clean, torch.zeros(2, 4))).tolist() == [0.0, 0.0]


def test_one_time_a_clip_counts_all_frames(pair: tuple[Tensor, Tensor]) -> None:
    x0, clean = pair
    loss = TrajectoryRegression()(step(x0, clean, torch.full((2,), 500.0)))
    assert torch.allclose(loss, (x0 - clean).square().flatten(1).mean(1), rtol=1e-6, atol=0)


def test_a_step_of_another_job_is_refused(pair: tuple[Tensor, Tensor]) -> None:
    x0, clean = pair
    other = DenoisingStep(
        clean, clean, clean, torch.zeros(2), x0, x0, x0, Conditioning(torch.zeros(2, 1, 1)), None, FlowSchedule()
    )
    with pytest.raises(UsageError, match="belongs to the job TrajectoryDistillation"):
        TrajectoryRegression()(other)  # type: ignore[arg-type]
