"""Real broken files: none hangs a worker, moves another index, or ends a run on one rank only."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.clips import BAD, copy_into, folder_of, make_bad, numbers_of
from support.jobs import finetuning, trainer
from support.ranks import run_ranks
from torch.utils.data import DataLoader

from datamodules import VideoData
from datamodules.bad_videos import BadVideoWatch
from datamodules.collate import collate
from datamodules.video import VideoDataset
from muybridge.data.account import Account, append, line, merge, read
from muybridge.data.buckets import Bucket
from muybridge.data.reading import Reading
from muybridge.data.sources import list_clips
from muybridge.errors import UsageError

NOT_COPIED = ("a pipe", "a link to itself")
SKIPPED = [name for name, (_, kind) in BAD.items() if kind is not None]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bad")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_bad(name, folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("good"), 3, 20)


def _place(name: str, good: Path, bad: Callable[[str], Path], folder: Path) -> Path:
    """A folder of three good clips and a bad one between them."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    if name in NOT_COPIED:
        make_bad(name, folder, "clip-0z")
        return folder
    copy_into(folder, bad(name))
    for suffix in (".mp4", ".txt"):
        (folder / bad(name).with_suffix(suffix).name).rename(folder / f"clip-0z{suffix}")
    return folder


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_skipped_with_its_reason_and_moves_no_other_clip(
    name: str, workers: int, good: Path, bad: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, kind = _place(name, good, bad, tmp_path), BAD[name][1]
    clips = list_clips(folder)
    ids = ["clip-0", "clip-0z", "clip-1", "clip-2"]
    assert [clip.id for clip in clips] == ids
    data = VideoDataset(clips, [Bucket(9, 24, 32)], [0] * 4, Reading())
    began = time.monotonic()
    batches = list(DataLoader(data, batch_size=2, num_workers=workers, collate_fn=collate))
    assert time.monotonic() - began < 30
    assert [i for batch in batches for i in batch.ids] == ids
    found = {i: (batch, k) for batch in batches for k, i in enumerate(batch.ids)}
    for i, start in (("clip-0", 5), ("clip-1", 105), ("clip-2", 205)):
        batch, k = found[i]
        assert batch.present is None or batch.present[k]
        assert batch.remarks is None or not batch.remarks[k]
        assert numbers_of(batch.pixels[k]) == list(range(start, start + 9))
    batch, k = found["clip-0z"]
    if kind is None:
        assert batch.present is None
        start = 0 if name == "huge" else 5
        assert numbers_of(batch.pixels[k]) == list(range(start, start + 9))
    else:
        assert batch.present.tolist() == [i != k for i in range(2)]
        assert batch.remarks[k].partition(":")[0] == kind
        assert not batch.pixels[k].any()
        assert batch.prompts[k] == ("" if name == "caption not UTF-8" else name)


def test_damage_outside_a_clip_does_not_matter(bad: Callable[[str], Path]) -> None:
    clips = list_clips(bad("corrupt"))
    taken = VideoDataset(clips, [Bucket(1, 24, 32)], [0], Reading())
    assert taken[0].present is not None  # the middle is damaged
    part = VideoDataset([clips[0].__class__(**{**vars(clips[0]), "span": (0, 3)})], [Bucket(3, 24, 32)], [0], Reading())
    assert numbers_of(part[0].pixels[0]) == [0, 1, 2]


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(good: Path, bad: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good clips and every kind of bad one."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    shutil.copytree(good, folder)
    for name in BAD:
        if name in NOT_COPIED:
            make_bad(name, folder)
        else:
            copy_into(folder, bad(name))
    return folder


READABLE = len(BAD) - len(SKIPPED) + 3
"""Clips of ``source`` that can be read."""


def _data(source: Path, **options: Any) -> VideoData:
    settings: dict[str, Any] = dict(frames=9, height=16, width=16, batch_size=2, num_workers=0, max_bad_fraction=1.0)
    return VideoData(str(source), **{**settings, **options})


def _fit(checkpoint: Path, source: Path, root: Path, options: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what this rank saw and how it ended."""
    rank_settings = dict(devices=2, strategy="ddp") if "devices" in run else {}
    fit = trainer(root, **{"max_epochs": 2, **run, **rank_settings})
    job, data, error = finetuning(checkpoint), _data(source, **options), None
    try:
        fit.fit(job, data)
    except UsageError as caught:
        error = str(caught)
    weights = torch.cat([p.detach().flatten() for p in job.parameters()])
    return {
        "rank": fit.global_rank,
        "updates": job.updates,
        "error": error,
        "finite": bool(weights.isfinite().all()),
        "sum": float(weights.double().sum()),
    }


def test_a_run_goes_on_counts_and_lists_them_once(
    source: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    told = _fit(tiny_checkpoint("wan"), source, tmp_path, {"num_workers": 2}, {})
    clips = READABLE + len(SKIPPED)
    assert told["error"] is None
    assert told["updates"] == 2 * -(-clips // 2)
    assert told["finite"]
    entries = read(tmp_path / "bad_videos.jsonl")
    names = {name: name.replace(" ", "-").replace(",", "") for name in SKIPPED}
    assert sorted(e["id"] for e in entries) == sorted(names.values())
    for name, written in names.items():
        (entry,) = [e for e in entries if e["id"] == written]
        assert entry["reason"].startswith(str(BAD[name][1]))
        assert entry["path"] == str(source / f"{written}.mp4")
    said = [r.getMessage() for r in caplog.records if "clips skipped" in r.getMessage()]
    # The order may put a bad clip twice into the last batch.
    assert len(said) == 2
    assert all("no video" in s and "bad_videos.jsonl" in s for s in said)
    assert sum("read by av" in r.getMessage() for r in caplog.records) == 1


def test_clips_that_can_be_read_are_trained_on_as_if_no_bad_ones_were_there(
    good: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """The bad one is the last of its batch and keeps its place in the run, which noise is keyed by; so it is left free here."""

    class Place(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.samples_seen += 1

    folder = tmp_path / "clips"
    shutil.copytree(good, folder)
    make_bad("empty", folder, "clip-9")
    options = {"shuffle": False, "batch_size": 4}
    with_bad = _fit(tiny_checkpoint("wan"), folder, tmp_path / "a", options, {})
    options["batch_size"] = 3
    alone = _fit(tiny_checkpoint("wan"), good, tmp_path / "b", options, {"callbacks": [Place()]})
    assert with_bad["updates"] == alone["updates"] == 2
    assert with_bad["sum"] == pytest.approx(alone["sum"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "run", "expected"),
    [
        ({}, {"max_epochs": 1}, "clips skipped"),
        ({"max_bad_fraction": 0.5}, {}, "clips skipped"),
        ({"on_error": "raise", "shuffle": False}, {}, "on_error is raise"),
    ],
    ids=["skip", "too many", "raise"],
)
def test_two_ranks_take_the_same_steps_and_stop_together(
    source: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    options: dict[str, Any],
    run: dict[str, Any],
    expected: str,
) -> None:
    settings = {"num_workers": 1, **options}
    told = run_ranks(_fit, tiny_checkpoint("wan"), source, tmp_path, settings, {**run, "devices": 2})
    assert [t["rank"] for t in told] == [0, 1]
    assert told[0]["updates"] == told[1]["updates"]
    assert told[0]["error"] == told[1]["error"]
    assert told[0]["sum"] == told[1]["sum"]
    assert [p.name for p in tmp_path.glob("bad_videos*")] == ["bad_videos.jsonl"]
    entries = read(tmp_path / "bad_videos.jsonl")
    if "on_error" in options:
        # The first batch of the two ranks holds one, in the order of the source.
        assert expected in str(told[0]["error"])
        assert told[0]["updates"] < 3
        assert 1 <= len(entries) < len(SKIPPED)
        assert entries[0]["id"] in str(told[0]["error"])
        return
    assert len(entries) == len(SKIPPED)
    assert told[0]["updates"] == -(-(READABLE + len(SKIPPED)) // 4)
    if "max_bad_fraction" in options:
        assert expected in str(told[0]["error"])
        assert "at most 50.0%" in str(told[0]["error"])
        assert str(tmp_path / "bad_videos.jsonl") in str(told[0]["error"])
    else:
        assert told[0]["error"] is None


def test_too_many_are_noticed_within_a_long_epoch(
    good: Path, bad: Callable[[str], Path], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = _place("empty", good, bad, tmp_path / "clips")
    told = _fit(
        tiny_checkpoint("wan"),
        folder,
        tmp_path,
        {"repeats": 200, "batch_size": 4, "height": 16, "width": 16, "frames": 1, "max_bad_fraction": 0.2},
        {"max_epochs": 1},
    )
    # 4 clips a step; looked at after 50 steps.
    assert told["updates"] == 50
    assert "of 200 clips skipped" in str(told["error"])


def test_a_run_that_ends_inside_its_first_epoch_is_judged_by_what_it_saw(
    good: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(good, folder)
    for video in folder.glob("*.mp4"):
        video.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"update 0: no clip of the batch is there \(.*\), and nothing is learnt"):
        told = _fit(tiny_checkpoint("wan"), folder, tmp_path, {"max_bad_fraction": 0.5}, {"max_steps": 1})
    assert told["updates"] == 1
    assert "2 of 2 clips skipped (100.0%): 2 empty" in str(told["error"])
    assert "at most 50.0% (max_bad_fraction)" in str(told["error"])
    assert len(read(tmp_path / "bad_videos.jsonl")) == 2
    # As many as are allowed.
    told = _fit(tiny_checkpoint("wan"), folder, tmp_path, {"max_bad_fraction": 1.0}, {"max_steps": 1})
    assert told["error"] is None


def test_validation_clips_are_watched_too(
    good: Path, bad: Callable[[str], Path], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = _place("audio only", good, bad, tmp_path / "clips")
    settings = {"validation": str(folder), "max_bad_fraction": 0.2}
    told = _fit(tiny_checkpoint("wan"), good, tmp_path / "run", settings, {})
    assert "1 of 4 clips skipped (25.0%): 1 no video" in str(told["error"])
    assert [e["id"] for e in read(tmp_path / "run" / "bad_videos.jsonl")] == ["clip-0z"]


# -- the account ---------------------------------------------------------------------------------------------------


def test_the_file_holds_every_reason_once_whatever_was_there(tmp_path: Path) -> None:
    file = tmp_path / "run" / "bad_videos.jsonl"
    assert read(file) == []
    append(file, [line("a", "/a.mp4", "empty: 0"), line("b", "/b.mp4", "missing")])
    with open(file, "a") as half:
        half.write('{"id": "c", "pa')
    assert [e["id"] for e in read(file)] == ["a", "b"]
    merge(file, {"b": "missing", "d": "é"}, {"d": "/d\udce9.mp4"})
    merge(file, {"b": "damaged: x"}, {})
    entries = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    assert [(e["id"], e["reason"]) for e in entries] == [
        ("a", "empty: 0"),
        ("b", "missing"),
        ("d", "é"),
        ("b", "damaged: x"),
    ]
    assert [p.name for p in file.parent.iterdir()] == ["bad_videos.jsonl"]


def test_accounts_add_up() -> None:
    one, two = Account(), Account()
    assert one.see(["a", "b"], [True, False], ["", "empty: 0"]) == ["b"]
    assert one.see(["b", "c"], [False, True], ["empty: 0", "read by av"]) == []
    two.see(["d"] * 4, [False] * 4, ["too short: 3 frames"] * 4)
    total = one + two
    assert (total.seen, total.skipped) == (8, 6)
    assert total.summary() == "6 of 8 clips skipped (75.0%): 1 empty, 1 too short"
    assert total.remarks == {"c": "read by av"}
    assert total.too_many(0.7)
    assert not total.too_many(0.75)
    assert not total.too_many(0.7, least=9)
    assert Account(3).summary() == "all 3 clips could be read"


def test_the_watch_is_there_without_being_asked_for_and_once(good: Path, tmp_path: Path) -> None:
    data, run = _data(good), trainer(tmp_path, max_epochs=1)
    data.trainer = run
    for stage in ("fit", "test"):
        data.setup(stage)
    watches = [callback for callback in run.callbacks if isinstance(callback, BadVideoWatch)]
    assert len(watches) == 1
    other = _data(good, on_error="raise")
    other.trainer = run
    other.setup("validate")
    (now,) = (callback for callback in run.callbacks if isinstance(callback, BadVideoWatch))
    assert now is not watches[0]
    assert now.on_error == "raise"
