"""The wheel holds what a user needs and runs away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("muybridge", "lightning_modules", "datamodules", "callbacks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    from hatchling.builders.wheel import WheelBuilder

    out = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(out), versions=["standard"])
    unpacked = out / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_it_holds_the_packages_typed_and_the_configs(wheel: Path) -> None:
    tops = {p.name for p in wheel.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == set(PACKAGES)
    for package in PACKAGES:
        assert (wheel / package / "py.typed").is_file()
        ours = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        assert ours == {p.relative_to(wheel) for p in (wheel / package).rglob("*.py")}
    # Weights that ship, their cards, and all else that is no source.
    data = [p for p in (ROOT / "muybridge").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert ROOT / "muybridge/proving_ground/reader.safetensors" in data
    for file in data:
        assert (wheel / file.relative_to(ROOT)).read_bytes() == file.read_bytes(), file
    shipped = {p.relative_to(wheel / "muybridge") for p in (wheel / "muybridge/configs").rglob("*.yaml")}
    assert shipped == {p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")}


def test_the_command_runs_from_it_and_finds_its_own_configs(wheel: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(wheel)}
        command = [sys.executable, "-m", "muybridge", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "tiny/wan.yaml" in run("list", "configs")
    printed = run("fit", "-c", "tiny/wan.yaml", "--print_config")
    assert "lightning_modules" in printed


def test_every_lower_bound_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = lines.index("dependencies = [")
    listed = lines[start + 1 : lines.index("]", start)]
    for above, line in pairwise(listed):
        if line.strip().startswith('"'):
            assert above.strip().startswith("#"), f"no reason above {line.strip()}"


def test_the_pins_satisfy_the_bounds() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["bench"],
    ]
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(requirement.name.lower())
        assert version is not None, f"{requirement.name} is not pinned"
        assert version in requirement.specifier, f"{requirement.name} {version} is outside {requirement.specifier}"
