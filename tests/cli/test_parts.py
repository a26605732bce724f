"""Verbs after one another: each once, with an estimate, and taken up where they stopped."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from muybridge.cli.bench.parts import Done, Part, one_thread, read_done, run_parts
from muybridge.errors import UsageError


class World:
    """Verbs that take twice as long as was thought, and a clock."""

    def __init__(self, fails: str = "") -> None:
        self.now, self.fails = 0.0, fails
        self.ran: list[list[str]] = []
        self.said: list[str] = []

    def run(self, arguments: list[str]) -> int:
        self.ran.append(arguments)
        self.now += 2.0 * float(arguments[1])
        return int(arguments[0] == self.fails)

    def through(self, parts: list[Part], root: Path) -> dict[str, float]:
        found = run_parts(parts, root, self.run, lambda: self.now, self.said.append)
        return {name: done.seconds for name, done in found.items()}


PARTS = [
    Part(name, f"part {name}", (name, str(weight)), weight) for name, weight in (("a", 60.0), ("b", 30.0), ("c", 90.0))
]


def test_each_is_run_once_in_its_order(tmp_path: Path):
    world = World()
    assert world.through(PARTS, tmp_path) == {"a": 120.0, "b": 60.0, "c": 180.0}
    assert [a for a, _ in world.ran] == ["a", "b", "c"]
    again = World()
    assert again.through(PARTS, tmp_path) == {"a": 120.0, "b": 60.0, "c": 180.0}
    assert again.ran == []


def test_the_estimate_learns_how_long_things_take(tmp_path: Path):
    world = World()
    world.through(PARTS, tmp_path)
    heads = [line for line in world.said if line.startswith("\n[")]
    assert heads == [
        "\n[part 1 of 3, about 3 min left] part a",  # as thought: 180 s
        "\n[part 2 of 3, about 4 min left] part b",  # 120 s more, at twice the time
        "\n[part 3 of 3, about 3 min left] part c",  # 90 s more, likewise
    ]


def test_it_goes_on_after_what_failed(tmp_path: Path):
    with pytest.raises(UsageError, match="part b failed with exit code 1"):
        World(fails="b").through(PARTS, tmp_path)
    world = World()
    world.through(PARTS, tmp_path)
    assert [a for a, _ in world.ran] == ["b", "c"]
    assert world.said[0].startswith("1 of 3 parts")


def test_a_part_that_is_another_now_is_not_taken_for_done(tmp_path: Path):
    World().through(PARTS, tmp_path)
    other = Part("a", "part a", ("a", "61.0"))
    with pytest.raises(UsageError, match=r"is of another command: muybridge a 60\.0"):
        read_done(tmp_path, other)
    with pytest.raises(ValueError, match="two parts are called a"):
        World().through([*PARTS, other], tmp_path)


def test_processes_share_the_work(tmp_path: Path):
    # b and c read from a, d from both. The first to run b waits inside it until the other one runs c.
    parts = [
        Part("a", "", ("a",), needs=()),
        Part("b", "", ("b",), needs=("a",)),
        Part("c", "", ("c",), needs=("a",)),
        Part("d", "", ("d",)),
    ]
    ran: list[str] = []
    begun = {name: threading.Event() for name in "abcd"}
    done = {name: threading.Event() for name in "abcd"}

    def run(arguments: list[str]) -> int:
        (name,) = arguments
        ran.append(name)
        begun[name].set()
        if name in "bc":
            assert begun["c" if name == "b" else "b"].wait(30.0), "nobody took the other one"
        assert all(done[p].is_set() for p in {"b": "a", "c": "a", "d": "abc"}.get(name, ""))
        done[name].set()
        return 0

    def work() -> dict[str, Done]:
        return run_parts(parts, tmp_path, run, say=lambda text: None, rest=lambda seconds: time.sleep(0.01))

    with ThreadPoolExecutor(2) as pool:
        one, other = [pool.submit(work) for _ in range(2)]
    assert one.result() == other.result()
    assert set(one.result()) == set("abcd")
    assert sorted(ran) == ["a", "b", "c", "d"]


def test_what_a_process_leaves_when_it_dies_another_takes(tmp_path: Path):
    started = tmp_path / "started"
    dies = (
        "import pathlib, signal, os; from muybridge.cli.bench.parts import Part, run_parts;"
        f"run_parts([Part('a', '', ('a',))], pathlib.Path({str(tmp_path)!r}),"
        f" lambda a: (pathlib.Path({str(started)!r}).touch(), signal.pause()))"
    )
    process = subprocess.Popen([sys.executable, "-c", dies], stdout=subprocess.DEVNULL)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    waited: list[float] = []

    def rest(seconds: float) -> None:
        waited.append(seconds)
        process.kill()
        process.wait()

    said: list[str] = []
    found = run_parts([Part("a", "", ("a",))], tmp_path, lambda a: 0, say=said.append, rest=rest)
    assert list(found) == ["a"]
    assert len(waited) == 1
    assert "waiting" in said[0]


def test_a_part_reads_from_what_comes_before_it(tmp_path: Path):
    with pytest.raises(ValueError, match="b needs a, which is no part before it"):
        World().through([Part("b", "", ("b", "1"), needs=("a",)), Part("a", "", ("a", "1"))], tmp_path)


def test_small_networks_get_one_thread_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with one_thread():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
