"""Ctrl-C loses no update: what was trained is saved, and the next run goes on bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.counting import Kick, count
from support.ranks import run_ranks

from callbacks.interruption import Interrupted, Interruption
from muybridge.errors import UsageError

DATA: dict[str, Any] = dict(size=24, batch_size=3)
EPOCHS: dict[str, Any] = dict(max_epochs=2)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before, "the signal is given back"


def stop(root: Path, *callbacks: pl.Callback, every: int = 1, **settings: Any) -> Path:
    data = {**DATA, "validation": "val_check_interval" in settings}
    with pytest.raises(Interrupted) as left:
        count(data, {**EPOCHS, **settings, "default_root_dir": str(root)}, [Interruption(every), *callbacks])
    assert left.value.code == 130
    [path] = root.rglob("interrupted-*.ckpt")
    return path


@pytest.mark.parametrize("step", [0, 3, 7, 9])
def test_the_update_is_finished_saved_and_gone_on_from(
    step: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = count(DATA, EPOCHS)
    path = stop(tmp_path, Kick(0, step, "SIGINT"))
    assert path == tmp_path / "checkpoints" / f"interrupted-{step + 1:08d}.ckpt"
    assert "Ctrl-C: saving after this update" in capfd.readouterr().err
    rest = count(DATA, EPOCHS, [Interruption()], str(path))
    assert rest.seen == whole.seen[step + 1 :]
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    assert path.is_file(), "a person may want it again"


class Once(pl.Callback):
    """One Ctrl-C, in the first micro-batch of an update: the second would end the tests."""

    done = False

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == 1 and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)


class InValidation(pl.Callback):
    then: Any = None

    def on_validation_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == 4 and self.then is None:
            os.kill(os.getpid(), signal.SIGINT)
            self.then = signal.getsignal(signal.SIGINT)


def test_during_validation_it_stops_after_it_and_the_second_ctrl_c_is_the_systems(tmp_path: Path) -> None:
    whole = count({**DATA, "validation": True}, {**EPOCHS, "val_check_interval": 4}).seen
    kick = InValidation()
    path = stop(tmp_path, kick, val_check_interval=4)
    assert kick.then is signal.SIG_DFL
    assert path.name == "interrupted-00000004.ckpt"
    data = {**DATA, "validation": True}
    assert count(data, {**EPOCHS, "val_check_interval": 4}, ckpt_path=str(path)).seen == whole[4:]


def test_accumulated_micro_batches_are_finished_first(tmp_path: Path) -> None:
    whole = count(DATA, {**EPOCHS, "accumulate_grad_batches": 4}).seen
    path = stop(tmp_path, Once(), accumulate_grad_batches=4)
    assert path.name == "interrupted-00000002.ckpt"
    assert count(DATA, {**EPOCHS, "accumulate_grad_batches": 4}, ckpt_path=str(path)).seen == whole[8:]


def test_it_is_saved_where_the_others_are_and_compared_every_so_often(tmp_path: Path) -> None:
    told = ModelCheckpoint(str(tmp_path / "kept"), every_n_train_steps=2, save_top_k=-1)
    path = stop(tmp_path, Kick(0, 3, "SIGINT"), told, every=5, enable_checkpointing=True)
    assert path == tmp_path / "kept" / "interrupted-00000005.ckpt"


def test_a_process_made_deaf_to_ctrl_c_stays_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(count(DATA, EPOCHS, [Interruption(), Kick(0, 3, "SIGINT")]).seen) == 16
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_impossible_setting_is_refused() -> None:
    with pytest.raises(UsageError):
        Interruption(every=0)


def interrupted(root: str) -> tuple[int, list[list[int]]]:
    """Only the second rank hears it."""
    from lightning.pytorch.strategies import DDPStrategy

    trainer = {**EPOCHS, "strategy": DDPStrategy(process_group_backend="gloo"), "default_root_dir": root}
    try:
        count({**DATA, "num_workers": 1}, trainer, [Interruption(), Kick(1, 3, "SIGINT")])
    except Interrupted as left:
        trainer["strategy"] = DDPStrategy(process_group_backend="gloo")
        [path] = Path(root).rglob("interrupted-*.ckpt")
        return left.code, count(DATA, trainer, ckpt_path=str(path)).seen  # type: ignore[return-value]
    raise AssertionError("the run was not interrupted")


def test_ranks_stop_together_whoever_hears_it(tmp_path: Path) -> None:
    (first, left), (second, right) = run_ranks(interrupted, str(tmp_path))
    assert (first, second) == (130, 130)
    assert len(left) == len(right) == 4
    seen = [i for part in (left, right) for step in part for i in step]
    assert sorted(seen) == list(range(24))
