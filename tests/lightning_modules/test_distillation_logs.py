"""What is logged of a distillation is what its name says, over the clips that are there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_modules.distillation_logs import of_critic, of_student
from muybridge.diffusion import Conditioning, ScoreStep


def over(ranks: int):
    """As many ranks that all hold the same."""
    return lambda values: ranks * values


def clip(*frames: int) -> Tensor:
    """One clip of one number a frame."""
    return torch.tensor(frames).float().view(1, 1, -1, 1, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_students_turn_tells_the_gap_the_motion_and_the_losses_shares(ranks: int):
    sample = torch.cat([clip(0, 2, 4), clip(0, 9, 0)])
    real, fake = torch.cat([clip(0, 1, 2), clip(5, 5, 5)]), torch.cat([clip(3, 1, 2), clip(0, 0, 0)])
    step = ScoreStep(sample, sample, torch.tensor([500.0, 500.0]), real, fake, Conditioning(torch.zeros(2, 1, 1)))
    gradients = [torch.full_like(sample, 3.0), torch.full_like(sample, 1.0)]
    total = torch.tensor(0.7).double()

    def told(present: Tensor | None) -> dict[str, float]:
        found = of_student(step, ["DMD", "MSM"], gradients, total, present, over(ranks), ranks)
        return {name.removeprefix("student/"): float(value) for name, value in found.items()}

    wanted = {"loss": 0.7, "x0_gap": 1.0, "motion": 4.0, "motion_of_teacher": 1.0, "motion_ratio": 4.0}
    shares = {"share_of_DMD": 0.75, "share_of_MSM": 0.25}
    assert told(torch.tensor([True, False])) == pytest.approx(wanted | shares)
    both = {"loss": 0.7, "x0_gap": 3.0, "motion": 42.5, "motion_of_teacher": 0.5, "motion_ratio": 85.0}
    assert told(None) == pytest.approx(both | shares)


def test_a_critics_turn_tells_its_loss_at_each_noise_level():
    value, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 100.0]), torch.tensor([0.0, 250.0, 499.0, 980.0, 600.0])
    present = torch.tensor([True, True, True, True, False])
    found = of_critic(value, 2.0 * value, t, present, over(2))
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        {
            "critic/loss": 15.0 / 4.0,
            "critic/loss_from_t000": 1.0,
            "critic/loss_from_t250": 3.0,
            "critic/loss_from_t750": 8.0,
            "critic/verdict": 7.5,
        }
    ), "no number for a level without a clip"
