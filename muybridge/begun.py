"""Folders of work that are gone on with only as they were begun: a note in each says with what settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muybridge.errors import UsageError
from muybridge.whole import write_text


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file, so that tuples equal lists."""
    return json.loads(json.dumps(dict(settings)))


def check_same(what: str, made: Mapping[str, Any], wanted: Mapping[str, Any], todo: str) -> None:
    """Refuse to go on under other settings than something was made with, naming each that differs and both its values.

    Args:
        what: With its verb, such as ``the store X was``.
        made: The settings of then.
        wanted: The settings of now.
        todo: What else there is to do than to set them back.
    """
    made, wanted = plain(made), plain(wanted)
    fields = [name for name in dict.fromkeys([*made, *wanted]) if made.get(name) != wanted.get(name)]
    if fields:
        said = "; ".join(f"{name} is {made.get(name)!r} there and {wanted.get(name)!r} here" for name in fields)
        raise UsageError(f"{what} made under other settings: {said}", "the same settings", f"set them back, or {todo}")


def refuse_others(folder: Path, kind: str, todo: str = "choose another --out") -> None:
    """Refuse a folder that holds anything; it has no note of what kind it is."""
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise UsageError(f"{folder} exists and holds no {kind}", f"a new or empty folder, or one with {kind}", todo)


def begun(note: Path, kind: str, todo: str = "choose another --out") -> bool:
    """Whether a folder has its note; one that holds anything else is refused.

    Several processes may begin a folder at once. The note is the first that each of them puts there, so where there is
    something and was no note before, there is one now.
    """
    if note.is_file():
        return True
    try:
        refuse_others(note.parent, kind, todo)
    except UsageError:
        if note.is_file():
            return True
        raise
    return False


def begin(
    note: Path,
    settings: Mapping[str, Any],
    kind: str,
    usual: Mapping[str, Any] | None = None,
    alone: bool = True,
    todo: str = "choose another --out, or remove the folder",
) -> None:
    """Note a folder's settings in it; of one that was begun before they must be the same.

    Args:
        note: The file with them, in the folder.
        settings: Plain values.
        kind: What the folder holds, in the plural.
        usual: What was the only way when older folders were begun, which therefore don't say so.
        alone: Whether nothing else may be in the folder.
        todo: What to do where they are not the same.
    """
    if begun(note, kind, todo) if alone else note.is_file():
        made = json.loads(note.read_text(encoding="utf-8"))
        check_same(f"the {kind} in {note.parent} were", {**plain(usual or {}), **made}, settings, todo)
        return
    write_text(note, json.dumps(plain(settings), indent=2) + "\n")
