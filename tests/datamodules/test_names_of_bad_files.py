"""A bad file is named by its own path, also where training and validation use the same ids."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import finetuning, trainer

from datamodules import VideoData
from muybridge.cli.front import main
from muybridge.data.account import read
from muybridge.toy_clips import write_clips


def test_a_bad_training_file_is_not_mistaken_for_its_namesake(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    write_clips(tmp_path / "good", 2)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    broken = sorted((tmp_path / "bad").glob("*.mp4"))[0]
    broken.write_bytes(b"hello")
    data = VideoData(
        str(tmp_path / "bad"),
        validation=str(tmp_path / "good"),
        frames=9,
        height=16,
        width=16,
        num_workers=0,
        max_bad_fraction=1.0,
    )
    trainer(tmp_path / "run", max_steps=2, limit_val_batches=1).fit(finetuning(tiny_checkpoint("wan")), data)
    assert [entry["path"] for entry in read(tmp_path / "run" / "bad_videos.jsonl")] == [str(broken)]


def test_a_cache_is_not_written_into_a_folder_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tiny", "--family", "wan", "--clips", "runs/tiny/clips"]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert main(["cache", "-c", "tiny/wan.yaml", "--out", "runs/tiny/wan"]) == 2
    assert "is no cache" in capsys.readouterr().err
    assert [p for p in sorted(tmp_path.rglob("*")) if "runs/tiny/wan" in str(p)] == [
        p for p in before if "runs/tiny/wan" in str(p)
    ]
