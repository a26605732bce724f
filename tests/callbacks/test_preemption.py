"""A run that is told to leave saves, leaves, and goes on as if it had not: one process, and two whose signals differ."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.counting import QUIET, Indices, Kick, Numbers, Recorder, count
from support.ranks import run_ranks
from support.strategies import Left, run

from callbacks.ema import EMA
from callbacks.interruption import Interruption
from callbacks.order import TakesLong
from callbacks.preemption import LEFT_EARLY, Preempted, Preemption
from callbacks.samples import Samples
from lightning_modules import Sampling
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
DATA: dict[str, Any] = dict(size=24, batch_size=3)
EPOCHS: dict[str, Any] = dict(max_epochs=2)


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run, these runs are nobody's job."""
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)


class Hooks(pl.Callback):
    """Names of the hooks that come after an update."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_validation_start(self, *_: Any) -> None:
        self.seen.append("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.append("epoch end")

    def on_train_end(self, *_: Any) -> None:
        self.seen.append("end")


def leave(
    root: Path, told: str = "SIGUSR1", step: int = 3, *more: pl.Callback, data: Any = DATA, **options: Any
) -> list[Path]:
    """A run that gets a signal in the middle of a step; the files it leaves."""
    callbacks = [Preemption(**options), Kick(0, step, told), *more]
    saves = any(isinstance(c, ModelCheckpoint) for c in more)
    settings = {**EPOCHS, "default_root_dir": str(root), "enable_checkpointing": saves}
    with pytest.raises(Preempted) as left:
        count(data, settings, callbacks)
    assert left.value.code == LEFT_EARLY
    return sorted(root.glob("**/*.ckpt"))


def go_on(root: Path, path: Optional[Path], *more: pl.Callback, data: Any = DATA, **options: Any) -> list[list[int]]:
    trainer = {**EPOCHS, "default_root_dir": str(root)}
    return count(data, trainer, [Preemption(**options), *more], str(path) if path else None).seen


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 7])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_it_saves_after_the_step_and_the_next_run_reads_what_is_left(name: str, step: int, tmp_path: Path) -> None:
    whole = count(DATA, EPOCHS).seen
    hooks = Hooks()
    [path] = leave(tmp_path, name, step, hooks, data={**DATA, "validation": True})
    assert path == tmp_path / f"preempted-{step + 1:08d}.ckpt"
    assert hooks.seen == [], "the time is not the run's any more"
    assert go_on(tmp_path, path) == whole[step + 1 :]
    assert list(tmp_path.glob("*.ckpt")) == [], "a run that came to its end leaves nothing to go on from"


def test_signals_are_compared_only_every_so_often(tmp_path: Path) -> None:
    [path] = leave(tmp_path, "SIGUSR1", 2, every=5)
    assert path.name == "preempted-00000005.ckpt"


def test_a_second_leave_takes_the_place_of_the_first(tmp_path: Path) -> None:
    [first] = leave(tmp_path, step=2)
    with pytest.raises(Preempted):
        go_on(tmp_path, first, Kick(0, 9, "SIGUSR1"))
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["preempted-00000010.ckpt"]


def test_a_run_that_would_start_anew_over_what_it_left_is_refused(tmp_path: Path) -> None:
    leave(tmp_path)
    with pytest.raises(UsageError, match="--ckpt_path last"):
        go_on(tmp_path, None)


def test_a_checkpoint_of_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    [path] = leave(shared, name="a b")
    assert path.name == "preempted-a-b-00000004.ckpt"
    with pytest.raises(UsageError, match=r"written by the run 'a b', and this is the run 'c'"):
        go_on(shared, path, name="c")
    # From a folder of its own another run may start where that one left, and nameless runs are taken at their word.
    assert len(go_on(tmp_path / "own", path, name="c")) == 12
    assert len(go_on(shared, path)) == 12
    assert path.is_file(), "it is not this run's to remove"
    assert len(go_on(shared, path, name="a b")) == 12


def test_the_checkpoint_lies_where_last_is_looked_for(tmp_path: Path) -> None:
    told = ModelCheckpoint(str(tmp_path / "kept"), every_n_train_steps=2, save_top_k=-1)
    files = leave(tmp_path, "SIGUSR1", 3, told)
    assert max(files, key=lambda p: p.stat().st_mtime_ns) == tmp_path / "kept" / "preempted-00000004.ckpt"
    # Not told where to write, it writes to a folder that is another one at each attempt.
    untold = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    files = leave(tmp_path / "root", "SIGUSR1", 3, untold)
    assert max(files, key=lambda p: p.stat().st_mtime_ns) == tmp_path / "root" / "preempted-00000004.ckpt"


class Long(TakesLong):
    """Has seen an update or not."""

    logs = "seen/"

    def __init__(self) -> None:
        self.updates = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        self.updates += 1
        pl_module.log("seen/updates", float(self.updates))


@pytest.mark.parametrize("leaves", [Preemption, Interruption])
def test_those_that_save_do_not_wait_for_what_takes_long(leaves: Any, tmp_path: Path) -> None:
    long, seen = Long(), {}

    class Saves(ModelCheckpoint):
        def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            seen[self.monitor] = (trainer.global_step, long.updates)

    every: dict[str, Any] = dict(dirpath=str(tmp_path), every_n_train_steps=2, save_top_k=-1)
    savers = [Saves(**every), Saves(**every, monitor="seen/updates")]
    settings = {"max_steps": 2, "default_root_dir": str(tmp_path), "enable_checkpointing": True}
    count(DATA, settings, [*savers, long, leaves()])
    assert seen == {None: (2, 1), "seen/updates": (2, 2)}, "but who saves by what it finds does"


def test_a_run_leaves_before_what_takes_long(tmp_path: Path) -> None:
    long = Long()
    assert leave(tmp_path, "SIGUSR1", 3, long)
    assert long.updates == 3


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    leave(tmp_path / "a")
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
    count(DATA, {**EPOCHS, "default_root_dir": str(tmp_path / "b")}, [Preemption()])
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    "options", [dict(signals=[]), dict(signals=["SIGNAL"]), dict(signals=["SIG_IGN"]), dict(every=0)]
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Preemption(**options)


class TellWorkers(pl.Callback):
    """Send the signals of a cluster to all data workers."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.told = [p.pid for p in multiprocessing.active_children() if p.pid]
            for pid in self.told:
                os.kill(pid, signal.SIGUSR1)
                os.kill(pid, signal.SIGTERM)


def with_workers(root: str) -> tuple[int, int, int]:
    tell = TellWorkers()
    module = count({**DATA, "num_workers": 2}, {**EPOCHS, "default_root_dir": root}, [tell])
    return len(tell.told), len(module.seen), len(multiprocessing.active_children())


def test_data_workers_outlive_the_signals(tmp_path: Path) -> None:
    assert run_ranks(with_workers, str(tmp_path), world=1) == [(2, 16, 0)]


class TellValidationWorkers(pl.Callback):
    """Send the whole group of a rank the signal that announces the end, while its workers read validation clips."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        if not self.told:
            self.told = [p.pid for p in multiprocessing.active_children() if p.pid]
            for pid in [*self.told, os.getpid()]:
                os.kill(pid, signal.SIGTERM)


class Validated(Numbers):
    """Numbers that validation reads as it reads clips, by workers."""

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Indices(60), num_workers=2)


def told_in_validation(root: str) -> tuple[int, int, list[str]]:
    tell, module = TellValidationWorkers(), Recorder()
    settings: dict[str, Any] = {**QUIET, **EPOCHS, "devices": 1, "default_root_dir": root, "val_check_interval": 2}
    runner = pl.Trainer(**settings, callbacks=[Preemption(), tell])
    with pytest.raises(Preempted):
        runner.fit(module, datamodule=Validated(**DATA))
    return len(tell.told), len(module.seen), [p.name for p in Path(root).glob("*.ckpt")]


def test_workers_of_a_validation_outlive_the_signals_and_the_run_saves(tmp_path: Path) -> None:
    assert run_ranks(told_in_validation, str(tmp_path), world=1) == [(2, 3, ["preempted-00000003.ckpt"])]


# -- processes that Lightning starts -----------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from callbacks.interruption import Interruption
from callbacks.preemption import Preemption
from support.counting import Kick, count
from support.strategies import strategy

class Lingers(pl.Callback):
    # The first process leaves long after the other: Lightning looks after its children every five seconds.
    def on_exception(self, trainer, pl_module, exception):
        os.write(1, f"rank {trainer.global_rank}: {exception.code};".encode())
        if trainer.is_global_zero:
            time.sleep(4)

# Lightning looks after its children every five seconds; a test need not wait for that.
_ChildProcessObserver.__init__.__defaults__ = (1,)
signal.signal(signal.SIGINT, signal.default_int_handler)
callbacks = [globals()[sys.argv[1]](), Kick(0, 3, sys.argv[2]), Lingers()]
settings = dict(devices=2, strategy=strategy("ddp"), max_epochs=2, default_root_dir=sys.argv[3])
count(dict(size=24, batch_size=3), settings, callbacks)
"""


def test_the_code_is_that_of_the_process_that_started_the_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    # Side by side: most of the time they wait.
    running = {}
    for callback, told, code in (("Preemption", "SIGUSR1", 75), ("Interruption", "SIGINT", 130)):
        command = [sys.executable, str(script), callback, told, str(tmp_path / callback)]
        running[code] = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    for code, process in running.items():
        out, said = process.communicate(timeout=200)
        assert process.returncode == code, said
        assert sorted(out.split(";")) == ["", f"rank 0: {code}", "rank 1: 0"]


# -- SLURM's queue -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in place of SLURM's that writes down how it was called; the file it writes."""
    log = tmp_path / "calls.txt"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(
        f'#!{sys.executable}\nimport os, sys\nopen({str(log)!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")\n'
        'print("no such job", file=sys.stderr)\nsys.exit(int(os.environ.get("FAIL", 0)))\n'
    )
    command.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "dog")
    return log


def test_a_job_told_in_time_goes_back_into_the_queue(scontrol: Path, tmp_path: Path) -> None:
    [path] = leave(tmp_path / "run")
    assert path.name == "preempted-dog-00000004.ckpt"
    assert scontrol.read_text() == "requeue 17\n"


def test_of_a_job_array_only_this_element(scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    leave(tmp_path / "run")
    assert scontrol.read_text() == "requeue 16_3\n"


def test_a_cancelled_job_stays_cancelled_and_others_may_choose(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path / "a", "SIGTERM")
    leave(tmp_path / "b", requeue=False)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    leave(tmp_path / "c")
    assert scontrol.read_text() == ""


def test_a_queue_that_refuses_is_said_and_the_checkpoint_is_there(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(UsageError, match="requeue 17 failed: no such job"):
        count(DATA, {**EPOCHS, "default_root_dir": str(tmp_path)}, [Preemption(), Kick(0, 3, "SIGUSR1")])
    assert (tmp_path / "preempted-dog-00000004.ckpt").is_file()


# -- shards ------------------------------------------------------------------------------------------------------------


class KickInside(pl.Callback):
    """Send a rank the signal inside the forward of one of its blocks: on one rank before, on the other after a gather."""

    def __init__(self, places: dict[int, tuple[int, int]]) -> None:
        self.places, self.done = places, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        place = self.places.get(trainer.global_rank)
        if place is None:
            return
        update, block = place

        def kick(*_: Any) -> None:
            if pl_module.updates == update and not self.done:
                self.done = True
                os.kill(os.getpid(), signal.SIGUSR1)

        pl_module.backbone.blocks()[block].attn1.register_forward_pre_hook(kick)


def told(path: str, root: str, places: dict[int, tuple[int, int]]) -> int:
    # Preemption stands before EMA in the list, and must still come after it.
    with pytest.raises(Preempted) as left:
        run(path, "folder", root, callbacks=(Preemption(), EMA(decay=0.9), KickInside(places)))
    return left.value.code  # type: ignore[return-value]


SAMPLED: dict[str, Any] = dict(job={"sampling": Sampling(steps=5, guidance=3.0, frames=9, height=16, width=16)})


def told_while_sampling(path: str, root: str, kind: str, places: dict[int, tuple[int, int]]) -> tuple[int, list[str]]:
    callbacks = (Samples(["a dog"], every=2), EMA(decay=0.9), KickInside(places), Preemption())
    with pytest.raises(Preempted) as left:
        run(path, kind, root, callbacks=callbacks, **SAMPLED)
    return left.value.code, sorted(p.name for p in Path(root).iterdir())  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "world"), [("one", 1), ("folder", 2)])
def test_a_sampling_is_left_early_with_the_weights_and_not_the_averages(
    kind: str, world: int, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    wanted = run(path, "one", str(tmp_path / "one"), callbacks=(EMA(decay=0.9),))
    # Inside the first forward after the second update, which is the sampling's.
    found = run_ranks(told_while_sampling, path, str(tmp_path / "two"), kind, {0: (2, 0)}, world=world)
    assert found == [(LEFT_EARLY, ["preempted-00000002.ckpt"])] * world, "no video has come of it"
    left = str(tmp_path / "two/preempted-00000002.ckpt")
    for rank in run_ranks(resumed, path, str(tmp_path / "two"), left, kind, world=world):
        assert rank.losses == pytest.approx(wanted.losses[2:], abs=1e-5)
        for name, tensor in wanted.weights.items():
            assert torch.allclose(rank.weights[name], tensor, atol=1e-5), name


def test_a_sampling_before_the_first_update_is_left_and_nothing_saved(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    samples, kick = Samples(["a dog"], at_start=True), KickInside({0: (0, 0)})
    with pytest.raises(Preempted):
        run(str(tiny_checkpoint("wan")), "one", str(tmp_path), callbacks=(kick, Preemption(), samples), **SAMPLED)
    assert list(tmp_path.iterdir()) == []


def resumed(path: str, root: str, ckpt_path: str, kind: str = "folder") -> Left:
    return run(path, kind, root, ckpt_path=ckpt_path, callbacks=(Preemption(), EMA(decay=0.9)))


@pytest.mark.parametrize(
    ("places", "update"),
    [({0: (2, 1), 1: (2, 0)}, 3), ({1: (1, 0)}, 2)],
    ids=["one block apart", "one rank alone"],
)
def test_ranks_told_at_different_moments_leave_together_and_go_on(
    places: dict[int, tuple[int, int]], update: int, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    wanted = run(path, "one", str(tmp_path / "one"), callbacks=(EMA(decay=0.9),))
    assert run_ranks(told, path, str(tmp_path / "two"), places, timeout=60) == [LEFT_EARLY] * 2
    [folder] = (tmp_path / "two").iterdir()
    assert folder.name == f"preempted-{update:08d}.ckpt"
    for found in run_ranks(resumed, path, str(tmp_path / "two"), str(folder)):
        assert found.losses == pytest.approx(wanted.losses[update:], abs=1e-5)
        for kind in ("weights", "averages", "moments"):
            for name, tensor in getattr(wanted, kind).items():
                assert torch.allclose(getattr(found, kind)[name], tensor, atol=1e-5), name
    assert list((tmp_path / "two").glob("*.ckpt")) == []
