"""Agreement of flows: hand-computed cases, and clips that move alike whatever they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.metrics.similarity import FlowSimilarity, flow_agreement, flow_similarity
from muybridge.video import to_pixels


def constant(x: float, y: float) -> Tensor:
    return torch.tensor([x, y]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 4, 4).contiguous()


@pytest.mark.parametrize(
    ("u", "v", "similarity", "error", "ratio"),
    [
        ((1.0, 0.0), (1.0, 0.0), 1.0, 0.0, 1.0),
        ((2.0, 0.0), (1.0, 0.0), 1.0, 1.0, 2.0),
        ((0.0, 1.0), (1.0, 0.0), 0.0, 2.0**0.5, 1.0),
        ((-1.0, 0.0), (1.0, 0.0), -1.0, 2.0, 1.0),
        ((0.0, 0.0), (1.0, 0.0), 0.0, 1.0, 0.0),
        ((0.0, 0.0), (0.0, 0.0), 1.0, 0.0, 0.0),
    ],
)
def test_of_constant_flows(u: tuple, v: tuple, similarity: float, error: float, ratio: float) -> None:
    found = flow_agreement(constant(*u), constant(*v))
    assert found.similarity.item() == pytest.approx(similarity, abs=1e-6)
    assert found.error.item() == pytest.approx(error / 32**0.5, abs=1e-6)
    assert found.ratio.item() == pytest.approx(ratio, abs=1e-6)


def test_the_longer_flow_weighs() -> None:
    """Half of the pixels agree at length 3, half are opposite at length 1: (3 - 1)/(3 + 1)."""
    u = torch.zeros(1, 1, 2, 2, 2)
    u[:, :, 0, 0], u[:, :, 0, 1] = 3.0, 1.0
    v = u.clone()
    v[:, :, 0, 1] = -1.0
    assert flow_agreement(u, v).similarity.item() == pytest.approx(0.5)


def moving(colour: tuple[int, int, int], step: int, size: int = 48) -> Tensor:
    rng = np.random.default_rng(0)
    texture = rng.uniform(0.5, 1.0, (16, 16, 1))
    frames = np.full((5, size, size, 3), 30, np.uint8)
    start = 4 if step > 0 else 24
    for i in range(5):
        x = start + i * step
        frames[i, 16:32, x : x + 16] = (texture * np.array(colour)).astype(np.uint8)
    return to_pixels(frames)


def test_of_real_clips_the_motion_counts_and_not_the_look() -> None:
    reference = moving((255, 40, 40), 3)[None]
    alike = flow_similarity(moving((60, 200, 255), 3)[None], reference)
    back = flow_similarity(moving((255, 40, 40), -3)[None], reference)
    assert alike.item() > 0.8
    assert back.item() < 0.2
    metric = FlowSimilarity()
    metric.update(torch.cat([reference, moving((255, 40, 40), -3)[None]]), reference.expand(2, -1, -1, -1, -1))
    torch.testing.assert_close(metric.values, torch.cat([torch.ones(1), back]), atol=1e-4, rtol=1e-4)


def test_clips_of_different_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="two of"):
        flow_agreement(torch.zeros(1, 2, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4))
