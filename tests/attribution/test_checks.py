"""What checks say of scores whose worth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from muybridge.attribution.checks import datamodelling, length_bias, ndcg, precision, shuffled
from muybridge.cli.bench.questions import held_out_choice
from muybridge.errors import UsageError


def halves(rng: np.random.Generator, models: int, clips: int) -> np.ndarray:
    return np.array([np.isin(np.arange(clips), rng.permutation(clips)[: clips // 2]) for _ in range(models)])


def test_the_datamodelling_score_is_one_where_scores_are_the_truth_and_nothing_by_chance() -> None:
    rng = np.random.default_rng(0)
    truth, chance = rng.normal(size=(2, 60, 40))
    subsets = halves(rng, 50, 60)
    losses = 3.0 - 0.1 * subsets @ truth
    assert datamodelling(truth, subsets, losses).tolist() == pytest.approx([1.0] * 40)
    assert datamodelling(-truth, subsets, losses).tolist() == pytest.approx([-1.0] * 40)
    # Any order of losses that is kept is as good: the score is of ranks.
    assert datamodelling(truth, subsets, np.exp(losses)).tolist() == pytest.approx([1.0] * 40)
    by_chance = datamodelling(chance, subsets, losses)
    assert abs(by_chance.mean()) < 4 / math.sqrt(50 * 40)
    noisy = datamodelling(truth + 2.0 * chance, subsets, losses).mean()
    # The correlation of a score with truth and twice as much noise is 1/√5.
    assert noisy == pytest.approx(1 / math.sqrt(5), abs=0.08)
    with pytest.raises(UsageError, match="3 models or more"):
        datamodelling(truth, subsets[:2], losses[:2])


def test_shuffled_clips_foretell_nothing_on_average_and_their_spread_is_that_of_chance() -> None:
    generator = np.random.default_rng(0)
    subsets = generator.random((40, 60)) < 0.5
    # One score for all queries and one loss: what they have in common is not averaged away by there being many queries.
    values, effect = (np.repeat(generator.standard_normal((60, 1)), 30, 1) for _ in range(2))
    common = shuffled(values, subsets, -(subsets @ effect))
    assert abs(common.mean()) < 4 * common.std() / len(common) ** 0.5
    assert common.std() == pytest.approx(1 / 39**0.5, rel=0.25)
    values, effect = (generator.standard_normal((60, 30)) for _ in range(2))
    own = shuffled(values, subsets, -(subsets @ effect))
    assert own.std() < 0.5 * common.std()
    assert datamodelling(effect, subsets, -(subsets @ effect)).mean() == 1.0 > own.max()


def test_precision_and_ndcg_of_known_rankings() -> None:
    values = np.array([[4.0], [3.0], [2.0], [1.0]])
    relevant = np.array([[True], [False], [True], [False]])
    assert precision(values, relevant, 2).tolist() == [0.5]
    assert ndcg(values, relevant, 3).tolist() == pytest.approx([(1 + 1 / 2) / (1 + 1 / math.log2(3))])
    assert ndcg(np.array([[4.0], [1.0], [3.0], [0.0]]), relevant, 2).tolist() == [1.0]
    # Queries are looked at one by one, and one to which nothing is relevant has nothing to find.
    both = precision(np.hstack([values, -values]), np.hstack([relevant, relevant]), 1)
    assert both.tolist() == [1.0, 0.0]
    assert ndcg(values, np.zeros((4, 1), bool), 2).tolist() == [0.0]


@pytest.mark.parametrize("per_frame", [True, False])
def test_the_factor_of_length_turns_the_bias_of_products_and_cancels_in_cosines(per_frame: bool) -> None:
    rng = np.random.default_rng(1)
    frames = np.repeat([2, 4, 8], 20)
    # Gradients of equal length with the factor, that all share something, as under one draw of noise.
    unit = rng.normal(size=(60, 500)) / math.sqrt(500) + 0.05
    kept = unit if per_frame else unit * frames[:, None]
    rows = {row.score: row for row in length_bias(kept @ kept.T, frames.tolist(), per_frame)}
    assert list(rows) == ["dot", "dot, with 1/F", "cosine"]
    assert rows["dot"].lengths > 0.9, "long clips win"
    assert rows["dot"].alike < rows["dot"].chance + 0.1
    for name in ("dot, with 1/F", "cosine"):
        assert abs(rows[name].lengths) < 0.4
        assert rows[name].alike == pytest.approx(rows[name].chance, abs=0.12)
    assert rows["cosine"].chance == pytest.approx(19 / 59)
    # What clips of one length have in common, such as their draw of noise, no factor takes away.
    groups = rng.normal(size=(3, 500)) / math.sqrt(500)
    shared = unit + np.repeat(groups, 20, axis=0)
    (*_, cosine) = length_bias(shared @ shared.T, frames.tolist())
    assert cosine.alike == 1.0


def test_a_setting_is_chosen_on_other_queries_than_it_is_judged_by() -> None:
    # The first does best on the even queries, the second on the odd ones: each half is judged by the other's choice.
    swept = np.array([[1.0, 0.2, 1.0, 0.2], [0.1, 0.9, 0.1, 0.9]])
    assert held_out_choice(swept) == pytest.approx((0.1 + 0.2 + 0.1 + 0.2) / 4)
    assert held_out_choice(np.array([[0.3, 0.5], [0.4, 0.6]])) == pytest.approx(0.5)
    assert held_out_choice(np.array([[0.3], [0.9]])) == pytest.approx(0.3)
