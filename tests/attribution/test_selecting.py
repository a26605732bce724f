"""Selections follow their rule, ties included."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from muybridge.attribution.influence import Scores
from muybridge.attribution.report import influence_report
from muybridge.attribution.selecting import how_many, mean_percentile, overlap, rank, select, similarity, votes
from muybridge.errors import UsageError
from muybridge.report import render


def made(count: int = 50, queries: int = 4, seed: int = 0) -> Scores:
    values = np.random.default_rng(seed).normal(size=(count, queries)).astype(np.float32)
    return Scores([f"clip-{i:03d}" for i in range(count)], [f"query-{i}" for i in range(queries)], values)


def test_one_query_takes_its_best_and_ties_go_by_name() -> None:
    scores = made()
    best = select(scores, "10%", query="query-2")
    assert best == [scores.ids[i] for i in np.argsort(-scores.of("query-2"))[:5]]
    same = Scores(["b", "a", "c"], ["q"], np.array([[1.0], [1.0], [2.0]]))
    assert rank(same, query="q").ids == ["c", "a", "b"]


def test_votes_are_equation_sixteen_and_ties_go_by_mean_percentile() -> None:
    scores = made()
    counted = [sum(scores.values[n, q] > np.percentile(scores.values[:, q], 80) for q in range(4)) for n in range(50)]
    assert votes(scores, 80.0).tolist() == counted
    ranked = rank(scores, "vote", 80.0)
    percentile = dict(zip(scores.ids, mean_percentile(scores), strict=True))
    keys = [(-counted[scores.ids.index(n)], -percentile[n], n) for n in ranked.ids]
    assert keys == sorted(keys)
    assert max(counted) > 1
    # A query whose scores are larger counts no more than another.
    louder = Scores(scores.ids, scores.queries, scores.values * np.array([1.0, 100.0, 1.0, 1.0]))
    assert rank(louder, "vote", 80.0).ids == ranked.ids
    assert rank(louder, "mean").ids != rank(scores, "mean").ids


def test_percentile_ranks_are_shares_of_clips_below() -> None:
    scores = Scores(["a", "b", "c"], ["q"], np.array([[3.0], [1.0], [1.0]]))
    assert mean_percentile(scores).tolist() == [1.0, 0.25, 0.25]


def test_the_most_harmful_are_dropped() -> None:
    scores = made()
    kept = select(scores, "20%", drop=True, query="query-0")
    assert set(scores.ids) - set(kept) == {scores.ids[i] for i in np.argsort(scores.of("query-0"))[:10]}
    with pytest.raises(UsageError, match="would be dropped"):
        select(scores, "100%", drop=True)


def test_a_vote_against_the_most_harmful_is_not_one_for_the_best() -> None:
    # "torn" is best for one query and worst for four; "plain" is in the middle for all, so that no query votes for it.
    ids = ["torn", "plain", *(f"clip-{i}" for i in range(8))]
    values = np.random.default_rng(0).uniform(-0.5, 0.5, size=(10, 5))
    values[0], values[1] = [9.0, -9.0, -9.0, -9.0, -9.0], 0.0
    scores = Scores(ids, [f"query-{i}" for i in range(5)], values)
    assert votes(scores, 80.0)[:2].tolist() == [1, 0]
    kept = select(scores, 1, drop=True, percentile=80.0)
    assert "torn" not in kept
    assert len(kept) == 9
    assert kept == [name for name in rank(scores, percentile=80.0).ids if name != "torn"], "in the order of the vote"


def test_controls() -> None:
    scores = made()
    drawn = select(scores, 10, how="random", seed=1)
    assert len(set(drawn)) == 10
    assert drawn == select(made(seed=5), 10, how="random", seed=1), "by names alone"
    assert drawn != select(scores, 10, how="random", seed=2)
    lengths = {name: float(i % 7) for i, name in enumerate(scores.ids)}
    ranked = rank(scores, "value", values=lengths)
    assert ranked.columns["value"] == sorted(lengths.values(), reverse=True)
    assert ranked.ids[:8] == [*sorted(n for n, v in lengths.items() if v == 6.0), "clip-005"]
    with pytest.raises(UsageError, match="no finite value, such as clip-001"):
        rank(scores, "value", values={**lengths, "clip-001": float("nan")})
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 3, 8, 8))
    near = similarity([("one", 3 * one + 5), ("two", two), ("not", -one)], [one])
    assert near["one"] == pytest.approx(1.0)
    assert near["not"] == pytest.approx(-1.0)
    assert abs(near["two"]) < 0.5
    with pytest.raises(UsageError, match="clips of 192 and 768 numbers"):
        similarity([("large", rng.normal(size=(3, 16, 16)))], [one])


def test_overlap_of_queries() -> None:
    scores = made(queries=2)
    twice = Scores(
        scores.ids, ["a", "b", "c"], np.column_stack([scores.values[:, 0], -scores.values[:, 0], scores.values[:, 0]])
    )
    assert overlap(twice, 5).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(("top", "count"), [("10%", 20), ("0.5", 100), (7, 7), ("7", 7), ("0.1%", 1), ("100%", 200)])
def test_how_many(top: str | int, count: int) -> None:
    assert how_many(top, 200) == count


@pytest.mark.parametrize("top", ["0", "-5%", "101%", "201", "2.5", "all", ""])
def test_bad_numbers_are_refused(top: str) -> None:
    with pytest.raises(UsageError):
        how_many(top, 200)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="no query 'x'"):
        rank(made(), query="x")
    with pytest.raises(UsageError, match="percentile is 100"):
        rank(made(), percentile=100.0)


def test_the_page_shows_both_ends_and_escapes_names(tmp_path: Path) -> None:
    scores = made(20, 2)
    scores = Scores(["<b>odd", *scores.ids[1:]], scores.queries, scores.values, {"still": "zero"})
    videos = {name: tmp_path / "videos" / f"{i}.mp4" for i, name in enumerate(scores.ids)}
    (tmp_path / "videos").mkdir()
    for i, file in enumerate(videos.values()):
        file.write_bytes(b"video %d" % i * 200)
    chosen = select(scores, 5)

    def page(embed_mib: float) -> str:
        where = tmp_path / "out" / "report.html"
        return render(influence_report(where, scores, chosen, {"top": 5}, videos, {}, 3, embed_mib=embed_mib))

    order = rank(scores, query="query-0")
    # Few videos stand in the page, and many are referred to.
    for text, said in (
        (page(1.0), lambda i: f"base64,{base64.b64encode(b'video %d' % i * 200).decode()}"),
        (page(0.01), lambda i: f'src="../videos/{i}.mp4"'),
    ):
        assert "<b>odd" not in text
        for name in order.ids[:3] + order.ids[-3:]:
            assert said(scores.ids.index(name)) in text
        assert text.count("<svg") == 2
        assert "still (zero)" in text
        assert "no video known" in text, "the queries have none"
    assert "base64" not in page(0.01)
    shares = re.findall(r'class="portion"[^>]*>(\d+)%', page(1.0))
    assert shares == [f"{100 * share:.0f}" for share in overlap(scores, 5).ravel()]


def test_some_queries_alone_vote() -> None:
    scores = made()
    some = scores.only(["query-3", "query-1"])
    assert some.queries == ["query-1", "query-3"]
    assert np.array_equal(some.values, scores.values[:, [1, 3]])
    assert rank(some).ids != rank(scores).ids
    with pytest.raises(UsageError, match="no query 'x'"):
        scores.only(["query-1", "x"])
