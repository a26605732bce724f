"""Fixtures every room's tests share."""

from __future__ import annotations

import os

# Before torch is imported: two OpenMP teams on two cores are slower than one thread each, and results must not vary.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from muybridge import tiny

torch.set_num_threads(1)

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C, which some of them press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def lightning_is_heard() -> None:
    """Lightning keeps its messages from the root logger if it was imported before pytest listened there."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = True
        # A module that some tests import to be quieter must not silence the others.
        logging.getLogger(name).setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def _own_imports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test lets the command append to sys.path, and import from its own folder, is gone after it."""
    if "tmp_path" not in request.fixturenames:
        yield
        return
    folder = str(request.getfixturevalue("tmp_path"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny pipeline, built once per test run. Tests must not write into it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny.write(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return get
