"""How far something long is, and how long it will still take."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        total: How many there are; None where nobody knows.
        show: Whether this process says anything.
        every: Seconds between two lines of a log.
        stream: Where to; stderr where not given.
        clock: Gives the time in seconds.
        done: How many are done already, which says nothing of how fast the others will be.
        ends: Whether the end is said too.
    """

    def __init__(
        self,
        label: str,
        total: Optional[int],
        show: bool = True,
        every: float = 30.0,
        stream: Optional[TextIO] = None,
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
        ends: bool = True,
    ) -> None:
        self.label, self.total, self.show, self.clock, self.ends = label, total, show, clock, ends
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.done = self._begun = done
        self.note = ""
        """What else is said of the last one."""
        self._start = self._said = clock()
        self._width = 0

    @property
    def count(self) -> str:
        """``latents 120 of 1000``."""
        return f"{self.label} {self.done}" + (f" of {self.total}" if self.total is not None else "")

    def text(self) -> str:
        """``latents 120 of 1000, 3.1 a second, 5 min left``, and the note."""
        spent, new = self.clock() - self._start, self.done - self._begun
        text = self.count
        if new and spent > 0:
            rate = new / spent
            text += f", {rate:.1f} a second" if rate >= 1 else f", {1 / rate:.1f} s each"
            if self.total is not None:
                text += f", {duration(max(0, self.total - self.done) / rate)} left"
        return f"{text}, {self.note}" if self.note else text

    @property
    def due(self) -> bool:
        """Whether the next advance says something: a note that is costly to make is needed only then."""
        return self.show and self.clock() - self._said >= self.every

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self.due:
            self._say()

    def clear(self) -> None:
        """Take the line off a terminal, for others to write there."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0

    def _say(self) -> None:
        self._said = self.clock()
        self._write(self.text(), "" if self.live else "\n")

    def _write(self, text: str, end: str) -> None:
        if self.live:
            # A line that wraps can't be rewritten.
            text = text[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + text.ljust(self._width) + end)
            self._width = 0 if end else len(text)
        else:
            self.stream.write(text + end)
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Say the end, or nothing."""
        if not self.show or self.total == 0:
            return
        if self.ends:
            self._write(f"{self.count} in {duration(self.clock() - self._start)}", "\n")
        else:
            self.clear()


@contextmanager
def bars_on_terminals_alone() -> Iterator[None]:
    """Keep the progress bars of diffusers and transformers out of logs, where every change of one is a line."""
    if sys.stderr.isatty():
        yield
        return
    from diffusers.utils import logging as one
    from transformers.utils import logging as other

    shown = [library for library in (one, other) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
