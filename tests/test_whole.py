"""Files are whole or not there; folders go on only as they were begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.begun import begin, check_same, refuse_others
from muybridge.data.cache import open_column
from muybridge.data.trajectories import TrajectoryWriter
from muybridge.errors import UsageError
from muybridge.whole import whole, write_text


@pytest.mark.parametrize("suffix", [False, True])
def test_a_file_has_its_name_once_all_of_it_is_there(tmp_path: Path, suffix: bool):
    file = tmp_path / "new" / "a.npz"
    with whole(file, suffix) as temporary:
        temporary.write_text("half")
        assert not file.exists()
        assert temporary.name.startswith(".")
        assert (temporary.suffix == ".npz") == suffix
    assert file.read_text() == "half"
    assert [p.name for p in file.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("suffix", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path: Path, suffix: bool):
    file = write_text(tmp_path / "a.txt", "before\r\n")

    def write_half() -> None:
        with whole(file, suffix) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_half()
    assert file.read_bytes() == b"before\r\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_processes_of_one_number_on_two_machines_do_not_share_a_temporary_name(tmp_path: Path):
    with whole(tmp_path / "a.txt") as mine, whole(tmp_path / "a.txt") as theirs:
        mine.write_text("mine")
        theirs.write_text("theirs")
    assert (tmp_path / "a.txt").read_text() == "mine", "the outer one is renamed last"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def open_cache(folder: Path, made: int) -> None:
    open_column(folder, "latents", {"made": made})


def open_trajectories(folder: Path, made: int) -> None:
    TrajectoryWriter(folder / "latents", {"made": made})


def open_results(folder: Path, made: int) -> None:
    begin(folder / "latents/manifest.json", {"made": made}, "results")
    (folder / "latents/result").write_text("")


@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize("begins", [open_cache, open_trajectories, open_results])
def test_two_processes_may_begin_a_folder_at_once(
    begins: Callable[[Path, int], None], other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, waiting = tmp_path / "new", [True]

    def then_the_other(plain: Callable[[Path], bool]) -> Callable[[Path], bool]:
        def found(path: Path) -> bool:
            there = plain(path)
            if path.name == "manifest.json" and not there and waiting:
                waiting.clear()
                begins(folder, other)
                (path.parent / "shard-0").write_text("")
            return there

        return found

    for look in ("exists", "is_file"):
        monkeypatch.setattr(Path, look, then_the_other(getattr(Path, look)))
    if other == 1:
        begins(folder, 1)
    else:
        with pytest.raises(UsageError, match="made"):
            begins(folder, 1)
    assert not waiting


def test_a_folder_belongs_to_its_settings(tmp_path: Path):
    note = tmp_path / "run" / "settings.json"
    begin(note, {"updates": 3, "sizes": (1, 2)}, "results")
    (note.parent / "other").write_text("")
    begin(note, {"updates": 3, "sizes": (1, 2)}, "results")
    with pytest.raises(UsageError, match="updates is 3 there and 4 here; model is None there and 'x' here"):
        begin(note, {"updates": 4, "sizes": (1, 2), "model": "x"}, "results")
    # What was the only way when a folder was begun is not said in its note.
    begin(note, {"updates": 3, "sizes": (1, 2), "model": "x"}, "results", {"model": "x"})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    full = tmp_path / "full"
    refuse_others(full, "results")
    full.mkdir()
    (full / ".hidden").write_text("")
    refuse_others(full, "results")
    (full / "mine").write_text("")
    for folder in (full, full / "mine"):
        with pytest.raises(UsageError, match=f"{folder.name} exists and holds no results"):
            begin(folder / "settings.json", {}, "results")
    begin(full / "settings.json", {}, "results", alone=False)
    assert (full / "mine").is_file()


def test_tuples_are_lists_once_they_were_in_a_file():
    check_same("it was", {"a": [1, 2]}, {"a": (1, 2)}, "begin again")
