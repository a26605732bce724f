"""Rows on disk come back bit by bit, whoever wrote them, or it is said which don't."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from muybridge.data.shards import DTYPES, MappedTensors, ShardReader, ShardWriter, find_broken, parts, remove, sweep
from muybridge.errors import UsageError

NOTE = pa.schema([("note", pa.string())])


def row(index: int) -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(index))


def fill(folder: Path, count: int = 20, start: int = 0, **options: int) -> None:
    with ShardWriter(folder, NOTE, **options) as writer:
        for i in range(start, start + count):
            writer.add(f"clip {i}", {"x": row(i), "mask": row(i) > 0}, note=f"n{i}")


@pytest.mark.parametrize("options", [{"shard_bytes": 200}, {"shard_rows": 3}, {}])
def test_rows_come_back_bit_by_bit(tmp_path: Path, options: dict[str, int]) -> None:
    fill(tmp_path, **options)
    reader = ShardReader(tmp_path)
    assert len(parts(tmp_path)) == {"shard_bytes": 7, "shard_rows": 7}.get(next(iter(options), ""), 1)
    assert list(reader) == [f"clip {i}" for i in range(20)]
    for i in range(20):
        tensors = reader.read(f"clip {i}")
        assert torch.equal(tensors["x"], row(i))
        assert torch.equal(tensors["mask"], row(i) > 0)
        assert reader.info(f"clip {i}", "note", "shape", "bytes") == (f"n{i}", [3, 5], 75)
    assert reader.verify() == {}


def test_a_reader_travels_to_another_process_without_its_maps(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    reader = ShardReader(tmp_path)
    reader.read("clip 1")
    assert torch.equal(pickle.loads(pickle.dumps(reader)).read("clip 3")["x"], row(3))


def test_only_some_shards_stay_mapped_and_their_tensors_outlive_them(tmp_path: Path) -> None:
    fill(tmp_path, 6, shard_rows=1)
    reader = ShardReader(tmp_path)
    reader.open_shards = 2
    kept = [reader.read(f"clip {i}")["x"] for i in range(6)]
    assert len(reader._open) == 2
    assert all(torch.equal(x, row(i)) for i, x in enumerate(kept))


def test_a_view_does_not_drag_its_batch_into_the_file(tmp_path: Path) -> None:
    big = torch.zeros(1000, 1000)
    with ShardWriter(tmp_path) as writer:
        writer.add("a", {"x": big[3, :4]})
        big.fill_(1.0)
    assert torch.equal(ShardReader(tmp_path).read("a")["x"], torch.zeros(4))
    assert (tmp_path / "000000.safetensors").stat().st_size < 1000


def _many(folder: Path, start: int) -> None:
    fill(folder, 10, start, shard_rows=1)


def test_writers_at_once_never_take_one_another_s_names(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_many, args=(tmp_path, 10 * i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    reader = ShardReader(tmp_path)
    assert sorted(reader) == sorted(f"clip {i}" for i in range(40))
    assert all(torch.equal(reader.read(f"clip {i}")["x"], row(i)) for i in range(40))


def test_a_row_written_again_replaces_the_first(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with ShardWriter(tmp_path, NOTE) as writer:
        writer.add("clip 1", {"x": row(77)}, note="new")
    reader = ShardReader(tmp_path)
    assert sorted(reader) == ["clip 0", "clip 1", "clip 2"]
    assert torch.equal(reader.read("clip 1")["x"], row(77))
    assert torch.equal(reader.read("clip 2")["x"], row(2))
    assert reader.info("clip 1", "note") == ("new",)


def test_an_error_still_writes_what_was_added(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path) as writer:
            writer.add("a", {"x": row(0)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(ShardReader(tmp_path)) == ["a"]


def test_rows_old_enough_are_written_before_the_shard_is_full(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, NOTE, seconds=0.0) as writer:
        writer.add("a", {"x": row(0)}, note="")
        time.sleep(0.002)
        writer.add("b", {"x": row(1)}, note="")
        assert "a" in ShardReader(tmp_path)


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 8)


def lose(shard: Path) -> None:
    shard.unlink()


def blank_part(shard: Path) -> None:
    shard.with_suffix(".parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("damage", "word"), [(truncate, "bytes and was written with"), (lose, "is missing"), (blank_part, "can't be read")]
)
def test_a_broken_shard_is_named_and_can_be_made_again(tmp_path: Path, damage, word: str) -> None:
    fill(tmp_path, 6, shard_rows=2)
    damage(tmp_path / "000001.safetensors")
    with pytest.raises(UsageError, match=rf"1 of the shards(.|\n)*000001(.|\n)*{word}"):
        ShardReader(tmp_path)
    remove(tmp_path, find_broken(tmp_path))
    assert list(ShardReader(tmp_path)) == ["clip 0", "clip 1", "clip 4", "clip 5"]
    fill(tmp_path, 2, 2)
    assert torch.equal(ShardReader(tmp_path).read("clip 3")["x"], row(3))


def test_a_flipped_bit_is_found_by_reading_everything(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    shard = tmp_path / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    [(name, why)] = ShardReader(tmp_path).verify().items()
    assert name.startswith("clip ")
    assert "checksum" in why


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    old, young, temporary = tmp_path / "000007.safetensors", tmp_path / "000008.safetensors", tmp_path / ".x.parquet.1"
    for path in (old, young, temporary):
        path.write_bytes(b"")
    hours_ago = time.time() - 7200
    for path in (old, temporary, tmp_path / "000000.safetensors"):
        os.utime(path, (hours_ago, hours_ago))
    assert sweep(tmp_path) == [".x.parquet.1", "000007.safetensors"]
    assert len(ShardReader(tmp_path)) == 2
    fill(tmp_path, 1, 5)
    assert (tmp_path / "000009.safetensors").exists()


def test_the_index_is_plain_parquet(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    table = pq.read_table(tmp_path / "000000.parquet")
    assert table.column_names == ["id", "shard", "row", "tensors", "shape", "bytes", "crc32", "note"]
    assert table["shard"].to_pylist() == ["000000.safetensors"] * 2


def test_a_mapped_file_holds_what_the_library_reads_in_every_dtype(tmp_path: Path) -> None:
    """The header is read here rather than by safetensors, so the two are held against each other."""
    from safetensors.torch import load_file, save_file

    file = tmp_path / "all.safetensors"
    given = {f"{dtype}": torch.arange(24).reshape(2, 3, 4).to(dtype) for dtype in DTYPES.values()}
    given |= {"none": torch.zeros(0, 5), "one": torch.tensor(3.0), "odd": torch.ones(3, dtype=torch.int8)}
    save_file(given, file, metadata={"a": "b"})
    mapped, wanted = MappedTensors(file), load_file(file)
    for name, tensor in wanted.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor), name
    before = file.read_bytes()
    mapped["one"].add_(1)
    assert file.read_bytes() == before
