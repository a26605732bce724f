"""A model that ships is a name that any path may be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.backbones import Pretrained, load, shipped
from muybridge.backbones.checkpoint import Checkpoint, local_directory
from muybridge.backbones.shipped import shipped_model
from muybridge.cli.verbs import list as listing
from muybridge.errors import UsageError
from muybridge.registry import MODELS


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build without any model."""
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package"


def test_its_name_opens_it_from_anywhere(package: Path, tiny_checkpoint: Callable[[str], Path]):
    folder = package / MODELS["proving-ground"].folder
    shutil.copytree(tiny_checkpoint("wan"), folder)
    assert shipped_model() == folder
    checkpoint = Checkpoint("proving-ground")
    assert (checkpoint.path, checkpoint.is_local, checkpoint.given) == (folder, True, "proving-ground")
    assert load("proving-ground", max_text_length=16).family == "Wan"
    assert Pretrained("proving-ground").checkpoint.fetch("vae") == folder, "nothing is downloaded"


def test_a_directory_of_that_name_goes_first(package: Path, tiny_checkpoint: Callable[[str], Path]):
    shutil.copytree(tiny_checkpoint("wan"), package / MODELS["proving-ground"].folder)
    shutil.copytree(tiny_checkpoint("latte"), "proving-ground")
    assert Pretrained("proving-ground").family == "Latte"
    assert local_directory("proving-ground") == Path("proving-ground")


def test_a_build_without_it_says_so(package: Path):
    with pytest.raises(UsageError, match=r"(?s)proving-ground is not in this build.*docs/proving-ground.md"):
        Pretrained("proving-ground")
    with pytest.raises(UsageError, match="or a model that ships \\(proving-ground\\)"):
        Checkpoint("proving-grund")
    with pytest.raises(UsageError, match="no model 'x' ships"):
        shipped_model("x")


def test_the_list_says_whether_this_build_has_it():
    for name, what, where in listing.models():
        assert what == MODELS[name].help
        there = (shipped.PACKAGE / MODELS[name].folder / "model_index.json").is_file()
        assert where == (str(shipped_model(name)) if there else "not in this build")
