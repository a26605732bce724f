"""How far a long verb is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Optional, TextIO


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """A line on stderr: rewritten in place on a terminal, written anew now and then into a log.

    Args:
        label: What is counted.
        total: How many there are.
        show: Whether this process says anything.
        every: Seconds between two lines of a log.
        stream: Where to; stderr where not given.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        show: bool = True,
        every: float = 30.0,
        stream: Optional[TextIO] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.show, self.clock = label, total, show, clock
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.done = 0
        self._start = self._said = clock()
        self._width = 0

    def text(self) -> str:
        """``latents 120 of 1000, 3.1 a second, 5 min left``."""
        spent = self.clock() - self._start
        text = f"{self.label} {self.done} of {self.total}"
        if self.done and spent > 0:
            rate = self.done / spent
            pace = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s each"
            text += f", {pace}, {duration((self.total - self.done) / rate)} left"
        return text

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self.clock() - self._said >= self.every:
            self._say()

    def _say(self) -> None:
        self._said = self.clock()
        if not self.show:
            return
        text = self.text()
        if self.live:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.show and self.total:
            spent = duration(self.clock() - self._start)
            text = f"{self.label} {self.done} of {self.total} in {spent}"
            self.stream.write(("\r" + text.ljust(self._width) if self.live else text) + "\n")
            self.stream.flush()
