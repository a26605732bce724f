"""Slots that no sample fills: where samples do not go round, repeats keep ranks and batches even and count for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from muybridge.errors import UsageError


class FilledSet(Dataset[Any]):
    """A dataset of batches of one, read by indices of which some, given as ``~index``, only fill up.

    A fill is the sample of that index, so that it has its bucket's shape, marked as absent (``present``). It has no remark: it
    is not a clip that could not be read, and is not to be counted as one.

    Args:
        data: The dataset. Its samples may also be known by pairs of epoch and index.
        expected: Fills will come. Samples that can't be marked are then refused at the first one, rather than when it comes.
    """

    def __init__(self, data: Dataset[Any], expected: bool = False) -> None:
        self.data, self.expected = data, expected

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        fill, index = parse(key)
        return self._marked(self.data[index], [fill])

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        """Several at once, in one batch where the dataset can do that."""
        fills, indices = zip(*map(parse, keys), strict=True)
        together: Any = getattr(self.data, "__getitems__", None)
        found = together(list(indices)) if together is not None else [self.data[index] for index in indices]
        if not any(fills):
            return [self._marked(found[0], [False]), *found[1:]]
        marked, begin = [], 0
        for batch in found:
            end = begin + (len(batch) if len(found) < len(keys) else 1)
            marked.append(self._marked(batch, fills[begin:end]))
            begin = end
        return marked

    def _marked(self, batch: Any, fills: Sequence[bool]) -> Any:
        if not (self.expected or any(fills)):
            return batch
        if not is_dataclass(batch) or not hasattr(batch, "present"):
            raise UsageError(
                f"the samples do not go round, and a {type(batch).__name__} can't be marked as one that only fills up",
                "samples that are a muybridge.batch.Batch of one, or another dataclass with a field present",
                "yield these from the dataset, or set drop_last",
            )
        if not any(fills):
            return batch
        there = ~torch.tensor(fills)
        kept: dict[str, Any] = {"present": there if batch.present is None else there & batch.present}
        if getattr(batch, "remarks", None) is not None:
            said = list(batch.remarks)  # type: ignore[union-attr]
            remarks = ["" if fill else remark for fill, remark in zip(fills, said, strict=True)]
            kept["remarks"] = remarks if any(remarks) else None
        return replace(batch, **kept)  # type: ignore[type-var]


def parse(key: Any) -> tuple[bool, Any]:
    """Whether an index only fills up, and the index of its sample."""
    if isinstance(key, tuple):
        epoch, index = key
        return index < 0, (epoch, max(index, ~index))
    return key < 0, max(key, ~key)
