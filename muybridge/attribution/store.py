"""Projected gradients on disk, with all that says how they were made.

A store is a folder::

    store/
      _manifest.json                  what the vectors depend on; vectors of another manifest are refused
      _updates.json                   of passes during training: a digest of the weights at each update
      part-00000-000000-1a2b.parquet  some rows, written whole or not at all; any number of ranks write their own

A row is one clip at one step of training and one time: ``id``, ``part`` (``train`` or ``query``), ``step``, ``timestep``,
``norm``, ``state`` and ``vector``, which is not normalised. ``state`` is ``ok``, or says why there is no vector: its gradient was
``zero`` or ``not finite``. Parquet of plain types: pandas, polars and duckdb read it as it is.
"""

from __future__ import annotations

import errno
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from muybridge.begun import check_same
from muybridge.data.shards import write_part
from muybridge.errors import UsageError
from muybridge.whole import write_text

FORMAT = 1
MANIFEST = "_manifest.json"
"""Readers of a folder of Parquet leave out what begins so."""
UPDATES = "_updates.json"
"""Of passes during training, where the manifest can't name the weights, since every update has its own."""
Part = Literal["train", "query"]
Stored = Literal["float32", "float16"]
OK, ZERO, NOT_FINITE = "ok", "zero", "not finite"
Key = tuple[int, float]
"""Step of training and timestep."""


def schema(dim: int, dtype: Stored) -> pa.Schema:
    """Columns of a part."""
    number = pa.float32() if dtype == "float32" else pa.float16()
    return pa.schema(
        [
            ("id", pa.string()),
            ("part", pa.string()),
            ("step", pa.int64()),
            ("timestep", pa.float64()),
            ("norm", pa.float32()),
            ("state", pa.string()),
            ("vector", pa.list_(number, dim)),
        ]
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """What the vectors of a store depend on."""
    file = path / MANIFEST
    if not file.is_file():
        raise UsageError(
            f"{path} is no influence store: it has no {MANIFEST}",
            "a folder that `muybridge attribute` or callbacks.GradientCapture wrote",
            f"relative paths are looked up from {Path.cwd()}",
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} can't be read ({error})", "the manifest as it was written") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UsageError(
            f"{path} is an influence store of format {found}",
            f"format {FORMAT}, which this version reads",
            "read it with the version that wrote it, or attribute anew into another folder",
        )
    return dict(manifest)


def read_updates(path: Path) -> dict[str, str]:
    """The digest of the weights at each update that a pass was made at during training; none where there was no training."""
    file = path / UPDATES
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def check_update(path: Path, step: int, digest: str) -> dict[str, str]:
    """Refuse rows of other weights of an update than there are; returns what is to be noted of all updates.

    Args:
        path: The store.
        step: The update.
        digest: Of the weights as they are now.
    """
    noted = read_updates(path)
    if noted.get(str(step), digest) != digest:
        held = [
            f.name
            for f in sorted(path.glob("part-*.parquet"))
            if step in pq.read_table(f, columns=["step"])["step"].to_pylist()
        ]
        if held:
            raise UsageError(
                f"the store {path} holds gradients of update {step} under other weights than this run has there",
                "the training run that the store was begun with",
                f"attribute into another folder, or remove {', '.join(held)} and go on: they are made anew",
            )
    return {**noted, str(step): digest}


@dataclass(frozen=True)
class Block:
    """Some rows of a store.

    Args:
        ids: Names of the clips.
        keys: Step and timestep of each.
        vectors: (n, dim), float32.
    """

    ids: list[str]
    keys: list[Key]
    vectors: np.ndarray


class InfluenceStore:
    """A store, opened for reading.

    Args:
        path: Its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        weights = read_updates(self.path)
        if weights:
            self.manifest["weights at updates"] = weights

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return int(self.manifest["projection"]["dim"])

    @property
    def files(self) -> list[Path]:
        """The parts; a file that is being written has another name."""
        return sorted(self.path.glob("part-*.parquet"))

    @cached_property
    def index(self) -> pa.Table:
        """All rows without their vectors. Two rows of one clip, step and time are refused."""
        names = ["id", "part", "step", "timestep", "norm", "state"]
        tables = []
        for file in self.files:
            try:
                tables.append(pq.read_table(file, columns=names))
            except (pa.ArrowInvalid, OSError) as error:
                raise UsageError(
                    f"{file} can't be read ({error})",
                    "a part as it was written",
                    "remove it and run the same command again: it makes its rows anew",
                ) from error
        table = pa.concat_tables(tables) if tables else schema(1, "float32").empty_table().select(names)
        grouped = table.group_by(["id", "part", "step", "timestep"]).aggregate([([], "count_all")])
        if len(grouped) < len(table):
            twice = grouped.filter(pa.compute.greater(grouped["count_all"], 1))["id"].to_pylist()
            raise UsageError(
                f"{self.path} holds {len(twice)} clips twice, such as {', '.join(twice[:3])}",
                "one row of each clip, step and time",
                "two runs wrote it at once, or files of two stores were put together: keep one of each",
            )
        return table

    def done(self, part: Part) -> set[tuple[str, int, float]]:
        """Clip, step and time of every row of a part."""
        rows = self.index.filter(pa.compute.equal(self.index["part"], part))
        return set(zip(*(rows[name].to_pylist() for name in ("id", "step", "timestep")), strict=True))

    def keys(self, part: Part) -> list[Key]:
        """The steps and times there are, in order."""
        rows = self.index.filter(pa.compute.equal(self.index["part"], part))
        return sorted(set(zip(rows["step"].to_pylist(), rows["timestep"].to_pylist(), strict=True)))

    def excluded(self, part: Part) -> dict[str, str]:
        """Clips that have no vector at some step and time, and why."""
        rows = self.index.filter(
            pa.compute.and_(pa.compute.equal(self.index["part"], part), pa.compute.not_equal(self.index["state"], OK))
        )
        return dict(zip(rows["id"].to_pylist(), rows["state"].to_pylist(), strict=True))

    def ids(self, part: Part) -> list[str]:
        """Clips that have their vectors, in order of their names."""
        rows = self.index.filter(pa.compute.equal(self.index["part"], part))
        return sorted(set(rows["id"].to_pylist()) - set(self.excluded(part)))

    def blocks(self, part: Part, rows: int = 8192) -> Iterator[Block]:
        """The vectors, a stretch at a time: a store may be larger than memory.

        Args:
            part: ``train`` or ``query``.
            rows: At most so many at once.
        """
        excluded = set(self.excluded(part))
        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                kept = batch.filter(
                    pa.compute.and_(pa.compute.equal(batch["part"], part), pa.compute.equal(batch["state"], OK))
                )
                if not len(kept):
                    continue
                ids = kept["id"].to_pylist()
                keys = list(zip(kept["step"].to_pylist(), kept["timestep"].to_pylist(), strict=True))
                vectors = kept["vector"].flatten().to_numpy(zero_copy_only=False)
                matrix = vectors.reshape(len(ids), -1).astype(np.float32, copy=False)
                places = [i for i, name in enumerate(ids) if name not in excluded]
                if len(places) < len(ids):
                    ids, keys, matrix = [ids[i] for i in places], [keys[i] for i in places], matrix[places]
                if ids:
                    yield Block(ids, keys, matrix)

    def check_like(self, other: InfluenceStore) -> None:
        """Refuse to compare vectors that were made otherwise."""
        check_same(f"the store {self.path} was", self.manifest, other.manifest, f"attribute both like {other.path}")


class StoreWriter:
    """Adds rows to a store; as a context manager it writes what is left when the block ends, also by an error.

    Args:
        path: Folder of the store, new or begun.
        manifest: What the vectors depend on; a begun store must have been made with the same.
        rank: This process's rank.
        dtype: What vectors are kept in.
        rows: Rows from which a file is written.
        seconds: Age from which a file is written, so that a killed run loses no more work than that.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        rank: int = 0,
        dtype: Stored = "float32",
        rows: int = 4096,
        seconds: float = 120.0,
    ) -> None:
        self.path, self.rank, self.dtype = Path(path), rank, dtype
        self.rows, self.seconds = rows, seconds
        content = json.loads(json.dumps({"format": FORMAT, **manifest, "dtype": dtype}))
        if (self.path / MANIFEST).is_file() and any(self.path.glob("part-*.parquet")):
            made = read_manifest(self.path)
            check_same(f"the store {path} was", made, content, "attribute into another folder")
        elif self.path.is_dir() and any(p.name[0] not in "._" for p in self.path.iterdir()):
            raise UsageError(f"{path} exists and is no influence store", "a new or empty folder, or a store")
        else:
            write_text(self.path / MANIFEST, json.dumps(content, indent=2) + "\n")
        self.dim = int(content["projection"]["dim"])
        self.counts: dict[str, int] = {}
        self._known: dict[str, set[tuple[str, int, float]]] = {}
        self._rows: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray] = []
        self._since = 0.0

    def known(self, part: Part) -> set[tuple[str, int, float]]:
        """Clip, step and time of the rows that are there already, of all ranks and runs."""
        if part not in self._known:
            self._known[part] = InfluenceStore(self.path).done(part)
        return self._known[part]

    def add(self, id: str, part: Part, step: int, timestep: float, vector: Tensor) -> bool:
        """Add a clip's vector, (dim,); returns whether it was new.

        A vector of zeros, or one that is not finite, is noted as such and not kept.
        """
        place = (id, int(step), float(timestep))
        if place in self.known(part):
            return False
        values = vector.detach().float().cpu()
        if values.shape != (self.dim,):
            raise ValueError(f"a vector of shape {tuple(values.shape)}: expected ({self.dim},)")
        norm = float(values.double().norm())
        state = OK if 0.0 < norm < float("inf") else ZERO if norm == 0.0 else NOT_FINITE
        kept = values.numpy()
        if self.dtype == "float16" and state == OK:
            kept = values.half().numpy()
            lost = float(np.linalg.norm(kept.astype(np.float64) - values.double().numpy())) / norm
            if not lost < 0.01:
                raise UsageError(
                    f"the vector of {id} has the norm {norm:.2g}, and float16 would change it by {lost:.0%}",
                    "float32 for gradients of this size",
                    "attribute into another folder with dtype: float32",
                )
        if not self._rows:
            self._since = time.monotonic()
        self.known(part).add(place)
        self.counts[state] = self.counts.get(state, 0) + 1
        self._rows.append(
            {"id": id, "part": part, "step": place[1], "timestep": place[2], "norm": norm, "state": state}
        )
        self._vectors.append(kept if state == OK else np.zeros(self.dim, kept.dtype))
        if len(self._rows) >= self.rows or time.monotonic() - self._since > self.seconds:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what has been added, if anything."""
        if not self._rows:
            return
        described = schema(self.dim, self.dtype)
        columns: list[Any] = [
            pa.array([r[n] for r in self._rows], described.field(n).type) for n in described.names[:-1]
        ]
        flat = np.concatenate(self._vectors).astype(np.float32 if self.dtype == "float32" else np.float16)
        there = pa.array([r["state"] != OK for r in self._rows])
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), self.dim, mask=there))
        table = pa.Table.from_arrays(columns, schema=described)
        number = sum(1 for _ in self.path.glob(f"part-{self.rank:05d}-*.parquet"))
        # The end of the name is chance: two runs may count alike.
        file = self.path / f"part-{self.rank:05d}-{number:06d}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            write_part(file, table)
        except OSError as error:
            for left in self.path.glob(f".{file.name}.*"):
                left.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(
                f"there is no room to write {file} ({table.nbytes / 2**20:.0f} MiB)",
                "free space; what was written before is whole",
                "make room and run the same command again: it goes on with the clips that are missing",
            ) from error
        self._rows, self._vectors = [], []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Any) -> None:
        if not (isinstance(error, UsageError) and "no room" in error.given):
            self.flush()


def names_digest(names: Sequence[str]) -> str:
    """A short key of some names."""
    import hashlib

    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()


def model_digest(named: Mapping[str, Tensor], reduce: Any = None) -> str:
    """A short key of some parameters' bits, the same however they are sharded.

    ``Σ bits(θ_i) · hash(name, i) mod 2^64`` is a sum of whole numbers: ranks add up their shares without rounding.

    Args:
        named: The parameters by canonical name, whole or as FSDP2 shards.
        reduce: Sums an int64 tensor over the ranks, in place, where the parameters are sharded.
    """
    from muybridge.attribution.projection import CHUNK, hashed, key_of

    sums = torch.zeros(2, dtype=torch.int64)
    sharded = False
    for name, parameter in named.items():
        values, start = parameter.detach(), 0
        if hasattr(values, "to_local"):
            from muybridge.attribution.per_sample import local_stretch

            sharded = True
            values, start = local_stretch(values)
        flat = values.flatten()
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        target = sums[int(hasattr(parameter, "to_local")) :][:1]
        for piece in range(0, len(bits), CHUNK):
            part = bits[piece : piece + CHUNK].to(torch.int64)
            target += (part * hashed(key_of("digest", name), start + piece, len(part), part.device)).sum().cpu()
    if sharded and reduce is not None:
        reduce(sums[1:])
    return f"{int(sums.sum()) & (2**64 - 1):016x}"
