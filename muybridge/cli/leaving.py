"""What a job that is no training does when it is told to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def leaving_at_sigterm() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the process as Ctrl-C does: what is made is written first.

    Lightning only notes the signal, for its loops to see; a job in a loop's place would never end.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
