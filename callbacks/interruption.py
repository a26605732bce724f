"""Ctrl-C: stop after the update at hand, and leave a checkpoint that goes on from it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.leaving import exit_code
from callbacks.order import in_order
from muybridge.errors import UsageError

NOTICE = b"\nCtrl-C: saving after this update, then stopping. Once more stops at once, and saves nothing.\n"


class Interrupted(SystemExit):
    """The run has saved and stops, with the exit code that shells have for Ctrl-C."""

    def __init__(self, code: int = 128 + signal.SIGINT) -> None:
        super().__init__(code)


class Interruption(pl.Callback):
    """Save a checkpoint to go on from when somebody presses Ctrl-C, and stop; the command's ``fit`` has it by default.

    While a run trains, the first Ctrl-C is only noted; ranks compare notes after an update (and after a validation), save
    together and stop. (Lightning stops where it is, and what was learnt since the last checkpoint is lost.) The second one
    ends the process where it is. Before and after training Ctrl-C is what it always is.

    Args:
        every: Updates between two comparisons, which are one small all-reduce each where there are several ranks.
        command: What was typed to start the run, to say how to go on.
    """

    def __init__(self, every: int = 1, command: str = "") -> None:
        if every < 1:
            raise UsageError(f"Interruption every is {every}", "a number of updates, 1 or more")
        self.every, self.command = every, command
        self.told = False
        self._before: Any = None
        self._owner = 0
        self._first = True
        self._last = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the place before those that save: what others do after an update must be in the checkpoint."""
        if stage != TrainerFn.FITTING:
            return
        trainer.callbacks = in_order(trainer.callbacks, self)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; not where nobody can press Ctrl-C (another thread, or a shell that made this process deaf to it)."""
        self.told, self._owner, self._first = False, os.getpid(), trainer.is_global_zero
        self._last = trainer.global_step
        listening = threading.current_thread() is threading.main_thread()
        if listening and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:
            # A data worker, which has the handler from its parent and ends when that does.
            return
        self.told = True
        # The system's own way to end, since Python would wait for a collective to return before it hears of the next one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._first:
            os.write(2, NOTICE)

    def _deafen(self) -> None:
        if self._before is not None and os.getpid() == self._owner:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ctrl-C is what it was before."""
        self._deafen()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl-C is what it was before."""
        self._deafen()

    # -- stopping --------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if anybody was told to; only after an update, since gradients of micro-batches are in no checkpoint."""
        if trainer.global_step - self._last < self.every:
            return
        self._last = trainer.global_step
        if self._agreed(trainer):
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after a validation within training, rather than train on for an update."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._agreed(trainer):
            self._stop(trainer)

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was told."""
        if trainer.world_size == 1:
            return self.told
        told = torch.tensor(int(self.told), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(told, reduce_op="max"))

    def _stop(self, trainer: pl.Trainer) -> None:
        path = self._folder(trainer) / f"interrupted-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        how = f"{self.command} --ckpt_path {path}" if self.command else f"the same command with --ckpt_path {path}"
        rank_zero_info(f"stopped by Ctrl-C: saved {path}\nto go on: {how}")
        # A launcher ends all ranks when the first has left.
        trainer.strategy.barrier("interruption")
        raise Interrupted(exit_code(trainer, 128 + signal.SIGINT))

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        """Where the run's checkpoints are."""
        told: Optional[str] = next(
            (str(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None
        )
        return Path(told) if told else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
