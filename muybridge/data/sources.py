"""From a path to a list of clips: folders, tables, the manifests of well-known data sets, a single reference clip.

Every source gives a clip its id, the video's path relative to the source's root without suffix, so that it is the same on
every machine that holds the same files.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Optional

from muybridge.data.clips import Clip, part
from muybridge.errors import UsageError

Kind = Literal["auto", "folder", "table", "opensora", "vidgen", "clip"]
Captions = Literal["required", "optional"]

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")
"""What a folder is searched for; a manifest may name anything that a decoder reads."""
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
LOOKED_AT = 32
"""How many of a manifest's files are looked for at once; if none is there, the root is wrong."""

KINDS = (
    "a folder of videos with captions in .txt files beside them; a .csv, .tsv, .jsonl or .parquet table with columns video and "
    "caption; an Open-Sora-Plan .json (path, cap); a VIDGEN .json (vid, caption); or one video file"
)
BAD_CAPTION = "caption: not UTF-8"


def list_clips(
    path: str | Path,
    kind: Kind = "auto",
    root: Optional[str | Path] = None,
    captions: Captions = "required",
    caption: Optional[str] = None,
) -> list[Clip]:
    """The clips of a source, in its own order.

    Args:
        path: A folder, a manifest, or a video file.
        kind: What it is; ``auto`` tells by its suffix and content.
        root: Folder that a manifest's paths are relative to; the manifest's own where not given.
        captions: Whether a clip without a caption is an error, or gets the empty one.
        caption: The caption of a single clip.

    Raises:
        UsageError: Where it is none of these, holds nothing, or names a clip twice.
    """
    source = Path(path)
    if not source.exists():
        raise UsageError(f"{path} does not exist", KINDS, f"relative paths are looked up from {Path.cwd()}")
    found = recognise(source) if kind == "auto" else kind
    if caption is not None and found != "clip":
        raise UsageError(f"caption is given and {path} is a {found}", "caption goes with a single video file")
    if root is not None and found in ("folder", "clip"):
        raise UsageError(f"root is given and {path} is a {found}", "root goes with a manifest, for its relative paths")
    base = Path(root) if root is not None else source.parent
    readers: dict[str, Callable[[], list[Clip]]] = {
        "folder": lambda: from_folder(source),
        "table": lambda: from_table(source, base),
        "opensora": lambda: from_opensora(source, base, joined=root is not None),
        "vidgen": lambda: from_vidgen(source, base),
        "clip": lambda: from_file(source, caption),
    }
    clips = readers[found]()
    _refuse_twice(source, clips)
    if found not in ("folder", "clip"):
        _refuse_absent(source, clips, base)
    if captions == "required":
        _refuse_uncaptioned(source, clips, found)
    return clips


def recognise(source: Path) -> Kind:
    """What kind of source a path is."""
    suffix = source.suffix.lower()
    if source.is_dir():
        return "folder"
    if suffix in SUFFIXES:
        return "clip"
    if suffix in TABLES:
        return "table"
    if suffix == ".json":
        keys = set(_entries(source)[0])
        if {"path", "cap"} <= keys:
            return "opensora"
        if {"vid", "caption"} <= keys:
            return "vidgen"
        if "video" in keys:
            return "table"
        raise UsageError(f"the entries of {source} have the keys {', '.join(sorted(keys))}", KINDS)
    raise UsageError(f"{source} is no source that can be told by its name", KINDS, "say which by source")


# -- the kinds -----------------------------------------------------------------------------------------------------


def from_folder(folder: Path) -> list[Clip]:
    """All videos under a folder in the order of their paths, each with the caption in the .txt file beside it."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", "a folder of videos")
    # Names with a dot are temporary files, and the resource forks that other systems leave beside a video.
    found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and not any(name.startswith(".") for name in p.relative_to(folder).parts)
    )
    if not found:
        raise UsageError(
            f"{folder} holds no video",
            f"files ending in {', '.join(SUFFIXES)}, at any depth",
            "check the folder, or convert the files",
        )
    return [_clip(p.relative_to(folder).as_posix(), p, *_sidecar(p)) for p in found]


def from_file(video: Path, caption: Optional[str] = None) -> list[Clip]:
    """One video, with the caption given or that of the .txt file beside it."""
    text, problem = (caption, None) if caption is not None else _sidecar(video)
    return [_clip(video.name, video, text, problem)]


def from_table(table: Path, root: Path) -> list[Clip]:
    """Rows with ``video`` and ``caption``; ``start_frame`` and ``stop_frame`` name a part of a video, others are kept."""
    rows = _rows(table)
    if not rows:
        raise UsageError(f"{table} holds no rows", "one row a clip")
    lacking = next((n for n, row in enumerate(rows, 1) if not row.get("video")), None)
    if lacking is not None:
        raise UsageError(
            f"{table}, row {lacking}: no video (its columns: {', '.join(rows[lacking - 1])})",
            "a column video with a path in every row",
        )
    clips = []
    for number, row in enumerate(rows, 1):
        extra = {k: v for k, v in row.items() if k not in ("video", "caption", "start_frame", "stop_frame")}
        ends = [row.get(k) for k in ("start_frame", "stop_frame")]
        span = _span(ends, f"{table}, row {number}") if any(e not in (None, "") for e in ends) else None
        name, path = _locate(str(row["video"]), root, table)
        text, problem = _caption(row.get("caption"))
        clips.append(_clip(name, path, text, problem, span=span, extra={k: _text(v) for k, v in extra.items()}))
    return clips


def from_opensora(manifest: Path, root: Path, joined: bool = False) -> list[Clip]:
    """Open-Sora-Plan and MixKit: ``path``, ``cap`` (a text, or a list whose first is taken), and optionally ``cut`` and ``crop``.

    Args:
        manifest: The file.
        root: What ``path`` is relative to.
        joined: Also where it begins with a slash, as these manifests are used with a root.
    """
    clips = []
    for number, entry in enumerate(_entries(manifest), 1):
        where = f"{manifest}, entry {number}"
        _need(entry, ("path", "cap"), where)
        cap = entry["cap"]
        text, problem = _caption(cap[0] if isinstance(cap, list) and cap else None if isinstance(cap, list) else cap)
        given = str(entry["path"])
        name, path = _locate(given.lstrip("/") if joined else given, root, manifest)
        extra = {k: _text(v) for k, v in entry.items() if k not in ("path", "cap", "cut", "crop")}
        if isinstance(cap, list) and len(cap) > 1:
            extra["cap"] = _text(cap)
        span = _span(entry["cut"], f"{where}, cut") if entry.get("cut") else None
        crop = _numbers(entry["crop"], 4, f"{where}, crop") if entry.get("crop") else None
        clips.append(_clip(name, path, text, problem, span=span, crop=crop, extra=extra))
    return clips


def from_vidgen(manifest: Path, root: Path) -> list[Clip]:
    """VIDGEN: ``vid``, the name of an .mp4 file in the root, and ``caption``."""
    clips = []
    for number, entry in enumerate(_entries(manifest), 1):
        _need(entry, ("vid", "caption"), f"{manifest}, entry {number}")
        given = str(entry["vid"])
        file = given if given.lower().endswith(SUFFIXES) else f"{given}.mp4"
        name, path = _locate(file, root, manifest)
        text, problem = _caption(entry["caption"])
        extra = {k: _text(v) for k, v in entry.items() if k not in ("vid", "caption")}
        clips.append(_clip(name, path, text, problem, extra=extra))
    return clips


# -- one entry -----------------------------------------------------------------------------------------------------


def _clip(name: str, path: Path, caption: Optional[str], problem: Optional[str] = None, **rest: Any) -> Clip:
    """A clip, its id made from the path it is known by."""
    stem = str(PurePosixPath(name).with_suffix(""))
    # A file name need not be UTF-8; an id, which goes into files and hashes, must be.
    stem = stem.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    span = rest.get("span")
    return Clip(part(stem, *span) if span is not None else stem, path, caption, problem=problem, **rest)


def _locate(given: str, root: Path, manifest: Path) -> tuple[str, Path]:
    """Name and file of a path in a manifest."""
    given = given.replace("\\", "/") if os.sep == "\\" else given
    if not posixpath.isabs(given) and not os.path.isabs(given):
        return posixpath.normpath(given), root / given
    path, base = Path(given), Path(os.path.abspath(root))
    if not path.is_relative_to(base):
        raise UsageError(
            f"{manifest} names {given}, which is not under {base}",
            "paths under the root: a clip's id is its path from there, and must not name a folder of this machine",
            "set root to a folder that holds all the videos",
        )
    return path.relative_to(base).as_posix(), path


def _sidecar(video: Path) -> tuple[Optional[str], Optional[str]]:
    """Caption and problem of the .txt file beside a video."""
    file = video.with_suffix(".txt")
    if not file.is_file():
        return None, None
    return _caption(file.read_bytes().decode("utf-8-sig", "surrogateescape"))


def _caption(value: Any) -> tuple[Optional[str], Optional[str]]:
    """A caption, or the problem with it."""
    if value is None:
        return None, None
    text = str(value).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Bytes that are not UTF-8 were let through as lone surrogates: one bad caption must not hide all the others.
        return None, BAD_CAPTION
    return text or None, None


def _text(value: Any) -> str:
    """A further column as text."""
    return (
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    )


def _numbers(value: Any, count: int, where: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(v) for v in value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {value!r}", f"{count} whole numbers") from error
    ordered = len(numbers) == count and all(0 <= a < b for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    if not ordered:
        raise UsageError(f"{where}: {value!r}", f"{count} whole numbers, each start below its end")
    return numbers


def _span(value: Any, where: str) -> tuple[int, int]:
    start, stop = _numbers(value, 2, where)
    return start, stop


def _need(entry: Any, keys: Sequence[str], where: str) -> None:
    absent = [k for k in keys if not isinstance(entry, dict) or k not in entry]
    if absent:
        raise UsageError(f"{where}: no {' and no '.join(absent)}", f"entries with {' and '.join(keys)}")


# -- files ---------------------------------------------------------------------------------------------------------


def _read_text(file: Path) -> str:
    return file.read_bytes().decode("utf-8-sig", "surrogateescape")


def _entries(file: Path) -> list[dict[str, Any]]:
    """The list in a JSON file."""
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is no JSON (line {error.lineno}: {error.msg})", "a list of entries") from error
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        held = "nothing" if content in ([], {}) else f"a {type(content).__name__}"
        raise UsageError(f"{file} holds {held}", "a list of entries, at least one")
    return content


def _rows(table: Path) -> Sequence[Mapping[str, Any]]:
    suffix = table.suffix.lower()
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**27)
        # A quoted caption may hold line ends, so it is the csv module that finds them.
        reader = csv.DictReader(io.StringIO(_read_text(table), newline=""), delimiter="\t" if suffix == ".tsv" else ",")
        rows = list(reader)
        number = next((n for n, row in enumerate(rows, 1) if None in row), 0)
        if number:
            raise UsageError(
                f"{table}, row {number}: more fields than columns ({', '.join(reader.fieldnames or [])})",
                "as many fields as columns",
                "quote captions that hold commas",
            )
        return rows
    if suffix == ".jsonl":
        rows = []
        for number, line in enumerate(_read_text(table).split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UsageError(f"{table}, line {number}: no JSON ({error.msg})", "one JSON object a line") from error
            if not isinstance(rows[-1], dict):
                raise UsageError(f"{table}, line {number}: a {type(rows[-1]).__name__}", "one JSON object a line")
        return rows
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = pq.read_table(table)
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"{table} can't be read as Parquet ({error})", "a complete Parquet file") from error
        return _parquet_rows(columns)
    if suffix == ".json":
        return _entries(table)
    raise UsageError(f"{table} is no table", f"a file ending in {', '.join(TABLES)} or .json")


def _parquet_rows(columns: Any) -> list[Mapping[str, Any]]:
    """Rows of a Parquet table; its text columns may hold bytes that are not UTF-8, which Arrow does not check."""
    import pyarrow as pa

    values = {}
    for name in columns.column_names:
        column = columns[name]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            raw = column.combine_chunks().cast(pa.large_binary()).to_pylist()
            values[name] = [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw]
        else:
            values[name] = column.to_pylist()
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


# -- refusals ------------------------------------------------------------------------------------------------------


def _refuse_twice(source: Path, clips: Iterable[Clip]) -> None:
    seen: dict[str, Path] = {}
    twice: dict[str, tuple[Path, Path]] = {}
    for clip in clips:
        if clip.id in seen:
            twice.setdefault(clip.id, (seen[clip.id], clip.path))
        seen.setdefault(clip.id, clip.path)
    if twice:
        examples = "; ".join(f"{i} ({a.name}, {b.name})" for i, (a, b) in list(twice.items())[:3])
        raise UsageError(
            f"{source} names {len(twice)} ids more than once, such as {examples}",
            "every clip once: influence scores, selections and caches tell clips by their ids",
            "rename or remove one of each; to see clips more often, set repeats",
        )


def _refuse_absent(source: Path, clips: Sequence[Clip], root: Path) -> None:
    step = max(len(clips) // LOOKED_AT, 1)
    looked = clips[::step][:LOOKED_AT]
    # lexists, not exists: a broken link is one bad file, not a wrong root.
    if not any(os.path.lexists(clip.path) for clip in looked):
        raise UsageError(
            f"none of {len(looked)} videos of {source} is there, first {looked[0].path}",
            f"files under {root}",
            "set root to the folder that the paths are relative to",
        )


def _refuse_uncaptioned(source: Path, clips: Sequence[Clip], found: str) -> None:
    bare = [clip for clip in clips if clip.caption is None and clip.problem is None]
    if not bare:
        return
    first = bare[0]
    wanted = {
        "folder": f"a text file beside each video, such as {first.path.with_suffix('.txt').name}",
        "clip": f"caption, or a text file {first.path.with_suffix('.txt').name} beside the video",
    }.get(found, "a caption for each clip")
    raise UsageError(
        f"{len(bare)} of {len(clips)} clips of {source} have no caption, first {first.id}",
        wanted,
        "write the captions, leave those clips out, or set captions to optional",
    )
