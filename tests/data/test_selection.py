"""Selections name clips exactly; weights and repeats make epochs that are functions of (seed, epoch)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from muybridge.data.selection import plan, read_selection, restrict, weighted_order, write_selection
from muybridge.errors import UsageError

IDS = ["a/one", "a/two", "b/three@0-48", "b/three@48-96", "b/four"]


def put(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_places_in_the_source_s_order(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"chosen.{suffix}"
    wanted = ["b/four", "a/two", "b/three@48-96"]
    if suffix == "txt":
        put(file, "\n".join(wanted) + "\n\n")
    elif suffix == "csv":
        put(file, "score,id\n" + "".join(f"1.5,{w}\n" for w in wanted))
    else:
        pq.write_table(pa.table({"id": wanted, "score": [1.0, 2.0, 3.0]}), file)
    assert restrict(read_selection(file), IDS) == [1, 3, 4]
    assert plan(IDS, str(file)).places == [1, 3, 4]
    assert plan(IDS, str(file)).weights is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    meta = {"query": "a dog runs", "share": 0.1, "method": ["tracker", 3]}
    path = write_selection(tmp_path / "deep" / "s.parquet", IDS[:3], [1.0, 0.25, 3.0], meta)
    back = read_selection(path)
    assert (back.ids, back.weights, back.meta, len(back)) == (IDS[:3], [1.0, 0.25, 3.0], meta, 3)
    assert [p.name for p in path.parent.iterdir()] == ["s.parquet"]


def test_unknown_ids_are_counted_and_three_are_shown(tmp_path: Path) -> None:
    file = put(tmp_path / "s.txt", "\n".join(["a/one", *(f"gone-{i}" for i in range(5))]))
    with pytest.raises(UsageError, match=r"names 5 ids that the source lacks, such as gone-0, gone-1, gone-2\n"):
        plan(IDS, file)


@pytest.mark.parametrize(
    ("name", "hint"), [("b/three", r"is a whole video.*such as b/three@0-48"), ("a/one@0-16", "takes a/one whole")]
)
def test_whole_videos_and_parts_do_not_match_one_another(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        plan(IDS, put(tmp_path / "s.txt", name))


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("s.txt", "", "is empty"),
        ("s.txt", "a/one\na/two\na/one", "names 1 ids more than once, such as a/one"),
        ("s.csv", "name\na/one", "has the columns name"),
        ("s.csv", "id,weight\na/one,heavy", "line 2: weight is 'heavy'"),
        ("s.csv", "id,weight\na/one,-1", "negative or not finite"),
        ("s.csv", "id,weight\na/one,nan", "negative or not finite"),
        ("s.csv", "id,weight\na/one,0\na/two,0", "all 2 weights are 0"),
        ("s.parquet", "no parquet", "can't be read as Parquet"),
        ("s.json", "[]", "with a column id"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, file: str, text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        plan(IDS, put(tmp_path / file, text))


def test_a_selection_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        plan(IDS, str(tmp_path / "none.txt"))
    (tmp_path / "s.txt").write_bytes(b"a/one\n\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8"):
        plan(IDS, str(tmp_path / "s.txt"))


def test_repeats_multiply_the_epoch() -> None:
    assert plan(IDS, repeats=3).places == [0, 1, 2, 3, 4] * 3
    with pytest.raises(UsageError, match="repeats is 0"):
        plan(IDS, repeats=0)


def test_weights_from_the_selection_or_from_a_file_of_their_own(tmp_path: Path) -> None:
    chosen = put(tmp_path / "s.csv", "id,weight\nb/four,2\na/one,1\n")
    other = put(tmp_path / "w.csv", "id,weight\n" + "".join(f"{name},{i}\n" for i, name in enumerate(IDS)))
    assert plan(IDS, chosen, repeats=2) == plan(IDS, chosen, None, 2)
    assert plan(IDS, chosen, repeats=2).weights == [1.0, 2.0, 1.0, 2.0]
    assert plan(IDS, chosen, other).weights == [0.0, 4.0]
    assert plan(IDS, None, other).weights == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_weights_that_miss_a_clip_or_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weight for 4 of 5 clips, such as a/two"):
        plan(IDS, None, put(tmp_path / "w.csv", "id,weight\na/one,1\n"))
    with pytest.raises(UsageError, match="has no weights"):
        plan(IDS, None, put(tmp_path / "w.txt", "\n".join(IDS)))


def test_weighted_draws_follow_the_weights() -> None:
    """χ² with 4 degrees of freedom stays below 23.5 (p = 1e-4) for a right sampler; the seed is fixed."""
    weights, count = [1.0, 0.0, 2.0, 5.0, 0.5, 1.5, 0.0], 20000
    drawn = torch.bincount(torch.tensor(weighted_order(weights, count, 3, 0)), minlength=7)
    expected = torch.tensor(weights) / sum(weights) * count
    assert drawn[1] == drawn[6] == 0
    some = expected > 0
    chi2 = ((drawn[some] - expected[some]) ** 2 / expected[some]).sum()
    assert chi2 < 23.5


def test_weighted_orders_are_functions_of_seed_and_epoch() -> None:
    weights = torch.linspace(0.1, 1.0, 50).tolist()
    first = weighted_order(weights, 50, 0, 0)
    assert first == weighted_order(weights, 50, 0, 0)
    assert first != weighted_order(weights, 50, 0, 1)
    assert first != weighted_order(weights, 50, 1, 0)
    assert len(first) == 50
