"""The import-free registry says what there really is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import lightning.pytorch as pl
import pytest

from muybridge import registry, tiny
from muybridge.attribution.projection import Projection
from muybridge.backbones import Backbone, Pretrained
from muybridge.cli.jobs import Trainer
from muybridge.cli.tools import verb_function
from muybridge.cli.verbs import list as listing
from muybridge.losses import Loss
from muybridge.motion import MotionEstimator

PACKAGES = ("muybridge", "lightning_modules", "datamodules", "callbacks")
# Each table, the base of its classes, and the room they live in.
TABLES = {
    "BACKBONES": (registry.BACKBONES, Backbone, "muybridge"),
    "LOSSES": (registry.LOSSES, Loss, "muybridge"),
    "MODULES": (registry.MODULES, pl.LightningModule, "lightning_modules"),
    "DATAMODULES": (registry.DATAMODULES, pl.LightningDataModule, "datamodules"),
    "CALLBACKS": (registry.CALLBACKS, pl.Callback, "callbacks"),
    "ESTIMATORS": (registry.ESTIMATORS, MotionEstimator, "muybridge"),
    "PROJECTIONS": (registry.PROJECTIONS, Projection, "muybridge"),
}


def everything() -> None:
    """Import every module of every package."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def shipped(base: type, room: str) -> dict[str, str]:
    """Every public class of a room that nothing of ours extends, and its module."""
    found, waiting = {}, [base]
    while waiting:
        cls = waiting.pop()
        children = [c for c in cls.__subclasses__() if c.__module__.split(".")[0] in PACKAGES]
        waiting.extend(cls.__subclasses__())
        if cls.__module__.split(".")[0] == room and not children and not cls.__name__.startswith("_"):
            found[cls.__name__] = cls.__module__
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_lists_what_ships_and_nothing_else(name: str):
    everything()
    table, base, room = TABLES[name]
    found = shipped(base, room)
    found.pop(Pretrained.__name__, None)  # picks a family, and is none
    assert found.items() <= table.items(), "what ships and is not listed"
    for listed, module in table.items():
        cls = getattr(importlib.import_module(module), listed)
        assert issubclass(cls, base)
        assert cls.__module__ == module
        assert not inspect.isabstract(cls)


def test_all_tables_are_among_the_short_names():
    assert [id(t) for t in registry.CLASSES] == [id(table) for table, _, _ in TABLES.values()]


@pytest.mark.parametrize("verb", registry.VERBS)
def test_every_verb_can_be_called_and_explains_itself(verb: str):
    kind = registry.VERBS[verb].kind
    if kind == "loop":
        assert callable(getattr(pl.Trainer, verb))
        return
    if verb == "list":
        assert callable(listing.run)
        return
    function = verb_function(verb)
    text = inspect.getdoc(function) or ""
    parameters = list(inspect.signature(function).parameters)
    assert all(f"    {p}: " in text for p in parameters), "every parameter is described, since this is its help"
    assert (parameters[:2] == ["trainer", "model"]) is (kind == "job")
    assert not hasattr(pl.Trainer, verb), "Lightning's own Trainer is left as it is"


def test_every_file_of_the_verbs_is_registered():
    path = importlib.import_module("muybridge.cli.verbs").__path__
    files = {module.name for module in pkgutil.iter_modules(path)}
    assert files == {n.replace("-", "_") for n, verb in registry.VERBS.items() if verb.kind != "loop"}


def test_the_list_of_backbones_says_what_the_classes_say():
    rows = {row[0]: row for row in listing.backbones()}
    for name, module in registry.BACKBONES.items():
        cls = getattr(importlib.import_module(module), name)
        assert rows[name][1] == ", ".join(cls.pipelines)


def test_the_list_of_tiny_checkpoints_is_what_can_be_written():
    assert [row[0] for row in listing.tiny()] == list(tiny.MAKERS)


@pytest.mark.parametrize("kind", listing.KINDS)
def test_every_row_of_a_list_is_filled(kind: str):
    rows = listing.KINDS[kind][1]()
    assert rows
    assert all(cell for row in rows for cell in row)


def test_jobs_are_methods_of_our_trainer_alone():
    assert issubclass(Trainer, pl.Trainer)
    assert "export" not in vars(pl.Trainer)
