"""What ships, read from the registry and the source files; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from itertools import takewhile
from typing import Optional

from muybridge import registry
from muybridge.cli.places import configs_dir, home, shipped_configs
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError

Row = tuple[str, ...]


@lru_cache
def _source(module: str) -> ast.Module:
    return ast.parse((home() / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def _first_line(node: ast.Module | ast.ClassDef | None) -> str:
    text = ast.get_docstring(node) if node is not None else None
    return text.splitlines()[0] if text else ""


def _class(module: str, name: str) -> Optional[ast.ClassDef]:
    return next((n for n in _source(module).body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _constant(node: ast.ClassDef, name: str) -> Row:
    """A tuple of strings that a class body assigns."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and statement.value is not None:  # type: ignore[attr-defined]
            return tuple(ast.literal_eval(statement.value))  # type: ignore[attr-defined]
    return ()


def classes(table: dict[str, str]) -> list[Row]:
    """Name, module and first line of the docstring of each class."""
    return [(name, f"{module}.{name}", _first_line(_class(module, name))) for name, module in table.items()]


def backbones() -> list[Row]:
    """Name of each family, the pipelines it takes, and what its page says."""
    rows: list[Row] = []
    for name, module in registry.BACKBONES.items():
        found = _class(module, name)
        pipelines = _constant(found, "pipelines") if found else ()
        rows.append((name, ", ".join(pipelines), _first_line(_source(module))))
    return rows


def tiny() -> list[Row]:
    """Names of the tiny checkpoints: the keys of ``muybridge.tiny.MAKERS``."""
    made = next(
        n
        for n in _source("muybridge.tiny.pipelines").body
        if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "MAKERS"
    )
    assert isinstance(made.value, ast.Dict)
    return [(str(ast.literal_eval(key)),) for key in made.value.keys if key is not None]


def models() -> list[Row]:
    """Name of each model that ships, what it is, and whether this build has it."""
    found: list[Row] = []
    for name, model in registry.MODELS.items():
        folder = home() / "muybridge" / model.folder
        here = (folder / "model_index.json").is_file()
        found.append((name, model.help, str(folder) if here else "not in this build"))
    return found


def configs() -> list[Row]:
    """Name of each shipped config and the first sentence of its opening comment."""
    rows: list[Row] = []
    for name in shipped_configs():
        lines = (configs_dir() / name).read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        rows.append((name, comment.split(". ")[0].rstrip(".") + "."))
    return rows


KINDS: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "verbs": ("muybridge VERB --help", lambda: [(n, v.help) for n, v in registry.VERBS.items()]),
    "backbones": ("class_path: Pretrained picks the family from a checkpoint's pipeline class", backbones),
    "losses": (
        "losses: [{class_path: NAME}] of a model; options: muybridge fit --model Finetuning --model.losses.help NAME",
        lambda: classes(registry.LOSSES),
    ),
    "modules": (
        "model: {class_path: NAME}; options: muybridge fit --model.help NAME",
        lambda: classes(registry.MODULES),
    ),
    "datamodules": (
        "data: {class_path: NAME}; options: muybridge fit --data.help NAME",
        lambda: classes(registry.DATAMODULES),
    ),
    "estimators": ("muybridge cache --motion NAME", lambda: classes(registry.ESTIMATORS)),
    "projections": (
        "projection: {class_path: NAME} of callbacks.GradientCapture",
        lambda: classes(registry.PROJECTIONS),
    ),
    "callbacks": ("trainer.callbacks: [{class_path: NAME}]", lambda: classes(registry.CALLBACKS)),
    "models": ("path: NAME of a backbone; --model NAME of a verb", models),
    "tiny": ("muybridge tiny --family NAME --out DIR", tiny),
    "configs": ("muybridge fit -c NAME", configs),
}
"""What can be listed: how to use it, and its rows."""


def table(kind: str) -> str:
    """One kind as aligned columns under a headline."""
    use, rows_of = KINDS[kind]
    rows = rows_of()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    ]
    return "\n".join([f"{kind}  ({use})", *(f"  {line}" for line in lines)])


def run(arguments: list[str]) -> int:
    """``muybridge list [KIND ...]``; all kinds where none is named."""
    if any(a in ("-h", "--help") for a in arguments):
        print(f"usage: muybridge list [{'|'.join(KINDS)}]\n\nWhat ships; all of it where nothing is named.")
        return 0
    for kind in arguments:
        if kind not in KINDS:
            raise UsageError(f"can't list {kind!r}", f"one of {', '.join(KINDS)}", did_you_mean(near(kind, KINDS)))
    print("\n\n".join(table(kind) for kind in arguments or KINDS))
    return 0
