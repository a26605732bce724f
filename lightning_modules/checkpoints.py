"""Checkpoints as files: written whole or not at all, and refused in words where they are damaged."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from muybridge.errors import UsageError

METADATA = "meta.pt"
"""The file of a checkpoint folder that holds all but tensors; Lightning's name for it."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under another name beside its own and renames it, so that a killed job leaves the old one whole.

    (Lightning collects all of it in memory and writes it into the file that is there.) The command's Trainer has it unless
    the config names another ``CheckpointIO``; in code it is ``Trainer(plugins=[WholeFiles()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Optional[Any] = None) -> None:
        """Write the file."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        try:
            with open(partial, "wb") as out:
                torch.save(checkpoint, out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, loc: storage, weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        """Read the file; what is damaged, or no checkpoint of a run, is an error that says so."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).is_file():
            raise UsageError(f"checkpoint {path} does not exist", "a checkpoint file that fit wrote", "check ckpt_path")
        # Torch takes other bytes than were written for weights, so the file's own checksums are compared first.
        why = damage(Path(path))
        if why:
            raise damaged(Path(path), why)
        checkpoint = super().load_checkpoint(path, map_location, weights_only)
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
            raise UsageError(
                f"{path} holds no state of a training run", "a checkpoint that fit wrote", "check ckpt_path"
            )
        return checkpoint


def load_plain(path: Path, safe: bool = True) -> dict[str, Any]:
    """``torch.load`` onto the CPU without reading tensors before they are used; with ``safe``, tensors and plain types only."""
    try:
        with damage_is_said(path):
            return torch.load(path, mmap=True, map_location="cpu", weights_only=safe)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds an object that is neither a tensor nor of a plain type ({culprit(error)})",
            "a checkpoint that muybridge wrote",
            "if you trust who made it, set trust_checkpoints of FullyShard",
        ) from error


def culprit(error: Exception) -> str:
    """The sentence of torch's long message that names the class."""
    named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    return named[0] if named else str(error).splitlines()[0]


# -- damage ----------------------------------------------------------------------------------------------------------------


@contextmanager
def damage_is_said(path: Path) -> Iterator[None]:
    """Errors of reading a damaged checkpoint become one that names the file; those of a whole one stay what they are."""
    try:
        yield
    except Exception as error:
        why = "" if isinstance(error, UsageError) else damage(path)
        if not why:
            raise
        raise damaged(path, why) from error


def damaged(path: Path, why: str) -> UsageError:
    """The error of a damaged checkpoint."""
    others = others_beside(path)
    todo = f"go on from another one, such as {others[-1]}" if others else "start again, or go on from another one"
    return UsageError(
        f"checkpoint {path} is damaged: {why}", "the whole of it, as it was written", f"remove it, and {todo}"
    )


def damage(path: Path) -> str:
    """What is wrong with the bytes of a checkpoint file, or of the folder of a sharded one; empty where nothing is."""
    return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)


def _damage_of_file(path: Path) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size == 0:
        return f"{path.name} is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        with open(path, "rb") as file:
            begins = file.read(4) == b"PK\x03\x04"
        return f"{path.name} is cut off" if begins else f"{path.name} is no file of torch.save ({error})"
    return f"{path.name} holds other bytes than were written, first in {wrong}" if wrong else ""


def _damage_of_folder(path: Path) -> str:
    from torch.distributed.checkpoint import FileSystemReader

    why = _damage_of_file(path / METADATA)
    if why:
        return why
    try:
        stored = FileSystemReader(path).read_metadata().storage_data
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError, IndexError) as error:
        return f"its list of shards can't be read ({error})"
    ends: dict[str, int] = {}
    for info in stored.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < end:
            return f"{name} is cut off after {file.stat().st_size} of {end} bytes"
    return ""


def others_beside(path: Path) -> list[Path]:
    """Other checkpoints in the same folder that are whole, oldest first."""
    found = [p for p in path.parent.glob("*.ckpt") if p != path and not damage(p)] if path.parent.is_dir() else []
    return sorted(found, key=lambda p: p.stat().st_mtime_ns)
