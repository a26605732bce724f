"""Toy clips whose captions part subject and motion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.backbones.base import Backbone
from muybridge.toy_clips import write_clips

References = Callable[[Path, int], Path]


@pytest.fixture(scope="session")
def references() -> References:
    """Writes so many clips into a folder, which it gives back."""

    def write(folder: Path, count: int) -> Path:
        write_clips(folder, count, frames=9, height=32, width=32)
        for file in folder.glob("*.txt"):
            file.write_text(file.read_text().replace(" moves", " | moves"))
        return folder

    return write


@pytest.fixture(scope="session")
def clips(references: References, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of them; tests must not write there."""
    return references(tmp_path_factory.mktemp("references"), 2)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading any network fails the test."""

    def loaded(self: Backbone) -> Backbone:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Backbone, "materialize", loaded)
