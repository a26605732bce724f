"""Leaving a cluster when told to, without losing an update."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from muybridge.errors import UsageError

STEM = "preempted-"


class Preemption(pl.Callback):
    """Save and stop when the cluster says so; under SLURM, put the job back into the queue.

    The signal handler only sets a flag. Ranks compare flags between two batches, and save together: Lightning's own handler
    saves where the signal finds it, and if that is inside a collective on one rank and outside on another, both wait for
    ever. Start the job with ``--ckpt_path last``: it then begins, or goes on, with the same command.

    Args:
        signals: What the cluster sends before it takes the node; ``#SBATCH --signal=USR1@120`` sends the first 120 seconds
            before the time limit.
        every: Batches between two comparisons; one small all-reduce each.
        dirpath: Where the checkpoint goes; the run's ``default_root_dir`` where not given.
        requeue: Under SLURM, call ``scontrol requeue`` for this job.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGUSR1", "SIGTERM"),
        every: int = 1,
        dirpath: Optional[str] = None,
        requeue: bool = True,
    ) -> None:
        unknown = [s for s in signals if not hasattr(signal, s)]
        if unknown or not signals:
            raise UsageError(f"Preemption signals are {list(signals)}", "names of signals, such as SIGUSR1 and SIGTERM")
        if every < 1:
            raise UsageError(f"Preemption every is {every}", "a number of batches, 1 or more")
        self.signals = [getattr(signal, s) for s in signals]
        self.every, self.dirpath, self.requeue = every, dirpath, requeue
        self.told: Optional[int] = None
        self._before: dict[int, Any] = {}
        self._owner = 0
        self._batches = 0

    # -- listening -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; refuses to share the job with Lightning's own handler."""
        environment = getattr(trainer._accelerator_connector, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # It has installed its own handlers for the same signals by now, or will: there must be one.
            environment.auto_requeue = False
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("Preemption in a run outside the main thread", "the main thread, where signals arrive")
        self.told, self._batches, self._owner = None, 0, os.getpid()
        for number in self.signals:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        # Data workers inherit this handler with the fork; they have nothing to save and die by the signal as before.
        if os.getpid() == self._owner:
            self.told = number
        elif number == signal.SIGTERM:
            os._exit(128 + number)

    def _deafen(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._deafen()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._deafen()

    # -- leaving ---------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave if any rank was told to."""
        self._batches += 1
        if self._batches % self.every == 0 and not trainer.should_stop and self._agreed(trainer):
            self._leave(trainer)

    def _agreed(self, trainer: pl.Trainer) -> bool:
        told = torch.tensor(float(self.told is not None), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(told, reduce_op="sum") > 0)

    def _leave(self, trainer: pl.Trainer) -> None:
        folder = Path(self.dirpath or trainer.default_root_dir)
        path = folder / f"{STEM}{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        trainer.strategy.barrier("preemption")
        trainer.should_stop = True
        rank_zero_info(f"preempted: saved {path}; go on with --ckpt_path last")
        if trainer.is_global_zero:
            self._prune(folder, path)
            self._back_into_the_queue()

    @staticmethod
    def _prune(folder: Path, newest: Path) -> None:
        """Earlier preemptions' checkpoints are behind this one, and sharded ones are large."""
        for old in folder.glob(f"{STEM}*.ckpt"):
            if old != newest:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _back_into_the_queue(self) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        # A shell under salloc has these names; it is a person's, and is not to be taken away.
        interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        if not (self.requeue and job) or interactive:
            return
        # Of a job array, this element alone.
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        name = f"{array}_{task}" if array and task else job
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(
                f"scontrol requeue {name} failed: {done.stderr.strip()}",
                "a job that may be requeued",
                "submit with #SBATCH --requeue; the checkpoint is saved, so submitting again goes on from it",
            )
