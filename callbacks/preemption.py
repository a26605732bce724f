"""Leaving a cluster when told to, without losing an update."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.leaving import exit_code
from callbacks.order import in_order
from muybridge.errors import UsageError

LEFT_EARLY = 75
"""Exit code of a run that was told to leave: the system's own word for "try again" (EX_TEMPFAIL)."""


class Preempted(SystemExit):
    """The run has saved and leaves. No end of an epoch and no validation come first: the time is not the run's any more."""

    def __init__(self, code: int = LEFT_EARLY) -> None:
        super().__init__(code)


class Preemption(pl.Callback):
    """Save and leave when the cluster says so; under SLURM, put the job back into the queue.

    The signal handler only sets a flag. Ranks compare flags after an update, and save together: Lightning's own handlers save
    and broadcast where the signal finds them, and if that is inside a collective on one rank and outside it on another, both
    wait for ever. Start the job with ``--ckpt_path last``: the same command then begins, or goes on.

    Args:
        signals: What the cluster sends before it takes the node; ``#SBATCH --signal=USR1@120`` sends the first 120 seconds
            before the time limit.
        every: Updates between two comparisons, which are one small all-reduce each.
        dirpath: Where the checkpoint goes; where ``ModelCheckpoint`` was told to write, else ``default_root_dir``, where not
            given.
        requeue: Under SLURM, ask for the job to be run again. Not after SIGTERM, which comes from ``scancel``, or from a
            scheduler that does so itself.
        name: Name of the run; the SLURM job's where not given. A run does not go on from a checkpoint in its own folder that
            a run of another name wrote.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGUSR1", "SIGTERM"),
        every: int = 1,
        dirpath: Optional[str] = None,
        requeue: bool = True,
        name: Optional[str] = None,
    ) -> None:
        unknown = [s for s in signals if not isinstance(getattr(signal, s, None), signal.Signals)]
        if unknown or not signals:
            raise UsageError(f"Preemption signals are {list(signals)}", "names of signals, such as SIGUSR1 and SIGTERM")
        if every < 1:
            raise UsageError(f"Preemption every is {every}", "a number of updates, 1 or more")
        self.signals = [getattr(signal, s) for s in signals]
        self.every, self.dirpath, self.requeue, self.name = every, dirpath, requeue, name
        self.told: Optional[int] = None
        self._folder = Path()
        self._before: dict[int, Any] = {}
        self._owner = 0
        self._began = self._last = 0

    # -- listening -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen from the start, since loading weights can take minutes, and take the place among the callbacks."""
        if stage != TrainerFn.FITTING:
            return
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("Preemption in a run outside the main thread", "the main thread, where signals arrive")
        environment = getattr(trainer._accelerator_connector, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        trainer.callbacks = in_order(trainer.callbacks, self)
        # ModelCheckpoint, which sets up later, replaces what it was not told by the folder of this attempt's log.
        told = [c.dirpath for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        self._folder = Path(self.dirpath or (told[0] if told else trainer.default_root_dir))
        self.told, self._owner = None, os.getpid()
        self._before = {number: signal.getsignal(number) for number in self.signals}
        self._listen()

    def _listen(self) -> None:
        for number in self.signals:
            signal.signal(number, self._note)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again: Lightning has put its own handler of SIGTERM before ours, and that one broadcasts."""
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again, and refuse to begin anew what was left to be gone on with."""
        self._listen()
        # Lightning gives handlers back after a run as it found them, ours among them; after an error it does so last.
        found = trainer._signal_connector._original_handlers
        found.update({n: before for n, before in self._before.items() if found.get(n) == self._note})
        self._began = self._last = trainer.global_step
        left = self._written()
        if left and not trainer.ckpt_path:
            raise UsageError(
                f"{left[-1]} was left by this run to go on from, and this run starts anew",
                "--ckpt_path last in the command of a run that may be put back into the queue",
                "add it; or remove that checkpoint, or give another trainer.default_root_dir, to start anew",
            )

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:
            # A process forked from this one, such as a data worker of another library: it has nothing to save.
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif number in self._before:
            self.told = number
        else:
            # The run is over, or failed before it began, and something put this handler back.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _deafen(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back; a run that came to its end has nothing left to go on from."""
        self._deafen()
        if trainer.is_global_zero:
            self._remove(self._written())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._deafen()

    # -- leaving ---------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave if any rank was told to; only after an update, since gradients of micro-batches are in no checkpoint."""
        if trainer.global_step - self._last < self.every:
            return
        self._last = trainer.global_step
        told = self._agreed(trainer)
        if told is not None:
            self._leave(trainer, told)

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was told to leave: for what takes long, between two steps that all ranks take together."""
        return self._agreed(trainer) is not None

    def leave(self, trainer: pl.Trainer) -> None:
        """Save and leave, on all ranks that :meth:`asked`, with everything back in the place it has after an update."""
        told = self._agreed(trainer)
        if told is not None:
            self._leave(trainer, told)

    def _agreed(self, trainer: pl.Trainer) -> Optional[int]:
        """What any rank was told: that signal asks for the most which is not SIGTERM."""
        urgency = 0 if self.told is None else 1 if self.told == signal.SIGTERM else 2
        everywhere = trainer.strategy.reduce(
            torch.tensor(urgency, device=trainer.strategy.root_device), reduce_op="max"
        )
        return int(everywhere) or None

    def _leave(self, trainer: pl.Trainer, urgency: int) -> None:
        if trainer.global_step == self._began:
            rank_zero_info("told to leave before the first update: there is nothing to save that was not there before")
        else:
            self._save(trainer)
        refused = back_into_the_queue() if trainer.is_global_zero and urgency == 2 and self.requeue else ""
        # srun --kill-on-bad-exit ends all ranks when the first has left, so none may leave before the queue was asked.
        trainer.strategy.barrier("preemption")
        if refused:
            raise UsageError(
                refused,
                "a job that may be requeued",
                "submit with #SBATCH --requeue; the checkpoint is saved, and submitting again goes on from it",
            )
        raise Preempted(exit_code(trainer, LEFT_EARLY))

    def _save(self, trainer: pl.Trainer) -> None:
        before = self._written()
        path = self._folder / f"{self._stem()}{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"told to leave: saved {path}; --ckpt_path last goes on from it")
        if trainer.is_global_zero:
            self._remove(p for p in before if p != path)

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def run(self) -> str:
        """The run's name; empty where nobody gave it one."""
        return self.name or ("" if interactive() else os.environ.get("SLURM_JOB_NAME", ""))

    def _stem(self) -> str:
        run = re.sub(r"[^\w.-]+", "-", self.run)
        return f"preempted-{run}-" if run else "preempted-"

    def _written(self) -> list[Path]:
        """The checkpoints this run left, oldest first."""
        pattern = re.compile(re.escape(self._stem()) + r"\d{8,}\.ckpt")
        if not self._folder.is_dir():
            return []
        return sorted(p for p in self._folder.iterdir() if pattern.fullmatch(p.name))

    @staticmethod
    def _remove(paths: Any) -> None:
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """The run's name, in every checkpoint."""
        return {"run": self.run}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on from another run's checkpoint in a folder that both use."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        theirs = state.get("run", "")
        if trainer.state.fn != TrainerFn.FITTING or not theirs or not self.run or theirs == self.run:
            return
        path = Path(str(trainer.ckpt_path)).resolve()
        shared = [f for f in (self._folder, Path(trainer.default_root_dir)) if path.is_relative_to(f.resolve())]
        if shared:
            raise UsageError(
                f"{path} was written by the run {theirs!r}, and this is the run {self.run!r}, in the same folder {shared[0]}",
                "a folder of its own for every run",
                f"set trainer.default_root_dir; or, to go on with that run, name: {theirs} of Preemption (or that job name)",
            )


def interactive() -> bool:
    """Whether this is a person's shell under SLURM, which is not to be taken away."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def back_into_the_queue() -> str:
    """Ask SLURM to run this job again, of a job array this element alone; what it says if it refuses.

    Outside SLURM there is nothing to ask.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or interactive():
        return ""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else job
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    return f"scontrol requeue {name} failed: {done.stderr.strip()}" if done.returncode else ""
