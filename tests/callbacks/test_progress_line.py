"""What a run says of how far it is."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from support.jobs import finetuning, latents_for, trainer

from callbacks import ProgressLine
from callbacks.progress_line import LOG
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, path: Path, root: Path, verb: str = "fit", **settings: Any
) -> str:
    """All that a job wrote to stderr; in a log every update has its line."""
    job = finetuning(str(path))
    clips = latents_for(job, count=4, batch_size=1)
    ckpt_path = settings.pop("ckpt_path", None)
    line = settings.pop("line", ProgressLine(every=1e-9))
    run = trainer(root, enable_progress_bar=True, callbacks=[line], **settings)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        getattr(run, verb)(job, clips, ckpt_path=ckpt_path)
    if verb == "fit":
        run.save_checkpoint(str(root / "x.ckpt"))
    return stream.getvalue()


def without_times(text: str) -> list[str]:
    return [re.sub(r", [\d.]+ (a second|s each)(, \d+ s left)?", ", pace", line) for line in text.splitlines()]


def test_a_log_says_updates_of_the_whole_run_and_goes_on_where_it_was(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight batches of a clip, two an update: neither epochs nor batches are counted."""
    wan = tiny_checkpoint("wan")
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 2, "val_check_interval": 4}
    lines = without_times(said(monkeypatch, io.StringIO(), wan, tmp_path, max_steps=3, **settings))
    updates = [line for line in lines if line.startswith("updates")]
    assert [re.match(r"updates \d+ of 3", line) is not None for line in updates] == [True] * 4
    assert updates[0].startswith("updates 1 of 3, pace, train/loss ")
    assert re.fullmatch(r"updates 3 of 3 in \d+ s", updates[-1])
    assert "validation batches 1 of 2, pace" in lines
    assert not any(" in " in line for line in lines if line.startswith("validation")), "inside a training it goes again"
    assert any("val/loss" in line for line in updates[1:])
    more = said(monkeypatch, io.StringIO(), wan, tmp_path, max_steps=5, ckpt_path=str(tmp_path / "x.ckpt"), **settings)
    updates = [line for line in without_times(more) if line.startswith("updates")]
    assert updates[0].startswith("updates 4 of 5, pace")
    assert len(updates) == 3


def test_epochs_are_told_as_updates_and_what_has_no_end_as_it_is(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = tiny_checkpoint("wan")
    text = said(monkeypatch, io.StringIO(), wan, tmp_path, max_epochs=2, limit_val_batches=0)
    assert "updates 8 of 8 in" in text
    text = said(monkeypatch, io.StringIO(), wan, tmp_path, max_epochs=-1, max_time={"seconds": 1}, limit_val_batches=0)
    assert re.search(r"^updates 1, [\d.]+ (a second|s each), train/loss", text, re.M)


def test_other_loops_count_their_batches(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(monkeypatch, io.StringIO(), tiny_checkpoint("wan"), tmp_path, "validate", limit_val_batches=2)
    assert re.search(r"^validation batches 2 of 2 in \d+ s$", text, re.M)


def test_a_terminal_has_one_line_and_what_is_logged_its_own(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    line = ProgressLine()

    class Speaks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            assert line._training is not None
            line._training._say()
            line.print("something", file=sys.stderr)

    text = said(monkeypatch, Terminal(), tiny_checkpoint("wan"), tmp_path, max_steps=2, line=line, limit_val_batches=0)
    assert re.fullmatch(r"\rupdates 2 of 2 in \d+ s *\n", text[text.index("\rupdates") :]), "the end alone"
    run = trainer(tmp_path, max_steps=2, enable_progress_bar=True, callbacks=[line, Speaks()], limit_val_batches=0)
    stream = Terminal()
    job = finetuning(str(tiny_checkpoint("wan")))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        run.fit(job, latents_for(job, count=4, batch_size=1))
    text = stream.getvalue()
    shown = text[text.index("\rupdates") :].split("\n")
    for part in shown[:2]:
        *_, before, cleared, message = part.split("\r")
        assert before.startswith("updates ")
        assert len(before) < 30
        assert (cleared.strip(), len(cleared)) == ("", len(before))
        assert message == "something"


def test_metrics_are_read_only_for_a_line_and_an_error_leaves_the_log_as_it_was(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one waits for the GPU."""
    reads: list[int] = []
    real = vars(pl.Trainer)["progress_bar_metrics"].fget

    def counted(self: pl.Trainer) -> Any:
        reads.append(1)
        return real(self)

    monkeypatch.setattr(pl.Trainer, "progress_bar_metrics", property(counted))
    wan = tiny_checkpoint("wan")
    before = [list(handler.filters) for handler in LOG.handlers]
    said(monkeypatch, io.StringIO(), wan, tmp_path, max_steps=3, limit_val_batches=0, line=ProgressLine(every=1e9))
    assert not reads
    said(monkeypatch, io.StringIO(), wan, tmp_path, max_steps=3, limit_val_batches=0)
    assert len(reads) == 3

    class Fails(ProgressLine):
        def on_train_batch_start(self, *rest: Any) -> None:
            raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        said(monkeypatch, io.StringIO(), wan, tmp_path, max_steps=3, line=Fails())
    assert [list(handler.filters) for handler in LOG.handlers] == before


def test_ranks_that_say_nothing_and_bad_settings(tmp_path: Path) -> None:
    line = ProgressLine()
    line.disable()
    assert not line.shown
    line.enable()
    assert line.shown
    with pytest.raises(UsageError, match="every is 0"):
        ProgressLine(every=0)
