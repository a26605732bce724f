"""SIGTERM ends a job that stands in a loop's place, which Lightning's own handler would let go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest

from muybridge.cli.jobs import Trainer


class Nothing(pl.LightningModule):
    def predict_step(self, batch: object, batch_idx: int) -> None:
        """Never called."""


def test_a_job_that_is_told_to_end_ends(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    went_on = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        went_on.append(True)

    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    with pytest.raises(SystemExit) as caught:
        trainer.run_with(Nothing(), work)
    assert caught.value.code == 128 + signal.SIGTERM
    assert not went_on
    assert signal.getsignal(signal.SIGTERM) == before
