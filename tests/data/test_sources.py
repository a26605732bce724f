"""From a path to clips: what each kind of source lists, and what it refuses; each trains a tiny model through the command."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.clips import folder_of, numbered, numbers, write

from datamodules import VideoData
from muybridge.cli import main
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.data.reading import Reading, read_clip
from muybridge.data.sources import SUFFIXES, Kind, list_clips, recognise
from muybridge.errors import UsageError

ROWS = [
    {"video": f"videos/clip-{i}.mp4", "caption": f"clip number {i}", "speed": i, "tags": f"a,{i}"} for i in range(4)
]


def _csv(folder: Path, delimiter: str = ",") -> Path:
    path = folder / ("clips.csv" if delimiter == "," else "clips.tsv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def _jsonl(folder: Path) -> Path:
    path = folder / "clips.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def _parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "clips.parquet")
    return folder / "clips.parquet"


def _json(folder: Path, entries: Any, name: str = "clips.json") -> Path:
    (folder / name).write_text(json.dumps(entries), encoding="utf-8")
    return folder / name


def _opensora(folder: Path) -> Path:
    caps: list[Any] = ["clip number 0", ["clip number 1"], ["clip number 2", "another"], "clip number 3"]
    size = {"height": 48, "width": 64}
    return _json(folder, [{"path": f"videos/clip-{i}.mp4", "cap": c, "resolution": size} for i, c in enumerate(caps)])


def _vidgen(folder: Path) -> Path:
    return _json(folder, [{"vid": f"clip-{i}", "caption": f"clip number {i}"} for i in range(4)])


# name: (how it is made, options of VideoData, what ids begin with)
SOURCES: dict[str, tuple[Callable[[Path], Path], dict[str, str], str]] = {
    "folder": (lambda f: f / "videos", {}, ""),
    "csv": (_csv, {}, "videos/"),
    "tsv": (lambda f: _csv(f, "\t"), {}, "videos/"),
    "jsonl": (_jsonl, {}, "videos/"),
    "parquet": (_parquet, {}, "videos/"),
    "json table": (lambda f: _json(f, ROWS), {}, "videos/"),
    "opensora": (_opensora, {}, "videos/"),
    "vidgen": (_vidgen, {"root": "videos"}, ""),
    "one clip": (lambda f: f / "videos" / "clip-0.mp4", {"caption": "clip number 0"}, ""),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "videos", 4, 9)
    return tmp_path


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_lists_the_same_clips(name: str, folder: Path) -> None:
    make, options, prefix = SOURCES[name]
    path = make(folder)
    clips = list_clips(path, **options)  # type: ignore[arg-type]
    count = 1 if name == "one clip" else 4
    assert [c.id for c in clips] == [f"{prefix}clip-{i}" for i in range(count)]
    assert [c.caption for c in clips] == [f"clip number {i}" for i in range(count)]
    for i, clip in enumerate(clips):
        assert clip.path.samefile(folder / "videos" / f"clip-{i}.mp4")
        assert clip.problem is None
        assert numbers(read_clip(clip, Bucket(5, 48, 64), Reading()).frames) == list(range(100 * i + 2, 100 * i + 7))
    if name in ("csv", "tsv", "jsonl", "parquet", "json table"):
        assert dict(clips[3].extra) == {"speed": "3", "tags": "a,3"}
    kind = {"folder": "folder", "opensora": "opensora", "vidgen": "vidgen", "one clip": "clip"}.get(name, "table")
    assert recognise(path) == kind
    assert list_clips(path, kind, **options) == clips  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["folder", "csv", "jsonl", "parquet", "opensora", "vidgen", "one clip"])
def test_every_source_trains_through_the_command(
    name: str, folder: Path, tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    make, options, _ = SOURCES[name]
    caplog.set_level(logging.INFO)
    code = main(
        [
            "fit",
            "-c=tiny/wan.yaml",
            f"--model.backbone.path={tiny_checkpoint('wan')}",
            f"--data.videos={make(folder)}",
            "--data.validation=null",
            "--data.frames=9",
            *(f"--data.{key}={value}" for key, value in options.items()),
            f"--trainer.default_root_dir={folder / 'run'}",
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.callbacks=[]",
            "--trainer.logger=false",
        ]
    )
    assert code == 0
    assert f"{1 if name == 'one clip' else 4} clips of 9x32x32" in caplog.text
    assert "max_steps=2" in caplog.text
    assert not (folder / "run" / "bad_videos.jsonl").exists()


# -- ids -----------------------------------------------------------------------------------------------------------


def test_ids_do_not_depend_on_where_the_files_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = [{"video": str(folder / "videos" / f"clip-{i}.mp4"), "caption": "x"} for i in range(2)]
    manifest = _json(folder, absolute, "absolute.json")
    assert [c.id for c in list_clips(manifest)] == ["videos/clip-0", "videos/clip-1"]
    assert [c.id for c in list_clips(manifest, root=folder / "videos")] == ["clip-0", "clip-1"]
    relative = [c.id for c in list_clips(_csv(folder))]
    monkeypatch.chdir(folder / "videos")
    assert [c.id for c in list_clips(Path("..") / "clips.csv")] == relative
    (folder / "other").mkdir()
    with pytest.raises(UsageError, match="which is not under"):
        list_clips(manifest, root=folder / "other")
    nested = [{"video": "./videos/../videos/clip-0.mp4", "caption": "x"}]
    assert [c.id for c in list_clips(_json(folder, nested, "nested.json"))] == ["videos/clip-0"]


def test_folders_are_searched_at_any_depth_and_hidden_files_are_none(folder: Path) -> None:
    deep = folder_of(folder / "videos" / "a" / "b.c", 1, 2)
    (deep / "clip-0.mp4").rename(deep / "Clip 0.v2.MP4")
    (deep / "clip-0.txt").rename(deep / "Clip 0.v2.txt")
    (folder / "videos" / "._clip-0.mp4").write_bytes(b"resource fork")
    (folder / "videos" / ".cache").mkdir()
    (folder / "videos" / ".cache" / "x.mp4").touch()
    ids = [c.id for c in list_clips(folder / "videos")]
    assert ids == ["a/b.c/Clip 0.v2", "clip-0", "clip-1", "clip-2", "clip-3"]


def test_a_name_that_is_not_utf8_gets_an_id_that_is(folder: Path) -> None:
    (folder / "odd").mkdir()
    name = b"\xe9t\xe9.mp4".decode("utf-8", "surrogateescape")
    write(folder / "plain.mp4", numbered(9)).rename(folder / "odd" / name)
    (clip,) = list_clips(folder / "odd", captions="optional")
    assert clip.id == "\\xe9t\\xe9"
    assert len(read_clip(clip, Bucket(5, 48, 64), Reading()).frames) == 5


# -- parts of videos -----------------------------------------------------------------------------------------------


def test_tables_and_manifests_name_parts_of_videos_and_of_pictures(folder: Path) -> None:
    write(folder / "long.mp4", numbered(60))
    table = folder / "parts.csv"
    table.write_text("video,caption,start_frame,stop_frame\nlong.mp4,one,10,19\nlong.mp4,two,30,50\nlong.mp4,all,,\n")
    clips = list_clips(table)
    assert [(c.id, c.span) for c in clips] == [("long@10-19", (10, 19)), ("long@30-50", (30, 50)), ("long", None)]
    assert [c.name for c in clips] == ["long"] * 3
    bucket = Bucket(9, 48, 64)
    assert numbers(read_clip(clips[0], bucket, Reading()).frames) == list(range(10, 19))
    assert numbers(read_clip(clips[1], bucket, Reading()).frames) == list(range(35, 44))
    bars = np.zeros((60, 64, 96, 3), np.uint8)
    bars[:, 8:56, 16:80] = numbered(60)
    write(folder / "bars.mp4", bars)
    entry = {"path": "bars.mp4", "cap": "x", "cut": [20, 40], "crop": [16, 80, 8, 56], "fps": 24, "aesthetic": 5.3}
    (clip,) = list_clips(_json(folder, [entry], "cut.json"))
    assert (clip.id, clip.span, clip.crop) == ("bars@20-40", (20, 40), (16, 80, 8, 56))
    assert dict(clip.extra) == {"fps": "24", "aesthetic": "5.3"}
    assert numbers(read_clip(clip, bucket, Reading()).frames) == list(range(25, 34))
    for wrong in ("40,20", "a,b", "-3,9"):
        table.write_text(f"video,caption,start_frame,stop_frame\nlong.mp4,one,{wrong}\n")
        with pytest.raises(UsageError, match="row 1"):
            list_clips(table)


# -- captions ------------------------------------------------------------------------------------------------------


def test_missing_captions_are_an_error_or_empty(folder: Path) -> None:
    (folder / "videos" / "clip-1.txt").unlink()
    (folder / "videos" / "clip-2.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"2 of 4 clips .* have no caption, first clip-1"):
        list_clips(folder / "videos")
    captions = [c.caption for c in list_clips(folder / "videos", captions="optional")]
    assert captions == ["clip number 0", None, None, "clip number 3"]
    with pytest.raises(UsageError, match=r"caption, or a text file clip-1.txt"):
        list_clips(folder / "videos" / "clip-1.mp4")
    assert list_clips(folder / "videos" / "clip-0.mp4")[0].caption == "clip number 0"
    with pytest.raises(UsageError, match="goes with a single video"):
        list_clips(folder / "videos", caption="x")
    lists = [{"path": "videos/clip-0.mp4", "cap": []}]
    with pytest.raises(UsageError, match="1 of 1 clips"):
        list_clips(_json(folder, lists, "bare.json"))


def test_a_caption_that_is_not_utf8_is_one_bad_clip_wherever_it_stands(folder: Path) -> None:
    latin = "vidéo à part".encode("latin-1")
    (folder / "videos" / "clip-1.txt").write_bytes(latin)
    (folder / "a.csv").write_bytes(b"video,caption\nvideos/clip-0.mp4,good\nvideos/clip-1.mp4," + latin + b"\n")
    (folder / "a.jsonl").write_bytes(
        b'{"video": "videos/clip-0.mp4", "caption": "good"}\n{"video": "videos/clip-1.mp4", "caption": "'
        + latin
        + b'"}\n'
    )
    raw = pa.array([b"good", latin], pa.binary()).view(pa.string())
    pq.write_table(
        pa.table({"video": ["videos/clip-0.mp4", "videos/clip-1.mp4"], "caption": raw}), folder / "a.parquet"
    )
    for path in ("videos", "a.csv", "a.jsonl", "a.parquet"):
        good, bad = list_clips(folder / path)[:2]
        assert good.problem is None, path
        assert (bad.caption, bad.problem) == (None, "caption: not UTF-8"), path


def test_captions_keep_what_is_in_them(folder: Path) -> None:
    caption = 'two lines\nand "quotes", commas, \u2028 and 漢字'
    with open(folder / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["", "video", "caption"], [0, "videos/clip-0.mp4", caption]])
    (clip,) = list_clips(folder / "a.csv")
    assert clip.caption == caption
    (folder / "b.jsonl").write_text(json.dumps({"video": "videos/clip-0.mp4", "caption": caption}, ensure_ascii=False))
    assert list_clips(folder / "b.jsonl")[0].caption == caption


# -- refusals ------------------------------------------------------------------------------------------------------


def _refused(folder: Path, name: str, content: str, match: str, **options: Any) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=match):
        list_clips(folder / name, **options)


def test_an_empty_source_names_itself_and_what_was_looked_for(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").touch()
    with pytest.raises(UsageError, match="empty holds no video") as caught:
        list_clips(folder / "empty")
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)
    with pytest.raises(UsageError, match="does not exist"):
        list_clips(folder / "nowhere")
    _refused(folder, "a.csv", "video,caption\n", "holds no rows")
    _refused(folder, "a.jsonl", "", "holds no rows")
    _refused(folder, "a.json", "[]", "holds nothing")


def test_what_is_wrong_with_a_manifest_is_said_with_its_place(folder: Path) -> None:
    _refused(folder, "a.csv", "path,caption\nx.mp4,hello\n", r"row 1: no video \(its columns: path, caption\)")
    _refused(folder, "a.csv", "video,caption\nvideos/clip-0.mp4,a, b\n", "row 1: more fields than columns")
    _refused(folder, "a.jsonl", '{"video": "videos/clip-0.mp4"\n', "line 1: no JSON")
    _refused(folder, "a.jsonl", "3\n", "line 1: a int")
    _refused(folder, "a.json", "{", "no JSON")
    _refused(folder, "a.json", '[{"file": "x", "text": "y"}]', "keys file, text")
    _refused(folder, "a.json", '[{"path": "x", "cap": "y"}, {"path": "z"}]', "entry 2: no cap")
    _refused(folder, "a.json", '[{"vid": "x", "caption": "y"}, 3]', "entry 2: no vid and no caption")
    _refused(folder, "a.yaml", "x", "no source that can be told")
    _refused(folder, "a.parquet", "x", "can't be read as Parquet")
    with pytest.raises(UsageError, match="root goes with a manifest"):
        list_clips(folder / "videos", root=folder)


def test_a_wrong_root_is_found_before_anything_is_trained(folder: Path) -> None:
    (folder / "other").mkdir()
    with pytest.raises(UsageError, match=r"none of 4 videos .* is there"):
        list_clips(_csv(folder), root=folder / "other")
    leading = _json(folder, [{"path": "/videos/clip-0.mp4", "cap": "x"}], "slash.json")
    with pytest.raises(UsageError, match="which is not under"):
        list_clips(leading)
    assert [c.id for c in list_clips(leading, root=folder)] == ["videos/clip-0"]
    # One that is missing is a bad file like others.
    (folder / "videos" / "clip-2.mp4").unlink()
    assert len(list_clips(_csv(folder))) == 4


def test_two_clips_of_one_id_are_an_error(folder: Path) -> None:
    (folder / "videos" / "clip-1.mkv").touch()
    with pytest.raises(UsageError, match=r"1 ids more than once, such as clip-1 \(clip-1.mkv, clip-1.mp4\)"):
        list_clips(folder / "videos")
    _refused(folder, "a.csv", "video,caption\n" + "videos/clip-0.mp4,a\n" * 2, "set repeats")


def test_a_clip_knows_the_name_of_its_video() -> None:
    assert Clip("a/b@3-9", Path("b.mp4"), span=(3, 9)).name == "a/b"
    assert Clip("a/b@3-9", Path("b@3-9.mp4")).name == "a/b@3-9"


# -- the page ------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


BLOCKS = dict(re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M))
"""The fenced blocks by language; one of each."""


def test_the_page_s_manifests_are_read(tmp_path: Path) -> None:
    (tmp_path / "walks").mkdir()
    for name in ("walks/dog", "walks/long", "dog-Scene-0001"):
        (tmp_path / f"{name}.mp4").touch()
    found = {}
    for language, name in (("csv", "a.csv"), ("jsonl", "a.jsonl"), ("opensora", "a.json"), ("vidgen", "b.json")):
        (tmp_path / name).write_text(BLOCKS[language], encoding="utf-8")
        found[language] = list_clips(tmp_path / name)
    assert [c.id for c in found["csv"]] == ["walks/dog", "walks/long@120-360"]
    assert found["csv"][1].extra == {"camera": "pan"}
    assert [c.caption for c in found["jsonl"]] == ["a dog runs, then stops"]
    assert (found["opensora"][0].id, found["opensora"][0].crop) == ("walks/dog@0-80", (0, 1280, 60, 660))
    assert [c.id for c in found["vidgen"]] == ["dog-Scene-0001"]


def test_the_page_s_config_and_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[[str], Path]
) -> None:
    options = yaml.safe_load(BLOCKS["yaml"])["data"]["init_args"]
    data = VideoData(**{**options, "buckets": [Bucket(**b) for b in options["buckets"]]})
    assert data.clip_sizes[2] == (49, 480, 832)
    known = set(inspect.signature(VideoData).parameters)
    named = {n for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M) for n in re.findall(r"`(\w+)`", row)}
    assert named - set(get_args(Kind)) - {"source"} <= known
    monkeypatch.chdir(tmp_path)
    for line in BLOCKS[""].splitlines():
        program, *arguments = shlex.split(line)
        assert program == "muybridge"
        if arguments[0] == "fit":
            arguments += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--data.num_workers=0"]
            arguments += ["--trainer.enable_progress_bar=false", "--trainer.callbacks=[]"]
        assert main(arguments) == 0, line
