"""Where things lie: our own packages, the shipped configs, the user's config files and the code next to them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import muybridge
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError

ROOMS = ("lightning_modules", "datamodules", "callbacks")
"""Our packages with names that a user's project may have too."""


def home() -> Path:
    """The folder that holds the packages: the repository, or site-packages."""
    return Path(muybridge.__file__).resolve().parents[1]


def configs_dir() -> Path:
    """The shipped configs: ``muybridge/configs`` in a wheel, ``configs`` in a checkout or an editable install."""
    for folder in (home() / "muybridge" / "configs", home() / "configs"):
        if (folder / "tiny").is_dir():
            return folder
    raise RuntimeError(
        f"the shipped configs are neither in {home() / 'muybridge'} nor in {home()}: the install is broken"
    )


def shipped_configs() -> list[str]:
    """Names of the shipped configs, as ``-c`` takes them."""
    folder = configs_dir()
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml"))


def find_config(given: str) -> Path:
    """The file that ``-c given`` means: a file of the user's, else a shipped one of that name.

    ``configs/tiny/wan.yaml``, as it is written inside a checkout, also finds the shipped file from elsewhere.
    """
    local = Path(given).expanduser()
    if local.is_file():
        return local
    name = Path(given).as_posix()
    if not local.is_absolute() and not local.is_dir():
        shipped = configs_dir() / name.removeprefix("configs/")
        if shipped.is_file():
            return shipped
    beside = [str(p) for p in local.parent.glob("*.y*ml")] if local.parent.is_dir() else []
    hits = near(given, [*beside, *shipped_configs()])
    raise UsageError(
        f"config file {given} {'is a directory' if local.is_dir() else 'does not exist'}",
        f"a YAML file, looked up from {Path.cwd()} and then among the shipped ones",
        did_you_mean(hits) or "muybridge list configs",
    )


def append_to_path(folders: Iterable[Path]) -> None:
    """Let ``class_path`` name modules in these folders.

    They come last: a user's file called ``random.py`` must not replace a library's module.
    """
    for folder in folders:
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))


def refuse_shadows() -> None:
    """Stop if a user's package is found where one of ours should be.

    ``python -m`` and PYTHONPATH put the user's folders first, and ``callbacks`` is a name many projects use.
    """
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        found = Path(places[0]).resolve() if places and places[0] else None
        if found is not None and found.name == "__init__.py":
            found = found.parent
        ours = home() / room
        if found is None:
            raise UsageError(f"muybridge's package {room} is missing", f"it at {ours}", "install muybridge again")
        if found != ours:
            how = "run the command `muybridge`, which does not look here first, or " if _is_here(found) else ""
            raise UsageError(
                f"{found} hides muybridge's own package {room}",
                f"{room} to be found at {ours}",
                f"{how}rename yours",
            )


def _is_here(found: Path) -> bool:
    """Whether only ``python -m`` finds it, because of the current directory."""
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return found.parent == Path.cwd().resolve() and str(found.parent) not in {
        str(Path(p).resolve()) for p in listed if p
    }
