"""Samples in their order for validation, test and predict: each counts once, and every rank takes the same steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch.utils.data.distributed import DistributedSampler

from muybridge.errors import UsageError


class EvaluationSampler(DistributedSampler):
    """Indices of one rank; a repeat that only fills up is given as ``~index``, for :class:`~datamodules.filling.FilledSet`.

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
