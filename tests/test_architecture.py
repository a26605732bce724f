"""The rules of docs/architecture.md about who may import whom, held by reading the source."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("lightning_modules", "datamodules", "callbacks")
PACKAGES = ("muybridge", *ROOMS)
HEAVY = ("diffusers", "transformers", "peft")

# Parts of the core by height. A part imports what is lower; parts of one height import one another only at 3, where
# attribution reads losses and export reads what is loaded.
HEIGHT = {
    "": 0,
    "errors": 0,
    "permissions": 0,
    "whole": 0,
    "begun": 0,
    "progress": 0,
    "registry": 0,
    "diffusion": 1,
    "batch": 2,
    "backbones": 2,
    "motion": 2,
    "customization": 3,
    "losses": 3,
    "attribution": 3,
    "metrics": 3,
    "averaging": 3,
    "data": 3,
    "export": 3,
    "toy_scores": 3,
    "few_step_scheduler": 3,
    "tiny": 3,
    "toy_clips": 3,
    "video": 3,
    "proving_ground": 3,
    "report": 3,
    "muon": 3,
    "cli": 5,
    "__main__": 6,
}


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Modules that a piece of source imports, at any depth, type-checking blocks included."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = path.relative_to(ROOT).parts[: -child.level]
                base = ".".join([*package, *([base] if base else [])])
            yield base
            # `from muybridge import video` imports a module too.
            yield from (f"{base}.{alias.name}" for alias in child.names)


def part(module: str) -> str:
    """The part of the core a module belongs to."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in HEIGHT else ""


def upward(path: Path, module: str, imported: str) -> bool:
    """Whether this import breaks the order of the rooms."""
    top, target = module.split(".")[0], imported.split(".")[0]
    if target not in PACKAGES:
        return top == "muybridge" and part(module) != "cli" and target in ("lightning", "pytorch_lightning")
    if top in ROOMS:
        return (target in ROOMS and target != top) or (target == "muybridge" and HEIGHT[part(imported)] > 3)
    if target in ROOMS:
        return part(module) != "cli"
    own, other = part(module), part(imported)
    return own != other and (HEIGHT[other] > HEIGHT[own] or (HEIGHT[other] == HEIGHT[own] and HEIGHT[own] == 2))


def test_every_part_of_the_core_has_its_height():
    parts = {p.relative_to(ROOT / "muybridge").parts[0].removesuffix(".py") for p in (ROOT / "muybridge").rglob("*.py")}
    assert parts - {"__init__"} <= set(HEIGHT), "say in this file how high the new part stands"


def test_nothing_imports_upwards():
    found = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in sources()
        for imported in imports(ast.parse(path.read_text(encoding="utf-8")), path)
        if upward(path, module_name(path), imported)
    ]
    assert not found, "\n".join(found)


def outside_functions(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting.extend(statement.orelse)
            continue
        yield statement
        for field in ("body", "orelse", "finalbody", "handlers"):
            for child in getattr(statement, field, []):
                waiting.extend(child.body if isinstance(child, ast.ExceptHandler) else [child])


def test_heavy_libraries_are_imported_inside_functions():
    found = [
        f"{path.relative_to(ROOT)}:{statement.lineno}"
        for path in sources()
        for statement in outside_functions(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(statement, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] in HEAVY for name in imports(statement, path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "line", "refused"),
    [
        ("muybridge/diffusion/x.py", "from muybridge.backbones import base", True),
        ("muybridge/backbones/x.py", "from muybridge.motion import flow", True),
        ("muybridge/backbones/x.py", "from ..diffusion import steps", False),
        ("muybridge/losses/x.py", "from muybridge import backbones", False),
        ("muybridge/losses/x.py", "def f():\n    import lightning.pytorch", True),
        ("muybridge/losses/x.py", "if TYPE_CHECKING:\n    from lightning_modules import base", True),
        ("muybridge/losses/x.py", "from muybridge.cli import main", True),
        ("muybridge/cli/x.py", "import lightning, lightning_modules", False),
        ("callbacks/x.py", "from datamodules import video", True),
        ("callbacks/x.py", "from callbacks import ema", False),
        ("callbacks/x.py", "from muybridge.cli.front import main", True),
        ("lightning_modules/x.py", "import lightning\nfrom muybridge.losses import Loss", False),
    ],
)
def test_the_rule_refuses_what_it_should(place: str, line: str, refused: bool):
    path = ROOT / place
    assert any(upward(path, module_name(path), i) for i in imports(ast.parse(line), path)) is refused


def test_every_package_ships_its_types():
    assert [p for p in PACKAGES if not (ROOT / p / "py.typed").is_file()] == []


def tree_in_the_page() -> list[str]:
    """The lines of the folder tree in docs/architecture.md, without their comments."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(muybridge/ .*?)```", page, re.DOTALL)
    assert block
    return block.group(1).splitlines()


def test_the_folders_are_those_of_the_page():
    listed = {m.group(1) for line in tree_in_the_page() if (m := re.match(r"[├└]── (\w+)/", line))}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert folders == listed


def test_every_file_the_page_names_is_there():
    room, missing = "", []
    for line in tree_in_the_page():
        if match := re.match(r"[├└]── (\w+)/", line):
            room = match.group(1)
        elif (match := re.match(r"│\s{5}(\w+(?:\.py|/))\s", line)) and not (ROOT / room / match.group(1)).exists():
            missing.append(f"{room}/{match.group(1)}")
    assert not missing
