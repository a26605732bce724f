"""Tiny checkpoints of the real diffusers classes, with random weights: what tests and the first demo run on.

They are complete pipelines of a few hundred KiB, saved by ``save_pretrained`` and loaded by the same code as real ones.
No vocabulary or weight is downloaded: ByT5's tokenizer needs none, the others are built from the byte alphabet.
"""

from __future__ import annotations

from pathlib import Path

import torch

from muybridge.errors import UsageError, did_you_mean
from muybridge.permissions import as_usual
from muybridge.tiny.pipelines import MAKERS

__all__ = ["MAKERS", "write"]


def write(name: str, out: str | Path) -> Path:
    """Build the tiny pipeline ``name`` and save it to ``out``; the same bytes every time."""
    if name not in MAKERS:
        raise UsageError(f"tiny model {name!r}", f"one of {', '.join(MAKERS)}", did_you_mean(name, MAKERS))
    with torch.random.fork_rng():
        pipeline = MAKERS[name]()
    pipeline.save_pretrained(str(out), safe_serialization=True)
    as_usual(Path(out))
    return Path(out)
