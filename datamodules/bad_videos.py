"""What a run does about clips that can't be used: count, write down, say, and stop where there are too many.

Datasets never raise for a bad file: the clip keeps its slot, marked as absent and with the reason as its remark, so no other
index gets another clip and every rank takes the same steps. It is here, in the training process, that ranks agree on stopping;
one that stopped by itself would leave the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from muybridge.batch import Batch
from muybridge.data.account import FILE, Account, append, kind, line, merge, read, refuse
from muybridge.errors import UsageError

OnError = Literal["skip", "raise"]
EVERY = 50
"""Steps between two looks at how many were skipped, within an epoch."""
ENOUGH = 200
"""Clips, over all ranks, from which on a share says something about the source; a whole epoch always does."""


class BadVideoWatch(pl.Callback):
    """Keeps the account of clips; datamodules of videos add it to their trainer.

    Args:
        on_error: ``raise`` stops the run at the first bad clip.
        max_bad_fraction: ``skip`` stops it where more than this share is bad.
        paths: Gives the file of each clip by id, for the clips of ``train`` or of ``validation``: both may use the same ids.
        left_out: Why clips were left out before the run began, by id.
    """

    def __init__(
        self,
        on_error: OnError = "skip",
        max_bad_fraction: float = 0.1,
        paths: Callable[[str], Mapping[str, str]] = lambda stage: {},
        left_out: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.on_error, self.max_bad_fraction, self.paths = on_error, max_bad_fraction, paths
        self.left_out = dict(left_out or {})
        self.accounts = {"train": Account(), "validation": Account()}
        self.batches = 0
        self._run = Account()
        self._file = Path(FILE)
        self._part = Path(FILE)
        self._written: dict[str, str] = {}
        self._said: set[str] = set()

    @property
    def file(self) -> Path:
        """Where bad clips are listed."""
        return self._file

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run's folder, and what an interrupted run noted in it."""
        self._run = Account()
        self._file = Path(trainer.log_dir or trainer.default_root_dir) / FILE
        # One writer a file. The first rank adds to the list itself, the others' parts join it at the end of an epoch.
        rank = trainer.global_rank
        self._part = self._file if rank == 0 else self._file.with_suffix(f".rank{rank}.jsonl")
        self._written = {str(entry["id"]): str(entry["reason"]) for entry in read(self._part)}
        if rank == 0 and self.left_out:
            merge(self._file, self.left_out, self.paths("train"))

    # -- counting --------------------------------------------------------------------------------------------------

    def _see(self, stage: str, batch: Any) -> None:
        if not isinstance(batch, Batch):
            return
        account = self.accounts[stage]
        if batch.remarks is None and batch.present is None:
            # The usual case asks nothing of the device.
            account.seen += len(batch)
            return
        present = batch.present.tolist() if batch.present is not None else [True] * len(batch)
        remarks = batch.remarks if batch.remarks is not None else [""] * len(batch)
        # Absent without a reason is a repeat that fills up an evaluation's batches, and no clip.
        count = [i for i in range(len(batch)) if present[i] or remarks[i]]
        first = account.see([batch.ids[i] for i in count], [present[i] for i in count], [remarks[i] for i in count])
        new = [name for name in first if name not in self._written]
        if new:
            paths = self.paths(stage)
            append(self._part, [line(name, paths.get(name, ""), account.reasons[name]) for name in new])
            self._written.update({name: account.reasons[name] for name in new})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, before it is trained on."""
        self.batches += 1
        self._see("train", batch)
        if self.on_error == "raise":
            self._stop_at_any(trainer, "train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the share now and then."""
        if (batch_idx + 1) % EVERY == 0:
            account = self.accounts["train"]
            seen, skipped = self._sum(trainer, account.seen, account.skipped)
            if Account(seen, skipped).too_many(self.max_bad_fraction, ENOUGH):
                self._end_epoch(trainer, "train")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many were skipped."""
        whole = self.batches >= trainer.num_training_batches
        self._end_epoch(trainer, "train", least=1 if whole else ENOUGH)
        self.batches = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge a run by all it saw: it may have ended inside its first epoch, before there was enough to judge that by."""
        if self._run.too_many(self.max_bad_fraction):
            raise refuse(self._run, self.max_bad_fraction, str(self._file))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        self._see("validation", batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many were skipped; ranks need not have had equally many batches, so nothing is agreed on before."""
        if self.on_error == "raise":
            self._stop_at_any(trainer, "validation")
        self._end_epoch(trainer, "validation", least=ENOUGH if trainer.sanity_checking else 1)

    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end

    # -- agreeing --------------------------------------------------------------------------------------------------

    def _sum(self, trainer: pl.Trainer, *counts: int) -> tuple[int, ...]:
        """Counts over all ranks; every rank calls it at the same place."""
        total = trainer.strategy.reduce(torch.tensor(counts, device=trainer.strategy.root_device), reduce_op="sum")
        return tuple(int(n) for n in torch.as_tensor(total).tolist())

    def _gather(self, account: Account) -> Account:
        if not (dist.is_available() and dist.is_initialized()):
            return account
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, account)
        return sum(parts[1:], parts[0])

    def _stop_at_any(self, trainer: pl.Trainer, stage: str) -> None:
        (skipped,) = self._sum(trainer, self.accounts[stage].skipped)
        if not skipped:
            return
        total = self._gather(self.accounts[stage])
        self._write(trainer, total, stage)
        name, reason = next(iter(total.reasons.items()))
        raise refuse_one(name, self.paths(stage).get(name, ""), reason)

    def _write(self, trainer: pl.Trainer, total: Account, stage: str) -> None:
        if trainer.is_global_zero:
            merge(self._file, total.reasons, self.paths(stage))
        elif self._part.exists():
            self._part.unlink()

    def _end_epoch(self, trainer: pl.Trainer, stage: str, least: int = ENOUGH) -> None:
        total = self._gather(self.accounts[stage])
        self.accounts[stage] = Account()
        if stage == "train":
            self._run = self._run + total
        self._write(trainer, total, stage)
        where = f"epoch {trainer.current_epoch}" if stage == "train" else stage
        if total.skipped:
            rank_zero_info(f"{where}: {total.summary()}; listed in {self._file}")
        # Once a file, and not once a window of it.
        remarks = {name.rpartition("@")[0] or name: remark for name, remark in total.remarks.items()}
        new = {name: remark for name, remark in remarks.items() if name not in self._said}
        for said in dict.fromkeys(new.values()):
            names = [name for name, remark in new.items() if remark == said]
            rank_zero_info(f"{where}: {said} (videos: {len(names)}, such as {', '.join(names[:3])})")
        self._said.update(new)
        if total.too_many(self.max_bad_fraction, least):
            raise refuse(total, self.max_bad_fraction, str(self._file))


def refuse_one(name: str, path: str, reason: str) -> UsageError:
    """The error that ends a run at its first bad clip."""
    return UsageError(
        f"{name} can't be used, {reason} ({path})",
        f"clips that can be used, since on_error is raise ({kind(reason)} is not)",
        "mend or remove the file, or set on_error to skip",
    )
