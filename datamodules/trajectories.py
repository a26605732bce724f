"""Teacher trajectories from disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

from torch.utils.data import Dataset

from datamodules.base import ResumableData
from muybridge.data.cache import Cache
from muybridge.data.encoding import Material
from muybridge.data.trajectories import Trajectories, TrajectoryBatch, read_made
from muybridge.errors import UsageError


class TrajectoryDataset(Dataset[TrajectoryBatch]):
    """Trajectories as batches of one.

    Args:
        trajectories: The folder.
        cache: Where their prompts' embeddings are, if anywhere.
    """

    def __init__(self, trajectories: Trajectories, cache: Optional[Cache] = None) -> None:
        self.trajectories, self.cache = trajectories, cache

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> list[str]:
        """Their names."""
        return self.trajectories.ids

    def __getitem__(self, index: int) -> TrajectoryBatch:
        row = self.trajectories.read(self.trajectories.ids[index])
        return row if self.cache is None else replace(row, conditioning=self.cache.text(row.prompts[0]))


class TrajectoryData(ResumableData):
    """What a teacher's sampler passed through, for jobs that learn from it.

    Args:
        path: A folder of trajectories.
        cache: A cache that holds the embeddings of their prompts, so that no text encoder is loaded.
        batch_size: Trajectories of a micro-batch, on every rank.
        num_workers: Processes that read, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
    """

    def __init__(
        self, path: str, cache: Optional[str] = None, batch_size: int = 1, num_workers: int = 2, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.path, self.cache_path = path, cache
        self.cache: Optional[Cache] = None
        self._trajectories: Optional[Trajectories] = None

    @property
    def made(self) -> dict[str, Any]:
        """What made the trajectories: teacher, path, size, times. A job compares it with its own settings."""
        return read_made(self.path)

    def setup(self, stage: str) -> None:
        """Open the folder."""
        if self._trajectories is not None:
            return
        trajectories = Trajectories(self.path)
        if not trajectories.ids:
            raise UsageError(f"{self.path} holds no trajectory", "at least one", "write some first")
        self._trajectories = trajectories
        if self.cache_path is not None:
            self.cache = Cache(self.cache_path)
            self.cache.check_texts(trajectories.prompts)

    def to_cache(self) -> Material:
        """What ``muybridge cache`` encodes: the prompts."""
        return Material(texts=Trajectories(self.path).prompts)

    def train_dataset(self) -> Dataset[Any]:
        assert self._trajectories is not None
        return TrajectoryDataset(self._trajectories, self.cache)

    # Not a method, for the reason given in the base class.
    collate = staticmethod(TrajectoryBatch.cat)
