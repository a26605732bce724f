"""Several verbs after one another, each done once: what is made is not made again, and it is said how long the rest takes.

Processes that are given the same parts and the same folder share the work, on one machine or on several: a part is done by the
one that locks its file first, as soon as all that it reads from is done. A lock goes with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from muybridge.errors import UsageError
from muybridge.progress import duration
from muybridge.whole import write_text

THOUGHT = 20.0
"""Seconds."""
REST = 2.0
"""Seconds between looks at what other processes have done."""


@dataclass(frozen=True)
class Part:
    """One verb with its options.

    Args:
        name: Of the file that says it is done.
        what: What it does, for people.
        arguments: The verb and what follows it.
        weight: How long it takes against other parts; in seconds on two idle cores, as far as that is known.
        needs: Names of the parts that it reads from; all that come before it where not given.
    """

    name: str
    what: str
    arguments: tuple[str, ...]
    weight: float = 1.0
    needs: Optional[tuple[str, ...]] = None

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
    rest: Callable[[float], None] = time.sleep,
) -> dict[str, Done]:
    """Run those that are not done; returns what is known of each, by name, when all are.

    Args:
        parts: In their order.
        root: The folder; ``done/<name>.json`` in it says what is done.
        run: Runs a verb with its options, and returns its exit code.
        clock: Gives the time in seconds.
        say: Prints a line.
        after: Called when a part is done.
        rest: Waits so many seconds, where other processes do all that can be done.
    """
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two parts are called {twice[0]}")
    for number, some in enumerate(parts):
        missing = set(some.needs or ()).difference(names[:number])
        if missing:
            raise ValueError(f"{some.name} needs {missing.pop()}, which is no part before it")
    found: dict[str, Done] = {}
    first, begun, worked, waits = True, clock(), 0.0, False
    while True:
        for some in parts:
            done = None if some.name in found else read_done(root, some)
            if done is not None:
                found[some.name] = done
        left = [part for part in parts if part.name not in found]
        if first and len(left) < len(parts):
            say(f"{len(parts) - len(left)} of {len(parts)} parts are in {root} already")
        first = False
        if not left:
            return found
        with ExitStack() as stack:
            part = next((p for p in _ready(parts, left) if stack.enter_context(_locked(root, p))), None)
            if part is None:
                if not waits:
                    say(
                        f"\n{len(left)} parts are left, all of them for other processes or after what these do; waiting"
                    )
                waits = True
                rest(REST)
                continue
            if read_done(root, part) is not None:
                continue  # by another process, just now
            waits = False
            spent = clock() - begun
            # What was thought counts for as much as so many seconds of work, or one short part would upset it.
            pace = (spent + THOUGHT) / (worked + THOUGHT)
            lasts = duration(sum(p.weight for p in left) * pace)
            say(f"\n[part {len(parts) - len(left) + 1} of {len(parts)}, about {lasts} left] {part.what}")
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
            known = {"command": part.command, "seconds": round(clock() - before, 1)}
            write_text(root / "done" / f"{part.name}.json", json.dumps(known, indent=2) + "\n")
        worked += part.weight
        after(part)


def _ready(parts: Sequence[Part], left: Sequence[Part]) -> Iterator[Part]:
    """Of what is left, that which reads from nothing that is."""
    waiting = {part.name for part in left}
    for number, part in enumerate(parts):
        needs = [p.name for p in parts[:number]] if part.needs is None else part.needs
        if part.name in waiting and waiting.isdisjoint(needs):
            yield part


@contextmanager
def _locked(root: Path, part: Part) -> Iterator[bool]:
    """Whether this process alone has a part, as long as this lasts."""
    file = root / "done" / f"{part.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


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
