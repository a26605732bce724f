"""Checkpoint files appear whole or not at all, and what is wrong with one is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.counting import Numbers, Recorder
from support.jobs import trainer

from lightning_modules.checkpoints import WholeFiles, damage, load_plain
from muybridge.errors import UsageError


class Unwritable:
    """Dies while it is written, as a full disk or a kill would have it."""

    def __reduce__(self) -> Any:
        raise OSError("No space left on device")


STATE = {"state_dict": {"w": torch.arange(4096.0)}, "pytorch-lightning_version": "2.6.0"}


def test_a_save_cut_short_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    io, file = WholeFiles(), tmp_path / "inside" / "last.ckpt"
    io.save_checkpoint(STATE, file)
    before = file.read_bytes()
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({**STATE, "broken": Unwritable()}, file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({**STATE, "epoch": 3}, file)
    assert io.load_checkpoint(file)["epoch"] == 3


def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of renaming the new file is complete beside the old one."""
    io, file, seen = WholeFiles(), tmp_path / "last.ckpt", []
    io.save_checkpoint(STATE, file)
    rename = os.replace

    def watch(source: Any, target: Any) -> None:
        seen.append((damage(Path(source)), io.load_checkpoint(target).get("epoch"), Path(source).name))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    io.save_checkpoint({**STATE, "epoch": 7}, file)
    assert seen == [("", None, ".last.ckpt.partial")]
    # "last" and clean-ups look for *.ckpt, which the partial name is not.
    assert not Path(seen[0][2]).match("*.ckpt")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.index(torch.arange(4096.0).numpy().tobytes()[:64]) + 40
    data[place] ^= 255
    file.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "is cut off"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "text": (lambda file: file.write_text("hello"), "is no file of torch.save"),
    "other bytes": (flip, "other bytes than were written"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_to_do(kind: str, tmp_path: Path) -> None:
    harm, words = DAMAGES[kind]
    io, file = WholeFiles(), tmp_path / "last.ckpt"
    for name in ("last.ckpt", "earlier.ckpt"):
        io.save_checkpoint(STATE, tmp_path / name)
    (tmp_path / "broken.ckpt").write_bytes(b"also broken")
    harm(file)
    with pytest.raises(UsageError) as caught:
        io.load_checkpoint(file)
    assert str(file) in caught.value.given
    assert words in caught.value.given
    assert caught.value.todo == f"remove it, and go on from another one, such as {tmp_path / 'earlier.ckpt'}"
    if kind != "other bytes":  # mapped, what tensors hold is not looked at
        with pytest.raises(UsageError, match=words):
            load_plain(file)


def test_a_file_of_something_else_is_no_checkpoint_and_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match="holds no state of a training run"):
        WholeFiles().load_checkpoint(tmp_path / "other.ckpt")
    torch.save({**STATE, "object": Path("x")}, tmp_path / "object.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        WholeFiles().load_checkpoint(tmp_path / "object.ckpt", weights_only=True)
    with pytest.raises(UsageError, match="does not exist"):
        WholeFiles().load_checkpoint(tmp_path / "none.ckpt")


def test_a_run_goes_on_from_a_file_so_written(tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, max_epochs=1, plugins=[WholeFiles()])
    run.fit(module, datamodule=Numbers(8, batch_size=2))
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = Recorder()
    trainer(tmp_path, max_epochs=2, plugins=[WholeFiles()]).fit(
        again, datamodule=Numbers(8, batch_size=2), ckpt_path=tmp_path / "c.ckpt"
    )
    assert len(again.seen) == 4


def test_a_sharded_folder_is_looked_at_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    whole = tmp_path / "a.ckpt"
    dcp.save({"w": torch.arange(64.0)}, checkpoint_id=whole, no_dist=True)
    assert damage(whole) == "meta.pt is missing"
    torch.save({"epoch": 1}, whole / "meta.pt")
    assert damage(whole) == ""
    for name, harm, words in (
        ("b.ckpt", lambda p: cut(next(p.glob("*.distcp"))), "is cut off after"),
        ("c.ckpt", lambda p: next(p.glob("*.distcp")).unlink(), "is missing"),
        ("d.ckpt", lambda p: cut(p / ".metadata"), "list of shards can't be read"),
        ("e.ckpt", lambda p: cut(p / "meta.pt"), "meta.pt is cut off"),
    ):
        shutil.copytree(whole, tmp_path / name)
        harm(tmp_path / name)
        assert words in damage(tmp_path / name), name
