"""Samples in their order for validation, test and predict: each counts once, and every rank takes the same steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from muybridge.batch import Batch
from muybridge.errors import UsageError


class EvaluationSampler(DistributedSampler):
    """Indices of one rank, for :class:`EvaluationSet`; a repeat that only fills up is given as ``~index``, below zero.

    A sharded network hangs where one rank takes a step more than another, and a clip that counts twice shifts a mean. So
    ranks take turns as in training, and where the samples do not go round, repeats are dealt that count for nothing. One
    process that has no groups to keep apart gets no repeats. (It is a ``DistributedSampler`` so that Lightning leaves it in its
    place: its own gives ranks unequal numbers of batches in predict, and repeats that count in validation.)

    Args:
        groups: Samples that may share a batch, such as those of one bucket; all but the last fill whole global batches.
        batch_size: Samples per rank and step.
        num_replicas: Number of ranks.
        rank: This one.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], batch_size: int = 1, num_replicas: int = 1, rank: int = 0
    ) -> None:
        filled = [list(group) for group in groups if group]
        if not filled:
            raise UsageError("there is nothing to evaluate", "at least one sample that can be used")
        self.dealt: list[int] = []
        for number, group in enumerate(filled, 1):
            unit = num_replicas * (batch_size if number < len(filled) else 1)
            spare = math.ceil(len(group) / unit) * unit - len(group)
            self.dealt += group + [~group[i % len(group)] for i in range(spare)]
        super().__init__(range(len(self.dealt)), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.dealt[self.rank :: self.num_replicas])


class EvaluationSet(Dataset[Batch]):
    """A dataset of batches of one, read by the indices of :class:`EvaluationSampler`: a repeat is marked as absent.

    Args:
        data: The dataset.
    """

    def __init__(self, data: Dataset[Batch]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, key: int) -> Batch:
        if key >= 0:
            return self.data[key]
        # Without a remark: it is not a clip that could not be read, and is not to be counted as one.
        return replace(self.data[~key], present=torch.tensor([False]), remarks=None)

    def __getitems__(self, keys: Sequence[int]) -> list[Batch]:
        """Several at once, in one batch where the dataset can do that."""
        together: Any = getattr(self.data, "__getitems__", None)
        if together is not None and min(keys) >= 0:
            return together(keys)
        return [self[key] for key in keys]
