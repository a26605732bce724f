"""Running the command inside the test process, from a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Lightning binds its log handler to the stderr of the moment it is imported, which must not be one test's.
import lightning.pytorch.cli  # noqa: F401
import pytest

from muybridge.backbones.base import Backbone
from muybridge.cli import main
from muybridge.toy_clips import write_clips

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What one call of the command did."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stderr holds from ``error:`` on."""
        return self.err[self.err.index("error: ") :].strip() if "error: " in self.err else ""


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call ``main`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(list(arguments))
        caught = capsys.readouterr()
        return Outcome(code, caught.out, caught.err)

    return call


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four toy clips with captions."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 4, frames=9, height=64, width=64)
    return folder


@pytest.fixture
def tiny_options(tiny_checkpoint: Callable[[str], Path], clips: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The options that point a shipped tiny config at this test's files."""

    def options(name: str = "wan") -> list[str]:
        return [
            f"-c=tiny/{name}.yaml",
            f"--model.backbone.path={tiny_checkpoint(name)}",
            f"--data.videos={clips}",
            f"--data.validation={clips}",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]

    return options


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Backbone]:
    """The backbones whose weights were loaded; the real method still does the loading."""
    loaded: list[Backbone] = []
    real = Backbone.materialize

    def spy(self: Backbone) -> Backbone:
        loaded.append(self)
        return real(self)

    monkeypatch.setattr(Backbone, "materialize", spy)
    return loaded


def header_commands(name: str) -> list[list[str]]:
    """The commands in the comment at the top of a shipped config."""
    text = (ROOT / "configs" / name).read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)+", text)
    assert header, "a shipped config begins with a comment that says what it is for"
    return [shlex.split(m.group(1)) for m in re.finditer(r"^#\s+muybridge (.+)$", header.group(), re.MULTILINE)]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds the packages as an installed one would: after everything else on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MUYBRIDGE_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def kill_once_saved(root: Path, *arguments: str, cwd: Path, saved: str = "last.ckpt") -> None:
    """Run the command in processes of its own, and end them by SIGKILL as soon as such a file lies below ``root``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "muybridge", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(root.rglob(saved)):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
