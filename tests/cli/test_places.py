"""The user's own modules are found last, and never in place of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from muybridge.cli.places import ROOMS

from .conftest import ROOT, Command, python


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("regular", [True, False])
def test_a_package_of_the_user_that_hides_ours_is_named(tmp_path: Path, room: str, regular: bool):
    """``python -m`` looks here first. A folder without __init__ is no package, and hides nothing."""
    (tmp_path / room).mkdir()
    (tmp_path / room / "mine.py").write_text("")
    if regular:
        (tmp_path / room / "__init__.py").write_text("")
    result = python("-m", "muybridge", "tiny", cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    if regular:
        assert lines[0] == f"error: {tmp_path / room} hides muybridge's own package {room}"
        assert "run the command `muybridge`" in result.stderr
    else:
        assert lines[0] == "error: neither --family nor --clips is given"
    assert len(lines) == 3


def test_a_package_on_pythonpath_that_hides_ours_is_named(tmp_path: Path):
    (tmp_path / "lib/callbacks").mkdir(parents=True)
    (tmp_path / "lib/callbacks/__init__.py").write_text("")
    result = python("-m", "muybridge", "tiny", cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'lib'}:{ROOT}")
    assert result.returncode == 2
    assert f"{tmp_path / 'lib/callbacks'} hides" in result.stderr
    assert result.stderr.strip().endswith("rename yours")


def test_the_console_script_does_not_look_here_first(tmp_path: Path):
    """A script's own folder is first on the path, not the current one; ours is found, whatever lies here."""
    for name in (*ROOMS, "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/muybridge"
    script.write_text("import sys\nfrom muybridge.__main__ import main\nsys.exit(main())\n")
    result = python(str(script), "tiny", cwd=tmp_path)
    assert "neither --family nor --clips" in result.stderr
    listed = python(str(script), "list", "configs", cwd=tmp_path)
    assert "tiny/wan.yaml" in listed.stdout


LOSS = """
from muybridge.losses import Loss, per_sample

class {name}(Loss):
    def __init__(self, power: float = 2.0):
        super().__init__()

    def forward(self, step):
        return per_sample(step.x0 - step.clean)
"""


@pytest.mark.parametrize("beside", ["config", "current"])
@pytest.mark.parametrize("short", [True, False])
def test_a_class_next_to_the_config_or_here_is_found(command: Command, tmp_path: Path, beside: str, short: bool):
    name = f"Mine{beside.title()}{short}"
    folder = tmp_path / "elsewhere" if beside == "config" else tmp_path
    (tmp_path / "elsewhere").mkdir()
    (folder / f"file_{name.lower()}.py").write_text(LOSS.format(name=name))
    (folder / "other_script.py").write_text("raise SystemExit('ran a file that nobody named')")
    path = name if short else f"file_{name.lower()}.{name}"
    (tmp_path / "elsewhere/mine.yaml").write_text(f"model: {{init_args: {{losses: [{{class_path: {path}}}]}}}}\n")
    result = command("fit", "-c", "tiny/wan.yaml", "-c", "elsewhere/mine.yaml", "--print_config")
    assert result.code == 0, result.err
    assert f"class_path: file_{name.lower()}.{name}" in result.out


def test_a_short_name_that_ships_means_what_ships(command: Command, tmp_path: Path):
    (tmp_path / "copy.py").write_text(LOSS.format(name="Denoising"))
    result = command("fit", "-c", "tiny/wan.yaml", "--print_config")
    assert result.code == 0, result.err
    assert "class_path: muybridge.losses.Denoising" in result.out


def test_the_users_folders_come_last(command: Command, tmp_path: Path):
    import sys

    (tmp_path / "random.py").write_text("raise RuntimeError('a user file in place of the standard library')")
    assert command("fit", "-c", "tiny/wan.yaml", "--print_config").code == 0
    assert sys.path[-1] == str(tmp_path)
