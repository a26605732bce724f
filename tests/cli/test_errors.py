"""What a user gets wrong is said in a few lines, with exit code 2, before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.backbones.base import Backbone

from .conftest import Command

LOSSES = "model: {init_args: {losses: [%s]}}\n"
OF_YOURS = """
from muybridge.losses import Loss, per_sample

class Squared(Loss):
    def forward(self, step):
        return per_sample((step.x0 - step.clean) ** 2)

class NotALoss:
    def __init__(self, power: float = 1.0):
        pass

class HalfALoss(Loss):
    pass
"""

# name: (a file given as a further -c, further options, what must be said)
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "option": ("", ["--trainer.max_step=3"], ["--trainer.max_step", "did you mean --trainer.max_steps?"]),
    "option with a space": ("", ["--trainer.max_step", "3"], ["did you mean --trainer.max_steps?"]),
    "abbreviated option": ("", ["--trainer.accel=cpu"], ["unknown option --trainer.accel"]),
    "group of options": ("", ["--modle.seed=3"], ["--modle", "did you mean --model?"]),
    "option of a class": ("", ["--model.bakbone.path=x"], ["--model.bakbone", "did you mean --model.backbone?"]),
    "option of an inner class": ("", ["--model.backbone.pth=x"], ["an option of Pretrained", "--model.backbone.path?"]),
    "key at the top": ("datta: {x: 1}\n", [], ["key datta (bad.yaml, line 1)", "did you mean data?"]),
    "key of the trainer": ("trainer:\n  max_step: 3\n", [], ["key trainer.max_step (bad.yaml, line 2)", "max_steps?"]),
    "key of the model": ("model:\n  init_args:\n    sed: 3\n", [], ["key model.sed (bad.yaml, line 3)", "model.seed?"]),
    "init_args itself": ("model:\n  int_args: {seed: 3}\n", [], ["model.int_args (bad.yaml, line 2)", "init_args?"]),
    "key of the data": ("data: {init_args: {video: x}}\n", [], ["data.video (bad.yaml, line 1)", "data.videos?"]),
    "key of a loss": (
        LOSSES % "{class_path: Denoising, init_args: {gama: 1}}",
        [],
        ["model.losses.gama", "losses.gamma?"],
    ),
    "key of a dataclass": ("model: {init_args: {sampling: {stps: 3}}}\n", [], ["sampling.stps", "sampling.steps?"]),
    "key of an optional dataclass": ("model: {init_args: {adapter: {rnk: 3}}}\n", [], ["adapter.rnk", "adapter.rank?"]),
    "key of a callback": (
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monito: x}}]}\n",
        [],
        ["monito", "monitor?"],
    ),
    "class": (LOSSES % "Denoisng", [], ["no class Denoisng (bad.yaml, line 1)", "did you mean Denoising?"]),
    "class on the line": ("", ["--model.losses=[Denoisng]"], ["no class Denoisng", "did you mean Denoising?"]),
    "class of the model": (
        "model: {class_path: Finetunning}\n",
        [],
        ["no class Finetunning", "did you mean Finetuning?"],
    ),
    "class of the data": ("data: {class_path: VideData}\n", [], ["no class VideData", "did you mean VideoData?"]),
    "class of a callback": (
        "trainer: {callbacks: [ModelCheckpont]}\n",
        [],
        ["ModelCheckpont", "did you mean ModelCheckpoint?"],
    ),
    "module": (
        LOSSES % "my_loses.Squared",
        [],
        ["no module my_loses", "Squared (bad.yaml, line 1)", "my_losses.Squared?"],
    ),
    "module that imports another": (LOSSES % "my_broken.X", [], ["importing my_broken.X failed", "nosuchmodule"]),
    "class in a module": (
        LOSSES % "my_losses.Square",
        [],
        ["my_losses has no class Square", "did you mean my_losses.Squared?"],
    ),
    "class in our package": (LOSSES % "muybridge.losses.Denoisin", [], ["did you mean muybridge.losses.Denoising?"]),
    "class that is no loss": (
        LOSSES % "my_losses.NotALoss",
        [],
        ["my_losses.NotALoss is no Loss", "class NotALoss(Loss)"],
    ),
    "class of another kind": (LOSSES % "VideoData", [], ["VideoData", "Denoising"]),
    "class without its methods": (LOSSES % "my_losses.HalfALoss", [], ["HalfALoss has abstract methods"]),
    "a package that is ours": (
        "trainer: {callbacks: [callbacks.mine.Foo]}\n",
        [],
        ["callbacks", "muybridge's own package"],
    ),
    "number": (
        "model: {init_args: {caption_dropout: abc}}\n",
        [],
        ["model.caption_dropout: abc (bad.yaml, line 1)", "a number"],
    ),
    "number on the line": ("", ["--model.caption_dropout=abc"], ["model.caption_dropout: abc", "a number"]),
    "number of an optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: abc}}}}\n",
        [],
        ["lr: abc", "a number"],
    ),
    "whole number": ("trainer: {max_steps: one}\n", [], ["trainer.max_steps: one", "a whole number"]),
    "numbers": ("model: {init_args: {loss_weights: [a]}}\n", [], ["model.loss_weights", "a number"]),
    "truth": ("trainer: {detect_anomaly: 3}\n", [], ["trainer.detect_anomaly: 3", "true or false"]),
    "choice": (
        LOSSES % "{class_path: Denoising, init_args: {weighting: min_snt}}",
        [],
        ["none or min_snr", "mean min_snr?"],
    ),
    "choice of the trainer": (
        "trainer: {precision: bf16-mixd}\n",
        [],
        ["precision: bf16-mixd", "did you mean bf16-mixed?"],
    ),
    "not a list": ("model: {init_args: {losses: {class_path: Denoising}}}\n", [], ["model.losses", "a list", "'- '"]),
    "number below its range": ("model: {init_args: {caption_dropout: 2}}\n", [], ["caption_dropout is 2"]),
    "no losses": ("model: {init_args: {losses: []}}\n", [], ["losses is empty"]),
    "weights for losses": ("model: {init_args: {loss_weights: [1, 2]}}\n", [], ["1 losses and 2 loss_weights"]),
    "strategy": ("trainer: {strategy: dpp}\n", [], ["dpp"]),
    "accelerator": ("trainer: {accelerator: cpuu}\n", [], ["cpuu"]),
    "checkpoint to train": ("", ["--model.backbone.path=./nowhere"], ["./nowhere", "model_index.json"]),
    "checkpoint to resume": ("", ["--ckpt_path=run/lost.ckpt"], ["run/lost.ckpt does not exist"]),
    "regex that hits nothing": (
        "model: {init_args: {adapter: {targets: 'nothing'}}}\n",
        [],
        ["'nothing' hits no linear layer"],
    ),
    "regex of the trained": ("model: {init_args: {trainable: 'nothing'}}\n", [], ["'nothing' matches no parameter"]),
    "config": ("", ["-c", "nofile.yaml"], ["nofile.yaml does not exist"]),
    "shipped config": ("", ["-c", "tiny/wann.yaml"], ["tiny/wann.yaml does not exist", "did you mean tiny/wan.yaml?"]),
    "config without a name": ("", ["-c"], ["-c without a file"]),
    "unclosed bracket": ("model:\n  x: [1\ndata: 2\n", [], ["bad.yaml, line 3"]),
    "tab": ("model:\n\tx: 1\n", [], ["bad.yaml, line 2", "never tabs"]),
    "empty file": ("# nothing\n", [], ["bad.yaml is empty"]),
    "list for a file": ("- a\n", [], ["bad.yaml holds no mapping"]),
    "a key twice": ("trainer:\n  max_steps: 1\n  max_steps: 2\n", [], ["max_steps stands twice, in lines 2 and 3"]),
    "a file that is not text": ("\udcff", [], ["bad.yaml is not UTF-8"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_said_in_a_few_lines(
    case: str,
    command: Command,
    tiny_options: Callable[[str], list[str]],
    tmp_path: Path,
    loads: list[Backbone],
):
    text, options, said = CASES[case]
    (tmp_path / "my_losses.py").write_text(OF_YOURS)
    (tmp_path / "my_broken.py").write_text("import nosuchmodule\n")
    files = []
    if text:
        (tmp_path / "bad.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        files = ["-c", "bad.yaml"]
    result = command("fit", *tiny_options("wan"), *files, *options)
    assert result.code == 2, result.err
    for part in said:
        assert part in result.message, result.message
    assert len(result.message.splitlines()) <= 8, result.message
    assert result.err.startswith("config tiny/wan.yaml: ")
    assert "usage:" not in result.err
    assert "Union" not in result.err
    assert "Traceback" not in result.err
    assert max(map(len, result.message.splitlines())) < 300
    assert not loads, "checks come before weights"


def test_help_of_a_class_that_is_not_there(command: Command):
    result = command("fit", "--data.help", "VideData")
    assert result.code == 2
    assert "did you mean VideoData?" in result.message
    assert "ClipData" not in result.message, "a base is nothing to choose"


def test_nothing_given(command: Command, loads: list[Backbone]):
    result = command("fit")
    assert result.code == 2
    assert "--model" in result.message
    assert "-c FILE" in result.message


def test_what_a_class_needs(command: Command, tmp_path: Path, tiny_options: Callable[[str], list[str]]):
    backbone = "{class_path: Wan, init_args: {dtype: float32}}"
    (tmp_path / "bad.yaml").write_text(
        f"model: {{class_path: Finetuning, init_args: {{backbone: {backbone}, losses: [Denoising]}}}}\n"
    )
    result = command("fit", "-c", "bad.yaml", "--data=VideoData", "--data.videos=x")
    assert result.code == 2
    assert "model.backbone.path not given" in result.message
    assert "Wan has no default" in result.message


def test_options_without_a_class(command: Command, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model:\n  init_args:\n    losses: []\n")
    result = command("fit", "-c", "bad.yaml", "--data=VideoData", "--data.videos=x")
    assert result.code == 2
    assert "model has options and no class (bad.yaml, line 3)" in result.message
    assert "class_path: NAME" in result.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--famly", "wan"], "did you mean --family?"),
        (["tiny", "--family", "wann"], "did you mean wan"),
        (["tiny"], "neither --family nor --clips"),
        (["tiny", "--clips", "x", "--count", "many"], "a whole number"),
        (["tiny", "--clips", "x", "--count", "0"], "0 clips"),
        (["consolidate", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["consolidate", "nowhere"], "--out not given"),
        (["consolidate"], "path"),
    ],
)
def test_verbs_without_a_model_speak_alike(command: Command, arguments: list[str], said: str):
    result = command(*arguments)
    assert result.code == 2
    assert said in result.message
    assert len(result.err.strip().splitlines()) <= 8
    assert "usage:" not in result.err


def test_a_forgotten_c_is_said(command: Command, loads: list[Backbone]):
    result = command("fit", "tiny/wan.yaml", "--trainer.max_steps=1")
    assert result.code == 2
    assert result.message.splitlines() == [
        "error: tiny/wan.yaml stands without -c",
        "  expected: -c before every config file",
        "  to do:    muybridge fit -c tiny/wan.yaml",
    ]
    # A value of an option is not one.
    assert "without -c" not in command("fit", "--data.videos", "list.yaml").message
    assert not loads


@pytest.mark.parametrize("named", ["Mine", "my_broken.Mine", "my_imports.Other"])
def test_a_syntax_error_in_the_users_file_is_named_with_its_line(
    named: str, command: Command, tmp_path: Path, loads: list[Backbone]
):
    (tmp_path / "my_broken.py").write_text(
        "from muybridge.losses import Loss\n\nclass Mine(Loss):\n    def forward(self:\n"
    )
    (tmp_path / "my_imports.py").write_text(
        "from muybridge.losses import Loss\nimport my_broken\n\nclass Other(Loss):\n    pass\n"
    )
    (tmp_path / "broken.yaml").write_text(LOSSES % named)
    result = command("fit", "-c", "tiny/wan.yaml", "-c", "broken.yaml")
    assert result.code == 2
    assert f"{tmp_path / 'my_broken.py'}, line 4: " in result.message
    assert "here:     def forward(self:" in result.message
    assert not loads


def test_debug_keeps_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch):
    from muybridge.errors import UsageError

    with pytest.raises(UsageError):
        command("fit", "--debug", "-c", "nofile.yaml")
    monkeypatch.setenv("MUYBRIDGE_DEBUG", "1")
    with pytest.raises(UsageError):
        command("fti")
    monkeypatch.setenv("MUYBRIDGE_DEBUG", "0")
    assert command("fti").code == 2


def test_a_mistake_inside_the_users_own_class_keeps_its_traceback(
    command: Command, tmp_path: Path, tiny_options: Callable[[str], list[str]]
):
    """Only what is known to be a user's input is shortened; a bug, also in a user's class, must show where it is."""
    (tmp_path / "my_bug.py").write_text(
        "from muybridge.losses import Loss\nclass Buggy(Loss):\n    def forward(self, step):\n        return step.nothing\n"
    )
    (tmp_path / "bug.yaml").write_text(LOSSES % "my_bug.Buggy")
    with pytest.raises(AttributeError, match="nothing"):
        command("fit", *tiny_options("wan"), "-c", "bug.yaml")


def test_a_syntax_error_in_the_users_file_names_its_line(
    command: Command, tmp_path: Path, tiny_options: Callable[[str], list[str]]
):
    (tmp_path / "my_syntax.py").write_text("x = 1\nclass Broken(:\n    pass\n")
    (tmp_path / "bad.yaml").write_text(LOSSES % "my_syntax.Broken")
    result = command("fit", *tiny_options("wan"), "-c", "bad.yaml")
    assert result.code == 2
    assert re.search(r"my_syntax\.py, line 2", result.message)


def test_an_error_from_a_data_worker_is_as_short(
    command: Command, tmp_path: Path, tiny_options: Callable[[str], list[str]]
):
    """A worker process sends its error home as the text of a traceback."""
    (tmp_path / "my_data.py").write_text(
        "from datamodules.base import ResumableData\n"
        "from muybridge.errors import UsageError\n"
        "class Broken:\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): raise UsageError('clip 7 is broken', 'a whole file', 'fetch it again')\n"
        "class BrokenData(ResumableData):\n"
        "    def __init__(self): super().__init__(num_workers=1)\n"
        "    def train_dataset(self): return Broken()\n"
    )
    others = [o for o in tiny_options("wan") if not o.startswith("--data")]
    result = command("fit", *others, "--data=my_data.BrokenData")
    assert result.code == 2
    assert result.message == "error: clip 7 is broken\n  expected: a whole file\n  to do:    fetch it again"
