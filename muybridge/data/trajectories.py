"""Teacher trajectories on disk: what a sampler passed through on its way from noise to a clip.

The format is that of every folder of shards (:mod:`muybridge.data.shards`): one row a trajectory, its tensor ``latents`` of shape
(S, C, F, H, W) holds the states at the S times of the index column ``times``, falling from noise to clean (0 is clean). The
manifest says what made them, and a writer that was told otherwise refuses to add to them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa
import torch
from torch import Tensor

from muybridge.batch import joined_presence
from muybridge.begun import begun, check_same
from muybridge.data.shards import ShardReader, ShardWriter, find_broken, remove, sweep
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError
from muybridge.whole import write_text

FORMAT = 1
COLUMNS = pa.schema([("prompt", pa.string()), ("times", pa.list_(pa.float64()))])


@dataclass(frozen=True)
class TrajectoryBatch:
    """Some trajectories.

    Args:
        ids: One stable name per trajectory.
        times: (B, S), falling, on the scale 0 (clean) to 1000 (noise).
        latents: (B, S, C, F, H, W), the state at each time.
        prompts: What was sampled.
        conditioning: Text embeddings, where there is a cache of them.
        present: (B,), False for a repeat that only fills up a batch: no loss may count it. ``None``: all are there.
    """

    ids: list[str]
    times: Tensor
    latents: Tensor
    prompts: list[str]
    conditioning: Optional[Conditioning] = None
    present: Optional[Tensor] = None

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.times) == len(self.latents) == len(self.prompts):
            raise ValueError("a batch of trajectories needs one of each per id")
        if self.times.shape != self.latents.shape[:2]:
            raise ValueError(
                f"times {tuple(self.times.shape)} and latents {tuple(self.latents.shape)}: expected (B, S) and (B, S, ...)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, function: Callable[[Any], Any]) -> TrajectoryBatch:
        moved = ("times", "latents", "conditioning", "present")
        return replace(self, **{k: function(getattr(self, k)) for k in moved if getattr(self, k) is not None})

    def to(self, *args: Any, **kwargs: Any) -> TrajectoryBatch:
        """A copy moved like ``Tensor.to``; Lightning calls it to bring a batch to its device."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> TrajectoryBatch:
        """A copy in pinned memory; the data loader calls it."""
        return self._map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x._map(lambda y: y.pin_memory()))

    @staticmethod
    def cat(parts: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
        """Several batches as one; they must pass through equally many times."""
        shapes = {tuple(p.latents.shape[1:]) for p in parts}
        if len(shapes) > 1:
            raise UsageError(
                f"trajectories of {len(shapes)} shapes in one batch: {sorted(shapes)}",
                "one shape a batch",
                "set batch_size to 1",
            )
        conditionings = [p.conditioning for p in parts if p.conditioning is not None]
        return TrajectoryBatch(
            ids=[i for p in parts for i in p.ids],
            times=torch.cat([p.times for p in parts]),
            latents=torch.cat([p.latents for p in parts]),
            prompts=[x for p in parts for x in p.prompts],
            conditioning=Conditioning.cat(conditionings) if conditionings else None,
            present=joined_presence(parts),
        )


class TrajectoryWriter:
    """Adds trajectories to a folder. A context manager: what was added is written when the block ends.

    Several ranks may write into one folder, and a killed run goes on where it stopped: ask :attr:`done` first.

    Args:
        folder: Where to.
        made: What made them, as plain values: teacher, steps, guidance, size, seed.
        dtype: What the latents are kept in.
        options: Further arguments of :class:`~muybridge.data.shards.ShardWriter`.
    """

    def __init__(
        self, folder: str | Path, made: Mapping[str, Any], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.folder, self.dtype = Path(folder), dtype
        if begun(self.folder / "manifest.json", "trajectories"):
            check_same(f"the trajectories in {folder} were", read_made(self.folder), made, "write to another folder")
        else:
            text = json.dumps({"format": FORMAT, "made": dict(made)}, indent=2)
            write_text(self.folder / "manifest.json", text + "\n")
        sweep(self.folder)
        remove(self.folder, find_broken(self.folder))
        self.done = set(ShardReader(self.folder))
        """Ids that earlier runs wrote."""
        self._writer = ShardWriter(self.folder, COLUMNS, **options)

    def add(self, id: str, prompt: str, times: Sequence[float], latents: Tensor) -> None:
        """Add one trajectory.

        Args:
            id: Its name.
            prompt: What was sampled.
            times: S falling times.
            latents: (S, C, F, H, W), the state at each.
        """
        times = [float(t) for t in times]
        if latents.ndim != 5 or len(times) != len(latents) or not times:
            raise ValueError(
                f"{len(times)} times and latents of shape {tuple(latents.shape)}: expected S and (S, C, F, H, W)"
            )
        if any(a <= b for a, b in itertools.pairwise(times)):
            raise ValueError(f"times {times}: expected falling ones, from noise to clean")
        self._writer.add(id, {"latents": latents.to(self.dtype)}, prompt=prompt, times=times)

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.flush()


def read_made(folder: str | Path) -> dict[str, Any]:
    """What made the trajectories in a folder."""
    file = Path(folder) / "manifest.json"
    if not file.is_file():
        raise UsageError(f"{folder} holds no trajectories", "a folder that a TrajectoryWriter wrote", "check the path")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or "made" not in manifest:
        raise UsageError(
            f"{folder} is no folder of trajectories of format {FORMAT}",
            "one that this version wrote",
            "make them again",
        )
    return manifest["made"]


class Trajectories:
    """A folder of trajectories, opened for reading.

    Args:
        path: What a :class:`TrajectoryWriter` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.made = read_made(path)

    @cached_property
    def rows(self) -> ShardReader:
        """Trajectories by id."""
        return ShardReader(self.path)

    @cached_property
    def ids(self) -> list[str]:
        """All ids, sorted, so that the order does not depend on which rank wrote what."""
        return sorted(self.rows)

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts."""
        return list(dict.fromkeys(self.rows.table["prompt"].to_pylist())) if len(self.rows) else []

    def read(self, id: str) -> TrajectoryBatch:
        """One trajectory as a batch of one."""
        prompt, times = self.rows.info(id, "prompt", "times")
        latents = self.rows.read(id)["latents"].float()
        return TrajectoryBatch([id], torch.tensor([times], dtype=torch.float32), latents[None], [prompt])
