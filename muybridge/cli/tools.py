"""Verbs that need no model: a typed function is all there is to them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from muybridge.cli.parser import ShortErrors


def verb_function(verb: str) -> Callable[..., Any]:
    """The function of a verb: the one in ``muybridge/cli/verbs/<verb>.py`` with the verb's name."""
    name = verb.replace("-", "_")
    return getattr(importlib.import_module(f"muybridge.cli.verbs.{name}"), name)


def tool_parser(verb: str) -> ShortErrors:
    """A parser with the function's parameters: those without a default by position, keyword-only ones always as options."""
    function = verb_function(verb)
    parser = ShortErrors(
        prog=f"muybridge {verb}",
        description=(inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
        allow_abbrev=False,
    )
    keywords = {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    others = set(inspect.signature(function).parameters) - keywords
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(keywords))
    parser.add_function_arguments(function, as_group=False, skip=set(others))
    return parser


def run_tool(verb: str, arguments: list[str]) -> int:
    """Parse and call."""
    parser = tool_parser(verb)
    parsed = parser.instantiate(parser.parse_args(arguments))
    verb_function(verb)(**parsed.as_dict())
    return 0
