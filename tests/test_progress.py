"""What a long verb says of itself."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.backbones import load
from muybridge.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (89 * 60, "89 min"), (90 * 60, "1 h 30 min"), (7300, "2 h 2 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_now_and_then() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress("clips", 10, every=30, stream=out, clock=clock) as progress:
        for _ in range(4):
            clock.now += 20
            progress.advance()
    lines = out.getvalue().splitlines()
    assert lines == [
        "clips 2 of 10, 20.0 s each, 3 min left",
        "clips 4 of 10, 20.0 s each, 2 min left",
        "clips 4 of 10 in 80 s",
    ]


def test_a_terminal_gets_one_line_that_changes() -> None:
    clock, out = Clock(), Terminal()
    with Progress("clips", 100, stream=out, clock=clock) as progress:
        clock.now += 2
        progress.advance(50)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().startswith("\rclips 50 of 100, 25.0 a second, 2 s left\r")


@pytest.mark.parametrize(("total", "show"), [(3, False), (0, True)])
def test_other_ranks_and_empty_work_say_nothing(total: int, show: bool) -> None:
    out = io.StringIO()
    with Progress("clips", total, show=show, stream=out) as progress:
        progress.advance(total)
    assert out.getvalue() == ""


def test_what_was_done_before_says_nothing_of_the_pace() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress("updates", 200, every=1, stream=out, clock=clock, done=100) as progress:
        clock.now += 10
        progress.note = "loss 0.5"
        progress.advance(5)
    assert out.getvalue().splitlines()[0] == "updates 105 of 200, 2.0 s each, 3 min left, loss 0.5"


def test_what_has_no_known_end_has_no_time_left() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress("updates", None, every=1, stream=out, clock=clock, ends=False) as progress:
        clock.now += 10
        progress.advance(5)
    assert out.getvalue() == "updates 5, 2.0 s each\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_libraries_draw_their_bars_on_terminals_alone(
    terminal: bool, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging
    from transformers.utils import logging as other

    stream = Terminal() if terminal else io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        load(str(tiny_checkpoint("wan")), max_text_length=16).encode_text(["a dog"])
    assert ("Loading" in stream.getvalue()) is terminal
    assert logging.is_progress_bar_enabled()
    assert other.is_progress_bar_enabled()


def test_a_note_is_needed_only_where_a_line_is_due() -> None:
    clock = Clock()
    line = Progress("updates", 10, every=30, stream=io.StringIO(), clock=clock)
    assert not line.due
    clock.now += 30
    assert line.due
    line.advance()
    assert not line.due
    clock.now += 30
    line.show = False
    assert not line.due, "nor where nothing is said"
