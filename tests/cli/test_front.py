"""The front answers without libraries."""

from __future__ import annotations

import importlib
import re
import statistics
import time
from pathlib import Path

import pytest

import muybridge
from muybridge.cli.verbs.list import KINDS
from muybridge.registry import VERBS

from .conftest import ROOT, Command, python

LIGHT = [["--help"], ["-h"], [], ["--version"], ["list"], ["list", "--help"], *(["list", kind] for kind in KINDS)]


def test_help_version_and_lists_import_no_library(tmp_path: Path):
    """Everything that is loaded after all of them is Python's own or the command's front."""
    code = f"""
import sys
before = set(sys.modules)
from muybridge.__main__ import main
for arguments in {LIGHT!r}:
    assert main(arguments) == 0, arguments
loaded = {{m.split(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print("loaded:", sorted(loaded), file=sys.stderr)
print("ours:", sorted(m for m in sys.modules if m.startswith("muybridge.") and "cli" not in m), file=sys.stderr)
"""
    result = python("-c", code, cwd=tmp_path)
    assert "loaded: ['muybridge']" in result.stderr, result.stderr
    assert "ours: ['muybridge.__main__', 'muybridge.errors', 'muybridge.registry']" in result.stderr


def test_help_answers_within_a_second(tmp_path: Path):
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        result = python("-m", "muybridge", "--help", cwd=tmp_path)
        seconds.append(time.monotonic() - start)
        assert result.returncode == 0
    assert statistics.median(seconds) < 1.0


def test_help_names_every_verb(command: Command):
    out = command("--help").out
    assert all(re.search(rf"^  {name} +{re.escape(verb.help)}$", out, re.MULTILINE) for name, verb in VERBS.items())
    assert command().out == out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "--trainer.max_steps"),
        (["--model.help", "Finetuning"], "Which times are drawn"),
        (["--model", "Finetuning", "--model.losses.help", "Denoising"], "--losses.weighting"),
        (["--data.help", "VideoData"], "--data.videos"),
    ],
)
def test_help_of_a_verb_and_of_its_classes(command: Command, arguments: list[str], said: str):
    """The docstrings' ``Args:`` are the help."""
    result = command("fit", *arguments)
    assert result.code == 0
    assert said in result.out


def test_version(command: Command):
    assert command("--version").out.strip() == f"muybridge {muybridge.__version__}"


def test_the_console_script_is_this_front():
    """The entry point of pyproject.toml names something that can be called."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^\[project\.scripts\]\nmuybridge = "([\w.]+):(\w+)"', text, re.MULTILINE)
    assert match
    assert (
        getattr(importlib.import_module(match.group(1)), match.group(2))
        is importlib.import_module("muybridge.cli").main
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fti"], "did you mean fit"),
        (["--verbose", "fit"], "comes before the verb"),
        (["list", "bakbones"], "did you mean backbones?"),
    ],
)
def test_what_the_front_refuses(command: Command, arguments: list[str], said: str):
    result = command(*arguments)
    assert result.code == 2
    assert said in result.message
    assert len(result.err.strip().splitlines()) <= 3


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path):
    code = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "muybridge", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
process.stdout.close()
said = process.stderr.read()
print(process.wait(), said)
"""
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "0 b''"
