"""A run whose machine goes away, without a signal it could hear, goes on from its last checkpoint and loses no sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from muybridge.toy_clips import write_clips

from .conftest import ROOT

CLIPS, BATCH = 24, 2

CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 2
  default_root_dir: run
  callbacks:
    - class_path: journal.Journal
    - class_path: ModelCheckpoint
      init_args: {{every_n_train_steps: 1, save_top_k: 1, save_last: true, filename: "{{step}}"}}
model:
  class_path: Finetuning
  init_args:
    backbone: {{class_path: Pretrained, init_args: {{path: {model}, max_text_length: 16}}}}
    losses: [{{class_path: Denoising}}]
data:
  class_path: VideoData
  init_args: {{videos: videos, frames: 5, height: 16, width: 16, batch_size: 2, num_workers: 1}}
"""

JOURNAL = '''
"""Writes down what every update was made from."""

import os

import lightning.pytorch as pl


class Journal(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.write(f"from {pl_module.updates}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.write(f"{trainer.current_epoch} {pl_module.updates} {' '.join(batch.ids)}")

    def write(self, line):
        with open(os.environ["JOURNAL"], "a") as file:
            file.write(line + "\\n")
'''


def start(folder: Path, journal: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command in processes of their own, all of one group."""
    command = [sys.executable, "-m", "muybridge", "fit", "-c", "c.yaml", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JOURNAL": str(journal), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{journal.stem}.out", "wb") as out:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def read(journal: Path) -> tuple[int, list[tuple[int, int, list[str]]]]:
    """The update that a process began from, and epoch, number and ids of each update it made."""
    lines = journal.read_text(encoding="utf-8").splitlines()
    parts = [line.split() for line in lines[1:]]
    return int(lines[0].removeprefix("from ")), [(int(p[0]), int(p[1]), p[2:]) for p in parts]


def kill_midway(folder: Path, journal: Path, updates: int) -> None:
    """Kill the trainer and its data workers at once, after so many updates."""
    process = start(folder, journal)
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or len(journal.read_text(encoding="utf-8").splitlines()) <= updates:
            assert process.poll() is None, (folder / f"{journal.stem}.out").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == -signal.SIGKILL


def test_a_killed_run_trains_on_every_sample_of_its_epoch_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Counted from the checkpoint it goes on from: what came after that one is undone with the weights it changed."""
    write_clips(tmp_path / "videos", CLIPS, frames=9, height=16, width=16)
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=tiny_checkpoint("wan")), encoding="utf-8")
    (tmp_path / "journal.py").write_text(JOURNAL, encoding="utf-8")
    steps = CLIPS // BATCH

    kill_midway(tmp_path, tmp_path / "first.log", updates=5)
    began, first = read(tmp_path / "first.log")
    assert began == 0
    assert 5 <= len(first) < steps, "it was killed inside the first epoch"

    process = start(tmp_path, tmp_path / "second.log", "--ckpt_path=last")
    assert process.wait(timeout=120) == 0, (tmp_path / "second.out").read_text(encoding="utf-8")
    checkpoint, second = read(tmp_path / "second.log")
    assert 0 < checkpoint <= len(first)
    # A kill costs at most the update whose checkpoint was being written, and the one after it.
    assert len(first) - checkpoint <= 1

    kept = [line for line in first if line[1] <= checkpoint]
    assert [number for _, number, _ in kept + second] == list(range(1, 2 * steps + 1))
    names = sorted(f"clip-{i:03d}" for i in range(CLIPS))
    for epoch in (0, 1):
        ids = [name for of, _, ids in kept + second for name in ids if of == epoch]
        assert sorted(ids) == names
    # What was undone comes again, in the same batches.
    assert [line for line in first if line[1] > checkpoint] == second[: len(first) - checkpoint]
