"""Which of the known names a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from muybridge.errors import nearest


def near(name: str, options: Iterable[str]) -> list[str]:
    """The nearest options: the best, and others only where they are about as near."""

    def likeness(option: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), option.lower()).ratio()

    hits = nearest(name, options)
    return [hit for hit in hits if likeness(hit) > likeness(hits[0]) - 0.05]


def did_you_mean(hits: Iterable[str]) -> str:
    """``did you mean X or Y?`` of hits already found, or the empty string."""
    hits = list(hits)
    return f"did you mean {' or '.join(hits)}?" if hits else ""
