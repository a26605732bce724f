"""Errors a user can act on: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user wrote cannot work.

    The command prints it without a traceback and exits with 2. Anything else that escapes is our bug and keeps its traceback.

    Args:
        given: What was given, quoted as the user wrote it.
        expected: What would have been accepted.
        todo: The next thing to try.
    """

    def __init__(self, given: str, expected: str = "", todo: str = "") -> None:
        self.given, self.expected, self.todo = given, expected, todo
        lines = [given]
        if expected:
            lines.append(f"  expected: {expected}")
        if todo:
            lines.append(f"  to do:    {todo}")
        super().__init__("\n".join(lines))


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options whose spelling is nearest to ``name``, best first; empty if none is near."""
    by_lower = {option.lower(): option for option in options}
    return [by_lower[hit] for hit in difflib.get_close_matches(name.lower(), by_lower, count, 0.55)]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``did you mean X or Y?``, or the empty string."""
    hits = nearest(name, options)
    return f"did you mean {' or '.join(hits)}?" if hits else ""
