"""The import-free registry says what there really is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import lightning.pytorch as pl
import pytest

from muybridge import registry, tiny
from muybridge.backbones import Backbone, Pretrained
from muybridge.cli.jobs import Trainer
from muybridge.cli.tools import verb_function
from muybridge.cli.verbs import list as listing
from muybridge.losses import Loss

PACKAGES = ("muybridge", "lightning_modules", "datamodules", "callbacks")
TABLES = {
    "BACKBONES": (registry.BACKBONES, Backbone),
    "LOSSES": (registry.LOSSES, Loss),
    "MODULES": (registry.MODULES, pl.LightningModule),
    "DATAMODULES": (registry.DATAMODULES, pl.LightningDataModule),
    "CALLBACKS": (registry.CALLBACKS, pl.Callback),
}
# Picks a family and is never an instance itself; writes config.yaml for the command and is nothing to configure.
NOT_LISTED = {Pretrained.__name__, "SaveConfig"}


def everything() -> None:
    """Import every module of every package."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)


def shipped(base: type) -> dict[str, str]:
    """Every concrete subclass that our packages define, and its module."""
    found, waiting = {}, [base]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        ours = cls.__module__.split(".")[0] in PACKAGES
        # Lightning's classes have no ABCMeta, so a method that is left open must be looked for.
        left_open = any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))
        if ours and not left_open and not cls.__name__.startswith("_") and cls.__name__ not in NOT_LISTED:
            found[cls.__name__] = cls.__module__
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_lists_exactly_what_ships(name: str):
    everything()
    table, base = TABLES[name]
    assert table == shipped(base)


def test_all_tables_are_among_the_short_names():
    assert [id(t) for t in registry.CLASSES] == [id(t) for t, _ in TABLES.values()]


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
