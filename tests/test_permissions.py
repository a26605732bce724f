"""What is written can be read by those whom the umask lets read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from muybridge.backbones import load
from muybridge.backbones.adapters import LoRA, inject, save_adapter
from muybridge.data.shards import ShardWriter
from muybridge.export import export_pipeline


@pytest.fixture(params=[0o022, 0o027])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*.*") if p.is_file()}


def test_exports_and_caches_follow_the_umask(mode: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = load(str(tiny_checkpoint("wan")), components=("denoiser",))
    export_pipeline(backbone, str(tmp_path / "pipeline"))
    assert modes(tmp_path / "pipeline" / "transformer") == {mode}
    inject(backbone, LoRA(rank=2))
    save_adapter(backbone, tmp_path / "adapter" / "a.safetensors")
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add("a", {"x": torch.zeros(2)})
    assert modes(tmp_path / "adapter") == {mode}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "shards").glob("*.safetensors")} == {mode}
    assert not list(tmp_path.rglob(".mode*"))
