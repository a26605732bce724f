"""From a checkpoint to files for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muybridge.cli.checkpoints import one_file
from muybridge.errors import UsageError

TRAINER = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "logger": False,
    "plugins": None,
}
"""One process without a GPU, whatever the run used: exporting only moves weights, and must not round them."""


def export(trainer: Any, model: Any, ckpt_path: str, out: str) -> None:
    """Turn a checkpoint into a diffusers pipeline directory, or into adapter files; the average, where the run kept one.

    Args:
        trainer: Sets up and loads.
        model: What the config describes.
        ckpt_path: A checkpoint file, a sharded checkpoint folder, ``last`` or ``best``.
        out: A new directory.
    """
    if not callable(getattr(model, "export", None)):
        raise UsageError(
            f"{type(model).__name__} has no export(out)", "a job that muybridge ships, or one of yours with this method"
        )
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UsageError(
            f"{out} exists and is not empty", "a new directory", "choose another --out, or remove it first"
        )

    with one_file(ckpt_path, out) as file:
        for path in trainer.run_with(model, lambda: model.export(out), file):
            print(path)
