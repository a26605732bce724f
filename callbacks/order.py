"""Who acts first after an update."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class TakesLong(pl.Callback):
    """Works long after an update, and changes nothing that a checkpoint needs: saving does not wait for it.

    Attributes:
        logs: How the names of the values begin that it logs then; who saves by such a value waits.
    """

    logs: str = ""


def in_order(callbacks: Sequence[pl.Callback], leaves: pl.Callback) -> list[pl.Callback]:
    """A new list: what a checkpoint must hold (EMA's step), ``leaves``, those that save, and those that take long.

    Args:
        callbacks: All of a Trainer's.
        leaves: The one that may save and leave after an update.
    """
    rest = [c for c in callbacks if c is not leaves]
    long = [c for c in rest if isinstance(c, TakesLong)]
    begins = tuple(c.logs for c in long if c.logs)
    saving = [c for c in rest if isinstance(c, Checkpoint)]
    waiting = [c for c in saving if str(getattr(c, "monitor", None) or "").startswith(begins)] if begins else []
    first = [c for c in rest if c not in long and c not in saving]
    return [*first, leaves, *[c for c in saving if c not in waiting], *long, *waiting]
