"""Learning rates over a run."""

import math

import pytest
import torch

from lightning_modules.optimization import LearningRate
from muybridge.errors import UsageError


def test_a_cosine_rises_and_falls():
    rate = LearningRate("cosine", warmup=9, floor=0.1)
    assert rate.factor(0, 109) == pytest.approx(0.1)
    assert rate.factor(9, 109) == pytest.approx(1.0)
    assert rate.factor(59, 109) == pytest.approx(0.55)
    assert rate.factor(109, 109) == pytest.approx(0.1)


def test_a_trapezoid_is_constant_and_then_a_line():
    rate = LearningRate("trapezoid", warmup=0, floor=0.0, falling=0.25)
    values = [rate.factor(u, 100) for u in (0, 50, 75, 80, 90, 100)]
    assert values == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.4, 0.0])
    # A longer run has the same beginning, so that a run can be made longer.
    assert all(rate.factor(u, 100) == rate.factor(u, 400) for u in range(75))


def test_a_constant_needs_no_end_and_the_others_do():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert LearningRate(warmup=1).schedule(optimizer, math.inf).get_last_lr() == [0.5]
    for shape in ("cosine", "trapezoid"):
        with pytest.raises(UsageError, match=shape):
            LearningRate(shape).schedule(optimizer, math.inf)
        assert LearningRate(shape, updates=10).schedule(optimizer, math.inf)


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"floor": 1.5}, {"falling": 0.0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LearningRate(**wrong)
