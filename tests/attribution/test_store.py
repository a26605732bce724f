"""A store holds what was put in, once, whatever stopped the runs that wrote it; and refuses what does not belong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from muybridge.attribution.influence import influence, sweep, unit
from muybridge.attribution.store import UPDATES, InfluenceStore, StoreWriter, check_update, model_digest
from muybridge.data.content import text_key
from muybridge.errors import UsageError

DIM = 16
MANIFEST: dict[str, Any] = {
    "model": {"digest": "ab"},
    "noise_seed": 0,
    "projection": {"projection": "fastfood", "dim": DIM},
}


def vector(name: str, t: float = 500.0) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(int(text_key(f"{name} {t}")[:8], 16))) * 0.01


def fill(
    path: Path, count: int = 20, queries: int = 3, times: tuple[float, ...] = (500.0,), **options: Any
) -> StoreWriter:
    with StoreWriter(path, MANIFEST, **options) as writer:
        for t in times:
            for i in range(count):
                writer.add(f"clip-{i:03d}", "train", 0, t, vector(f"clip-{i}", t))
            for i in range(queries):
                writer.add(f"query-{i}", "query", 0, t, vector(f"query-{i}", t))
    return writer


def test_vectors_come_back_unnormalised_and_any_reader_can_read_them(tmp_path: Path) -> None:
    fill(tmp_path / "s", rows=8)
    store = InfluenceStore(tmp_path / "s")
    assert len(store.files) == 3
    found = {n: v for b in store.blocks("train", rows=3) for n, v in zip(b.ids, b.vectors, strict=True)}
    assert len(found) == 20
    assert all(np.array_equal(v, vector(f"clip-{int(n[5:])}").numpy()) for n, v in found.items())
    table = pq.read_table(tmp_path / "s")
    assert table.column_names == ["id", "part", "step", "timestep", "norm", "state", "vector"]
    row = table.to_pylist()[0]
    assert row["norm"] == pytest.approx(float(np.linalg.norm(row["vector"])), rel=1e-6)


def test_half_precision_is_refused_where_it_would_change_vectors(tmp_path: Path) -> None:
    fill(tmp_path / "s", dtype="float16")
    found = next(InfluenceStore(tmp_path / "s").blocks("train"))
    assert np.allclose(found.vectors[0], vector("clip-0").numpy(), rtol=2e-3, atol=1e-6)
    with (
        pytest.raises(UsageError, match="float16 would change it"),
        StoreWriter(tmp_path / "s", MANIFEST, dtype="float16") as w,
    ):
        w.add("small", "train", 0, 500.0, 1e-6 * vector("small"))


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    fill(tmp_path / "s", count=12, rank=0)
    again = fill(tmp_path / "s", count=20, rank=1)
    assert again.counts == {"ok": 8}
    assert InfluenceStore(tmp_path / "s").ids("train") == [f"clip-{i:03d}" for i in range(20)]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from attribution.test_store import MANIFEST, vector
from muybridge.attribution.store import StoreWriter
with StoreWriter(Path({path!r}), MANIFEST, rows=4) as writer:
    for i in range(11):
        writer.add(f"clip-{{i:03d}}", "train", 0, 500.0, vector(f"clip-{{i}}"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_loses_nothing_that_was_written_and_repeats_nothing(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    code = KILLED.format(tests=str(here.parents[1]), path=str(tmp_path / "s"))
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # A file that was being written when the power went has another name.
    (tmp_path / "s" / ".part-00000-000009-ff.parquet.1").write_bytes(b"half")
    assert len(InfluenceStore(tmp_path / "s").ids("train")) == 8
    assert fill(tmp_path / "s").counts == {"ok": 15}
    assert len(InfluenceStore(tmp_path / "s").ids("train")) == 20


def test_another_manifest_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    with pytest.raises(UsageError, match="noise_seed is 0 there and 1 here"):
        StoreWriter(tmp_path / "s", {**MANIFEST, "noise_seed": 1})
    fill(tmp_path / "other", queries=1)
    manifest = json.loads((tmp_path / "other" / "_manifest.json").read_text())
    (tmp_path / "other" / "_manifest.json").write_text(json.dumps({**manifest, "noise_seed": 1}))
    with pytest.raises(UsageError, match="noise_seed is 1 there and 0 here"):
        influence(InfluenceStore(tmp_path / "s"), InfluenceStore(tmp_path / "other"))
    (tmp_path / "other" / "_manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(UsageError, match="format 0"):
        InfluenceStore(tmp_path / "other")
    # A run that stored nothing binds no other.
    StoreWriter(tmp_path / "empty", MANIFEST)
    StoreWriter(tmp_path / "empty", {**MANIFEST, "noise_seed": 1})
    assert InfluenceStore(tmp_path / "empty").manifest["noise_seed"] == 1
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no influence store"):
        StoreWriter(tmp_path / "folder", MANIFEST)
    with pytest.raises(UsageError, match=r"no _manifest"):
        InfluenceStore(tmp_path / "nowhere")


def test_gradients_of_zero_or_beyond_numbers_are_noted_and_counted(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", MANIFEST) as writer:
        for t in (300.0, 500.0):
            writer.add("still", "train", 0, t, torch.zeros(DIM))
            writer.add("broken", "train", 0, t, torch.full((DIM,), float("nan")) if t > 400 else vector("broken"))
            writer.add("fine", "train", 0, t, vector("fine", t))
            writer.add("asked", "query", 0, t, vector("asked", t))
    assert writer.counts == {"zero": 2, "not finite": 1, "ok": 5}
    scores = influence(InfluenceStore(tmp_path / "s"))
    assert scores.ids == ["fine"]
    assert scores.excluded == {"still": "zero", "broken": "not finite"}
    assert np.isfinite(scores.values).all()


def test_ids_twice_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    (file,) = InfluenceStore(tmp_path / "s").files
    (tmp_path / "s" / "part-00001-000000-00.parquet").write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="23 clips twice"):
        InfluenceStore(tmp_path / "s").ids("train")
    (tmp_path / "s" / "part-00001-000000-00.parquet").write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="can't be read"):
        InfluenceStore(tmp_path / "s").ids("train")


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "s", count=4)

    def full(*arguments: Any, **options: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(UsageError, match="no room to write"):
            fill(tmp_path / "s")
    assert not [p for p in (tmp_path / "s").iterdir() if p.name.startswith(".")]
    assert fill(tmp_path / "s").counts == {"ok": 16}


def test_weights_of_an_update_are_not_mixed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", MANIFEST) as writer:
        for step in (0, 2):
            writer.add("clip", "train", step, 500.0, vector("clip"))
            writer.flush()
    noted = check_update(tmp_path / "s", 0, "aa")
    assert noted == {"0": "aa"}
    (tmp_path / "s" / UPDATES).write_text(json.dumps(noted))
    assert check_update(tmp_path / "s", 2, "bb") == {"0": "aa", "2": "bb"}
    first, second = InfluenceStore(tmp_path / "s").files
    with pytest.raises(UsageError, match=rf"update 0 under other weights.*\n.*\n.*remove {first.name} and go on"):
        check_update(tmp_path / "s", 0, "cc")
    # An update without rows binds nobody.
    first.unlink()
    assert check_update(tmp_path / "s", 0, "cc") == {"0": "cc"}
    assert second.is_file()
    fill(tmp_path / "t", times=(500.0,))
    fill(tmp_path / "u", times=(500.0,))
    for name, digest in (("t", "aa"), ("u", "bb")):
        (tmp_path / name / UPDATES).write_text(json.dumps({"0": digest}))
    with pytest.raises(UsageError, match="weights at updates is"):
        influence(InfluenceStore(tmp_path / "t"), InfluenceStore(tmp_path / "u"))


# -- scores --------------------------------------------------------------------------------------------------------------------


def matrices(store: InfluenceStore, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the clips and of the queries, in order of their names."""
    found = []
    for part in ("train", "query"):
        rows = {n: v for b in store.blocks(part) for n, k, v in zip(b.ids, b.keys, b.vectors, strict=True) if k[1] == t}  # type: ignore[arg-type]
        found.append(np.stack([rows[n] for n in sorted(rows)]).astype(np.float64))
    return found[0], found[1]


def test_scores_are_what_the_equations_say(tmp_path: Path) -> None:
    times = (300.0, 500.0, 800.0)
    fill(tmp_path / "s", times=times, rows=7)
    store = InfluenceStore(tmp_path / "s")
    pairs = [matrices(store, t) for t in times]
    cosine = np.mean([unit(a) @ unit(b).T for a, b in pairs], 0)
    assert np.allclose(influence(store).values, cosine, atol=1e-6)
    assert np.allclose(influence(store, kind="dot").values, np.mean([a @ b.T for a, b in pairs], 0), atol=1e-6)
    centred = [(a - a.mean(0), b - a.mean(0)) for a, b in pairs]
    assert np.allclose(
        influence(store, centre=True).values, np.mean([unit(a) @ unit(b).T for a, b in centred], 0), atol=1e-5
    )
    small, large = sweep(store, dampings=[0.3, 1e6])
    wanted = []
    for a, b in pairs:
        moment = unit(a).T @ unit(a) / len(a)
        inverse = np.linalg.inv(moment + 0.3 * np.trace(moment) / DIM * np.eye(DIM))
        wanted.append(unit(a) @ inverse @ unit(b).T * 0.3 * np.trace(moment) / DIM)
    assert np.allclose(small.values, np.mean(wanted, 0), atol=1e-5)
    assert np.allclose(large.values, cosine, atol=1e-4)


def test_scores_take_no_more_memory_for_a_larger_store(tmp_path: Path) -> None:
    manifest = {**MANIFEST, "projection": {"dim": 1024}}
    vectors = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    with StoreWriter(tmp_path / "s", manifest, rows=256) as writer:
        for i, one in enumerate(vectors):
            writer.add(f"clip-{i:04d}", "train", 0, 500.0, one)
        writer.add("query", "query", 0, 500.0, vectors[0])
    store = InfluenceStore(tmp_path / "s")
    store.ids("train")
    tracemalloc.start()
    try:
        values = influence(store, centre=True).values
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert values.shape == (4096, 1)
    # A file of 256 vectors and a few copies of it, of the 16 MiB that there are.
    assert peak < 0.5 * vectors.nbytes


def test_the_length_of_a_gradient_cancels(tmp_path: Path) -> None:
    """The factor 1/F of eq. 6 does nothing to a cosine."""
    fill(tmp_path / "s")
    with StoreWriter(tmp_path / "t", MANIFEST) as writer:
        for i in range(20):
            writer.add(f"clip-{i:03d}", "train", 0, 500.0, vector(f"clip-{i}") / (1 + i))
        for i in range(3):
            writer.add(f"query-{i}", "query", 0, 500.0, vector(f"query-{i}"))
    a, b = InfluenceStore(tmp_path / "s"), InfluenceStore(tmp_path / "t")
    assert np.allclose(influence(a).values, influence(b).values, atol=1e-6)
    assert not np.allclose(influence(a, kind="dot").values, influence(b, kind="dot").values, rtol=0.1)


def test_a_store_that_is_not_finished_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "s", times=(300.0, 500.0))
    with StoreWriter(tmp_path / "s", MANIFEST) as writer:
        writer.add("late", "train", 0, 300.0, vector("late"))
    with pytest.raises(UsageError, match=r"1 of 21 clips .* lack some of 300, 500, such as late"):
        influence(InfluenceStore(tmp_path / "s"))
    fill(tmp_path / "none", queries=0)
    with pytest.raises(UsageError, match="holds no queries"):
        influence(InfluenceStore(tmp_path / "none"))
    with pytest.raises(UsageError, match="damping"):
        influence(InfluenceStore(tmp_path / "s"), kind="kernel", damping=0.0)


def test_the_digest_is_of_every_bit() -> None:
    named = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16()}
    same = model_digest(named)
    assert model_digest(dict(reversed(named.items()))) == same
    named["a"][2, 1] = torch.nextafter(named["a"][2, 1], torch.tensor(9.0))
    assert model_digest(named) != same
