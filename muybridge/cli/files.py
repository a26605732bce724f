"""The user's YAML files, read before the parser reads them: syntax errors, doubled keys, and where a word stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from muybridge.errors import UsageError

_TRANSPARENT = ("init_args", "dict_kwargs")
"""Keys that configs have and error texts leave out."""


class Config:
    """One config file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
            self.root = yaml.compose(text)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "a UTF-8 text file"
            ) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 0
            quoted = text.splitlines()[line - 1].rstrip() if mark and line <= len(text.splitlines()) else ""
            hint = (
                "YAML indents with spaces, never tabs" if "\t" in quoted else "look at this line and the one above it"
            )
            raise UsageError(
                f"{path}, line {line}: {error.problem}" + (f"\n  here:     {quoted.strip()}" if quoted else ""),
                "valid YAML",
                hint,
            ) from error
        except yaml.YAMLError as error:
            raise UsageError(f"{path}: {error}".splitlines()[0], "valid YAML") from error
        if not isinstance(self.root, yaml.MappingNode):
            what = "is empty" if self.root is None else "holds no mapping at its top"
            raise UsageError(
                f"{path} {what}", "keys such as model:, data: and trainer:", "muybridge list configs shows examples"
            )
        self._refuse_doubles(self.root)

    def _refuse_doubles(self, node: Any) -> None:
        """YAML lets the last of two equal keys win in silence."""
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines and key.value != "<<":
                    raise UsageError(
                        f"{self.path}: the key {key.value} stands twice, in lines {lines[key.value]} and {line}",
                        "every key once",
                        "remove one of them",
                    )
                lines[str(key.value)] = line
                self._refuse_doubles(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._refuse_doubles(item)

    def find(self, keys: Sequence[str], word: str) -> str:
        """``file, line n`` of a key or a value called ``word`` under ``keys``; empty where there is none."""
        for node in _descend(self.root, list(keys)):
            for found in _words(node):
                if found.value == word:
                    return f"{self.path}, line {found.start_mark.line + 1}"
        return ""

    def words(self) -> set[str]:
        """All plain values: a class may stand in a list without the word ``class_path``."""
        return set(_scalars(self.root))

    def class_names(self) -> set[str]:
        """All ``class_path`` values without a dot."""
        return {
            v.value
            for k, v in _pairs(self.root)
            if k.value == "class_path" and re.fullmatch(r"[A-Za-z_]\w*", str(v.value))
        }


def _descend(node: Any, keys: list[str]) -> Iterator[Any]:
    if not keys:
        yield node
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _descend(item, keys)
    elif isinstance(node, yaml.MappingNode) and keys:
        for key, value in node.value:
            if key.value in _TRANSPARENT:
                yield from _descend(value, keys)
            elif key.value.rstrip("+") == keys[0]:
                yield from _descend(value, keys[1:])


def _words(node: Any) -> Iterator[Any]:
    """The value itself, or the keys and plain values right inside it."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _words(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            if key.value in _TRANSPARENT:
                yield from _words(value)
            elif isinstance(value, yaml.ScalarNode):
                yield value


def _scalars(node: Any) -> Iterator[str]:
    if isinstance(node, yaml.ScalarNode):
        yield str(node.value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)


def _pairs(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value
            yield from _pairs(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _pairs(item)


def refuse_unreadable(paths: Iterable[Path], words: Iterable[str]) -> None:
    """Stop at a Python file next to some files, or in the current directory, that is named and can't be parsed.

    Args:
        paths: The files.
        words: What may name it: ``module.Class``, or a class that it defines.
    """
    wanted = set(words)
    named = {word.split(".")[0] for word in wanted if "." in word}
    for folder in dict.fromkeys([*(path.parent.resolve() for path in paths), Path.cwd()]):
        for file in sorted(folder.glob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            try:
                ast.parse(text)
            except SyntaxError as error:
                if file.stem in named or wanted.intersection(re.findall(r"^class\s+(\w+)", text, re.MULTILINE)):
                    raise syntax_error(error, str(file)) from error


def syntax_error(error: SyntaxError, file: str) -> UsageError:
    """Where a Python file can't be parsed, and why."""
    here = f"\n  here:     {error.text.strip()}" if error.text and error.text.strip() else ""
    return UsageError(f"{file}, line {error.lineno}: {error.msg}{here}", "valid Python", "python FILE shows the same")


def classes_beside(paths: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Python files next to some files and in the current directory, each with the classes it defines; nothing is run."""
    for folder in dict.fromkeys([*(path.parent.resolve() for path in paths), Path.cwd()]):
        for file in sorted(folder.glob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # not ours to judge unless it is named
                continue
            yield file, [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
