"""Several verbs after one another, each done once: what is made is not made again, and it is said how long the rest takes."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from muybridge.cli.progress import duration
from muybridge.errors import UsageError
from muybridge.whole import write_text

THOUGHT = 20.0
"""Seconds."""


@dataclass(frozen=True)
class Part:
    """One verb with its options.

    Args:
        name: Of the file that says it is done.
        what: What it does, for people.
        arguments: The verb and what follows it.
        weight: How long it takes against other parts; in seconds on two idle cores, as far as that is known.
    """

    name: str
    what: str
    arguments: tuple[str, ...]
    weight: float = 1.0

    @property
    def command(self) -> str:
        """As typed into a shell."""
        return shlex.join(["muybridge", *self.arguments])


@dataclass(frozen=True)
class Done:
    """A part that is done.

    Args:
        command: What did it.
        seconds: How long it took.
    """

    command: str
    seconds: float


def run_parts(
    parts: Sequence[Part],
    root: Path,
    run: Callable[[list[str]], int],
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
    after: Callable[[Part], None] = lambda part: None,
) -> dict[str, Done]:
    """Run those that are not done; returns what is known of each, by name.

    Args:
        parts: In their order.
        root: The folder; ``done/<name>.json`` in it says what is done.
        run: Runs a verb with its options, and returns its exit code.
        clock: Gives the time in seconds.
        say: Prints a line.
        after: Called when a part is done.
    """
    twice = sorted({part.name for part in parts if sum(p.name == part.name for p in parts) > 1})
    if twice:
        raise ValueError(f"two parts are called {twice[0]}")
    found = {part.name: read_done(root, part) for part in parts}
    left = [part for part in parts if found[part.name] is None]
    if len(left) < len(parts):
        say(f"{len(parts) - len(left)} of {len(parts)} parts are in {root} already")
    expected = sum(part.weight for part in left)
    begun, worked = clock(), 0.0
    for number, part in enumerate(left, len(parts) - len(left) + 1):
        spent = clock() - begun
        # What was thought counts for as much as so many seconds of work, or one short part would upset it.
        pace = (spent + THOUGHT) / (worked + THOUGHT)
        say(f"\n[part {number} of {len(parts)}, about {duration((expected - worked) * pace)} left] {part.what}")
        say(f"  {part.command}")
        before = clock()
        with one_thread():
            code = run(list(part.arguments))
        if code:
            raise UsageError(
                f"{part.what} failed with exit code {code}",
                "what it says above to be mended",
                "then the same command again: it goes on from here",
            )
        done = Done(part.command, round(clock() - before, 1))
        known = {"command": done.command, "seconds": done.seconds}
        write_text(root / "done" / f"{part.name}.json", json.dumps(known, indent=2) + "\n")
        found[part.name] = done
        worked += part.weight
        after(part)
    return {name: done for name, done in found.items() if done is not None}


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside it torch works with one thread, unless ``OMP_NUM_THREADS`` says how many.

    The networks here are small: threads that wait for one another cost more than they bring, and on a machine with other work
    to do they cost twenty times as much.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_done(root: Path, part: Part) -> Done | None:
    """What is known of a part, if it is done."""
    file = root / "done" / f"{part.name}.json"
    if not file.is_file():
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    if held["command"] != part.command:
        raise UsageError(
            f"{file} is of another command: {held['command']}",
            part.command,
            "remove that file to run this part again, or choose another --out",
        )
    return Done(held["command"], float(held["seconds"]))
