"""The teacher's paths from the command: written, stopped, gone on with. What is trained on them is in test_stages.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muybridge.backbones.base import Backbone
from muybridge.data.trajectories import Trajectories

from .conftest import ROOT, Command

Tiny = Callable[[str], Path]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def options(tiny_checkpoint: Tiny, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a dog runs\na cat sleeps\na red car\nwaves at night\n")
    return ["-c", "tiny/trajectory.yaml", f"--model.student.path={tiny_checkpoint('wan')}", *QUIET]


def test_paths_are_shared_by_ranks_completed_and_the_same_however_they_were_made(
    command: Command, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ["trajectories", *options, "--prompts=prompts.txt", "--out=paths"]
    cached = command("cache", *options, "--data=PromptData", "--data.prompts=prompts.txt", "--out=cache")
    assert cached.code == 0, cached.err
    # Two ranks, one after the other, as a launcher tells them, the second without a text encoder; then once more for whatever
    # is missing.
    without = ["--cache=cache", "--model.student.components=[denoiser]"]
    for rank, more in (("0", []), ("1", without)):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        result = command(*write, *more)
        assert result.code == 0, result.err
    shards = sorted(Path("paths").glob("*.safetensors"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    again = command(*write)
    assert again.code == 0
    assert "4 trajectories at times 1000, 750, 500, 0" in again.out
    assert sorted(Path("paths").glob("*.safetensors")) == shards, "nothing was left to do"
    assert Trajectories("paths").ids == [
        "0000-a-dog-runs",
        "0001-a-cat-sleeps",
        "0002-a-red-car",
        "0003-waves-at-night",
    ]

    assert command(*write[:-1], "--out=alone").code == 0
    for name in Trajectories("paths").ids:
        assert torch.equal(Trajectories("paths").read(name).latents, Trajectories("alone").read(name).latents)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.steps=[1000, 800]"], "step 800 is not on the teacher's path"),
        (["--prompts=blank.txt"], "blank lines: 2"),
        (["--model.student.components=[denoiser]"], "text_encoder among them, or --cache"),
    ],
)
def test_bad_input_is_refused_before_weights_load(
    change: list[str], said: str, command: Command, options: list[str], loads: list[Backbone]
) -> None:
    Path("blank.txt").write_text("a dog\n\na cat\n")
    result = command("trajectories", *options, "--prompts=prompts.txt", "--out=paths", *change)
    assert result.code == 2
    assert said in result.message
    assert not loads
    assert not Path("paths").exists()


def test_a_causal_config_on_another_family_is_refused_before_weights_load(
    command: Command, options: list[str], loads: list[Backbone], tiny_checkpoint: Tiny
) -> None:
    result = command("fit", *options, f"--model.student.path={tiny_checkpoint('cogvideox')}")
    assert result.code == 2
    assert "a family with per-frame times" in result.message
    assert not loads


@pytest.mark.parametrize("page", ["causal.md", "motion-score.md"])
def test_the_commands_of_the_pages_parse(page: str, command: Command, tiny_checkpoint: Tiny) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = re.findall(r"^muybridge (.+)$", text, re.MULTILINE)
    assert len(lines) >= 2
    wan = str(tiny_checkpoint("wan"))
    for line in lines:
        line = line.replace("RUN/config.yaml", "motion_score/wan-1.3b.yaml").replace("CHECKPOINT", wan)
        result = command(*shlex.split(line), "--print_config")
        assert result.code == 0, result.err
        assert "class_path" in result.out
