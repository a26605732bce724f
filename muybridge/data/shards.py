"""Rows of named tensors on disk: safetensors shards, each with a Parquet part that lists its rows.

Caches and trajectories are both folders of this kind. A shard is written to a temporary name, renamed, and only then listed:
what a part lists is complete, and a killed run loses at most the rows it had not written yet. Any number of processes may
write into one folder at once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.permissions import as_usual
from muybridge.whole import whole

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("tensors", pa.list_(pa.string())),
        ("shape", pa.list_(pa.int32())),
        ("bytes", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
"""What every index holds: where a row lies, the names of its tensors, the shape of the first, size and checksum of all."""

SHARD_BYTES = 512 * 2**20
"""Size of a shard where nothing else is said."""
_SIZE = b"shard_bytes"
_ABANDONED = 3600.0
"""Seconds after which a shard that no part lists is taken for what a killed run left behind."""


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of a row's tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return value


def _sync(path: Path) -> None:
    """Bring a file's bytes to the disk before it gets its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(path: Path, table: pa.Table) -> None:
    """Write one part of an index, whole or not at all."""
    with whole(path) as temporary:
        pq.write_table(table, temporary)
        _sync(temporary)


class ShardWriter:
    """Collects rows, and writes a shard whenever enough have come together.

    Use it as a context manager: what was added is written when the block ends, also by an error or Ctrl-C.

    Args:
        folder: Where the shards go.
        columns: Columns of the index beside those every index has.
        shard_bytes: Size from which a shard is written.
        shard_rows: Rows from which a shard is written, since a shard's header is read whole.
        seconds: Age from which a shard is written, so that a killed run loses no more work than that.
    """

    def __init__(
        self,
        folder: str | Path,
        columns: Optional[pa.Schema] = None,
        shard_bytes: int = SHARD_BYTES,
        shard_rows: int = 4096,
        seconds: float = 300.0,
    ) -> None:
        if shard_bytes < 1 or shard_rows < 1:
            raise UsageError(f"shards of {shard_bytes} bytes and {shard_rows} rows", "at least 1 of each")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.schema = pa.schema([*COLUMNS, *(columns or [])])
        self.shard_bytes, self.shard_rows, self.seconds = shard_bytes, shard_rows, seconds
        self.written = 0
        self._rows: list[dict[str, Any]] = []
        self._tensors: dict[str, Tensor] = {}
        self._bytes, self._since, self._number = 0, 0.0, 0

    def add(self, id: str, tensors: Mapping[str, Tensor], **info: Any) -> None:
        """Append a row.

        Args:
            id: Its name.
            tensors: Its tensors by name; the first one's shape stands in the index. A row may hold none and only be known.
            info: The further columns.
        """
        row = len(self._rows)
        if row == 0:
            self._since = time.monotonic()
        # A view would drag the batch it was cut from into the file, and the caller may write into what it gave.
        kept = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        size = sum(x.numel() * x.element_size() for x in kept.values())
        self._tensors.update({f"{row:06d}.{name}": x for name, x in kept.items()})
        shape = list(next(iter(kept.values())).shape) if kept else []
        place = {"id": id, "row": row, "tensors": list(kept), "shape": shape}
        self._rows.append({**place, "bytes": size, "crc32": checksum(kept), **info})
        self._bytes += size
        old = time.monotonic() - self._since > self.seconds
        if self._bytes >= self.shard_bytes or len(self._rows) >= self.shard_rows or old:
            self.flush()

    def _claim(self) -> Path:
        """A shard name of this process's own, among others that write into the same folder."""
        taken = [int(p.stem) for p in self.folder.glob("*.safetensors") if p.stem.isdigit()]
        self._number = max([self._number, *(n + 1 for n in taken)])
        while True:
            path = self.folder / f"{self._number:06d}.safetensors"
            self._number += 1
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                continue
            return path

    def flush(self) -> None:
        """Write what has been added, if anything."""
        if not self._rows:
            return
        from safetensors.torch import save_file

        path = self._claim()
        with whole(path) as temporary:
            save_file(self._tensors, temporary)
            as_usual(temporary)
            _sync(temporary)
            size = temporary.stat().st_size
        rows = [{**row, "shard": path.name} for row in self._rows]
        table = pa.Table.from_pylist(rows, schema=self.schema.with_metadata({_SIZE: str(size)}))
        write_part(path.with_suffix(".parquet"), table)
        self.written += len(self._rows)
        self._rows, self._tensors, self._bytes = [], {}, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a safetensors header calls the dtypes that tensors here may have."""


class MappedTensors:
    """The tensors of a safetensors file as views of its pages.

    The library's own reader makes a storage for every tensor it gives out. Next to copying the latents of a clip that is time
    enough to count (``benchmarks/data.py``), and a view of the mapped file takes none of it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # A private mapping: torch wants memory that could be written to, and the file stays what it is if it is.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = 8 + int.from_bytes(self._bytes[:8], "little")
        header = json.loads(self._bytes[8:begin])
        header.pop("__metadata__", None)
        self._places = {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self._places[name]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=begin).view(shape)


class ShardReader:
    """Reads rows by id, straight from the mapped files.

    Opening it reads the index and holds every shard against the size it was written with. The tensors it gives out are views
    of the file's pages: copy before writing into them.

    Args:
        folder: What a :class:`ShardWriter` wrote.
    """

    open_shards = 128
    """Files kept mapped at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        broken = find_broken(self.folder)
        if broken:
            name, why = next(iter(broken.items()))
            raise UsageError(
                f"{len(broken)} of the shards of {self.folder} are broken, first {name}: {why}",
                "shards as they were written",
                "run the command that wrote them again: it drops the broken ones and makes their rows anew",
            )
        tables = [pq.read_table(p) for p in parts(self.folder)]
        plain = [t.replace_schema_metadata(None) for t in tables]
        self.table = pa.concat_tables(plain).combine_chunks() if plain else COLUMNS.empty_table()
        # A row made anew (its video changed) stands in a later part than the one it replaces.
        self._row = {name: i for i, name in enumerate(self.table["id"].to_pylist())}
        if len(self._row) < len(self.table):
            self.table = self.table.take(sorted(self._row.values()))
            self._row = {name: i for i, name in enumerate(self.table["id"].to_pylist())}
        shards = self.table["shard"].combine_chunks().dictionary_encode()
        self._shards: list[str] = shards.dictionary.to_pylist()
        self._shard = shards.indices.to_numpy(zero_copy_only=False)
        self._place = self.table["row"].to_numpy()
        self._names: list[list[str]] = self.table["tensors"].to_pylist()
        self._arrays: dict[str, Any] = {}
        self._open: OrderedDict[str, MappedTensors] = OrderedDict()

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, id: object) -> bool:
        return id in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files don't travel to worker processes; each opens its own.
        return {**self.__dict__, "_open": OrderedDict(), "_arrays": {}}

    def _mapped(self, shard: str) -> MappedTensors:
        handle = self._open.get(shard)
        if handle is None:
            handle = self._open[shard] = MappedTensors(self.folder / shard)
            if len(self._open) > self.open_shards:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return handle

    def read(self, id: str) -> dict[str, Tensor]:
        """The tensors of a row."""
        row = self._row[id]
        shard = self._mapped(self._shards[self._shard[row]])
        place = self._place[row]
        return {name: shard[f"{place:06d}.{name}"] for name in self._names[row]}

    def info(self, id: str, *columns: str) -> tuple[Any, ...]:
        """Some columns of a row."""
        row = self._row[id]
        return tuple(self._array(name)[row].as_py() for name in columns)

    def _array(self, name: str) -> Any:
        """A column in one piece: looking it up in the table takes ten times as long as reading a value from it."""
        if name not in self._arrays:
            self._arrays[name] = pa.concat_arrays(self.table[name].chunks)
        return self._arrays[name]

    def verify(self) -> dict[str, str]:
        """Read every byte; the rows whose bytes are not those that were written, with the reason."""
        wrong = {}
        for name, expected in zip(self.table["id"].to_pylist(), self.table["crc32"].to_pylist(), strict=True):
            found = checksum(self.read(name))
            if found != expected:
                wrong[name] = f"checksum {found:08x} in {self.info(name, 'shard')[0]}, written as {expected:08x}"
        return wrong


def parts(folder: Path) -> list[Path]:
    """The parts of a folder's index."""
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))


def find_broken(folder: Path) -> dict[str, str]:
    """Name of every part whose shard is not as it was written, and why."""
    broken = {}
    for part in parts(folder):
        shard = part.with_suffix(".safetensors")
        try:
            metadata = pq.read_schema(part).metadata or {}
        except (pa.ArrowInvalid, OSError) as error:
            broken[part.name] = f"its index part can't be read ({error})"
            continue
        written = int(metadata.get(_SIZE, b"-1"))
        if not shard.is_file():
            broken[part.name] = f"{shard.name} is missing"
        elif shard.stat().st_size != written:
            broken[part.name] = f"{shard.name} has {shard.stat().st_size} bytes and was written with {written}"
    return broken


def remove(folder: Path, names: Iterable[str]) -> None:
    """Take parts (by file name) and their shards away."""
    for name in names:
        part = folder / name
        part.unlink(missing_ok=True)
        part.with_suffix(".safetensors").unlink(missing_ok=True)


def sweep(folder: Path) -> list[str]:
    """Remove what killed runs left behind: old shards that no part lists, and old temporary files."""
    listed = {p.with_suffix(".safetensors").name for p in parts(folder)}
    swept = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        left = path.name.startswith(".") or (path.suffix == ".safetensors" and path.name not in listed)
        if left and time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
            swept.append(path.name)
    return swept
