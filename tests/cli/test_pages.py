"""The page about a user's own loss, run exactly as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .conftest import ROOT, Command

PAGE = ROOT / "docs" / "plug-in-a-loss.md"


def test_the_page_is_short():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) < 40


def test_a_loss_of_the_users_own_works_as_its_page_says(command: Command, tmp_path: Path):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["python", "yaml", ""]
    names = [content.splitlines()[0].removeprefix("# ") for _, content in blocks[:2]]
    assert names == ["my_losses.py", "mine.yaml"]
    for name, (_, content) in zip(names, blocks[:2], strict=True):
        (tmp_path / name).write_text(content, encoding="utf-8")
    lines = blocks[2][1].splitlines()
    assert len(lines) == 2
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "muybridge"
        result = command(*arguments)
        assert result.code == 0, result.err
    (config,) = (tmp_path / "runs/tiny/fit-wan").rglob("config.yaml")
    assert "class_path: my_losses.FrameDifference" in config.read_text()
    assert list((tmp_path / "runs/tiny/fit-wan").rglob("last.ckpt"))
    (events,) = (tmp_path / "runs/tiny/fit-wan").rglob("events.out.tfevents.*")
    assert b"train/FrameDifference" in events.read_bytes(), "every loss is logged under its own name"
