"""Parsers whose errors are short."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Optional

import jsonargparse

from muybridge import registry
from muybridge.cli.files import Config, classes_beside, syntax_error
from muybridge.cli.messages import explain
from muybridge.cli.places import ROOMS
from muybridge.errors import UsageError
from muybridge.registry import CLASSES


class ShortErrors(jsonargparse.ArgumentParser):
    """Raises :class:`~muybridge.errors.UsageError` with a few lines instead of printing a usage text and leaving.

    Parsers that jsonargparse makes for its own use, inside a value, keep raising ``ArgumentError`` as it expects.
    """

    configs: Sequence[Config] = ()
    """The user's files, to say where in them a word stands."""

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        said = usage_error(ex)
        if said is not None:
            raise said from ex
        broken = next((e for e in causes(ex) if isinstance(e, SyntaxError)), None)
        if broken is not None:
            # Of a user's file, or of one that it imports.
            raise syntax_error(broken, str(broken.filename)) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        raise explain(str(message), Program(parser, self.configs)) from ex


def causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An exception and what led to it, the origin last."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def usage_error(error: Optional[BaseException]) -> Optional[UsageError]:
    """The error of a constructor or a check that jsonargparse wrapped into its own."""
    return next((e for e in causes(error) if isinstance(e, UsageError)), None)


class Program:
    """What the texts of errors may ask: options, classes, places in files.

    Args:
        parser: The verb's parser.
        configs: The user's config files.
    """

    def __init__(self, parser: jsonargparse.ArgumentParser, configs: Sequence[Config]) -> None:
        self.parser, self.configs = parser, configs

    def options(self, classes: Sequence[str]) -> list[str]:
        """Full names of the verb's options, or of the last class's."""
        parser = self.parser
        if classes:
            cls = _load(classes[-1])
            if not inspect.isclass(cls):
                return []
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(cls, fail_untyped=False)
        found = {a.dest for a in parser._actions} | {o.lstrip("-") for a in parser._actions for o in a.option_strings}
        return sorted(o for o in found if "help" not in o)

    def classes_for(self, keys: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
        """Short name and import path of the classes that a key takes."""
        bases = [b for b in self._bases(keys, classes) if b.__module__ not in ("builtins", "typing")]
        found = {c.__name__: f"{c.__module__}.{c.__name__}" for base in bases for c in _concrete(base)}
        if found:
            return found
        return {name: f"{module}.{name}" for table in registry.CLASSES for name, module in table.items()}

    def _bases(self, keys: Sequence[str], classes: Sequence[str]) -> list[type]:
        if not keys:
            return []
        if not classes:
            dest = ".".join(keys)
            kinds = [getattr(a, "_typehint", None) for a in self.parser._actions if a.dest == dest]
            return [c for kind in kinds for c in _classes_in(kind)]
        owner = _load(classes[-1])
        if owner is None:
            return []
        try:
            hints = typing.get_type_hints(owner.__init__)
        except (NameError, AttributeError):  # names that only type checkers import
            return []
        return list(_classes_in(hints.get(keys[-1])))

    def modules(self) -> dict[str, list[str]]:
        """Modules in the folders of the config files and in the current one, and the classes each defines."""
        return {file.stem: names for file, names in classes_beside(c.path for c in self.configs)}

    def public(self, module: str) -> list[str]:
        """Classes that a module holds."""
        loaded = sys.modules.get(module)
        names = set(vars(loaded)) | set(getattr(loaded, "__all__", ())) if loaded else set()
        found = {n: getattr(loaded, n, None) for n in names if not n.startswith("_")}
        return sorted(n for n, c in found.items() if inspect.isclass(c) and not inspect.isabstract(c))

    def where(self, keys: Sequence[str], word: str) -> str:
        """File and line of a word under some keys; the last file that has it."""
        return next((place for c in reversed(self.configs) if (place := c.find(keys, word))), "")


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _classes_in(kind: Any) -> Iterator[type]:
    """The classes in a type such as ``Optional[list[Loss]]``."""
    if inspect.isclass(kind) and not typing.get_args(kind):
        yield kind
    for part in typing.get_args(kind):
        yield from _classes_in(part)


def _concrete(base: type) -> Iterator[type]:
    """The class and its subclasses that can be made and have a public name."""
    if base is type(None) or base is object:
        return
    children: list[type] = type.__subclasses__(base)
    # What its own package extends is a base, and seldom of use by itself.
    package = base.__module__.split(".")[0]
    idle = any(child.__module__.split(".")[0] in (package, *ROOMS) for child in children)
    listed = any(base.__name__ in table for table in CLASSES)
    if listed or not (idle or inspect.isabstract(base) or base.__name__.startswith("_")):
        yield base
    for child in children:
        yield from _concrete(child)
