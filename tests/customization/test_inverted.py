"""The command that inverts: files say what made them, and are read back only where they fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muybridge.backbones import load
from muybridge.cli import main
from muybridge.customization.inverted import read_inverted
from muybridge.customization.references import list_references, spoken
from muybridge.diffusion import inversion
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]


def test_clips_become_noise_that_leads_back(
    clips: Path, tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_checkpoint("wan"), tmp_path / "inverted"
    command = ["invert", f"--model={model}", f"--videos={clips}", f"--out={out}", "--frames=9", "--height=16"]
    command += ["--width=16", "--steps=6"]
    assert main(command) == 0
    assert "18 network calls each" in capsys.readouterr().out
    backbone = load(str(model))
    found = read_inverted(out / "clip-000.safetensors", backbone)
    about = found.about
    assert (about["steps"], about["refinements"], about["family"], about["clip"]) == (6, 2, "Wan", "clip-000")
    assert "|" not in about["prompt"]
    assert "|" in about["caption"]
    denoise = backbone.guided(backbone.encode_text([about["prompt"]]))
    back = inversion.resample(denoise, found.noise[None], backbone.schedule, 6)
    error = float(inversion.relative_error(back, found.clean[None])[0])
    assert error == pytest.approx(about["round_trip_error"], abs=1e-6)
    assert error < 0.05
    # What is there is kept, and what was made otherwise is refused.
    assert main(command) == 0
    assert "2 of 2 are in" in capsys.readouterr().out
    assert (about["fps"], about["dtype"], Path(about["video"]).name) == (None, "float32", "clip-000.mp4")
    for option, said in (
        ("--steps=7", "made with steps 6"),
        ("--fps=4", "made with fps None"),
        ("--dtype=bfloat16", "made with dtype 'float32'"),
    ):
        assert main([*command, option]) == 2
        assert said in capsys.readouterr().err
    # Without words, as several published methods invert.
    bare = [*command[:3], f"--out={tmp_path / 'bare'}", *command[4:], "--prompt=empty", "--order=midpoint"]
    assert main(bare) == 0
    assert "12 network calls each" in capsys.readouterr().out
    wordless = read_inverted(tmp_path / "bare/clip-000.safetensors", backbone)
    assert (wordless.about["prompt"], wordless.about["order"], wordless.about["refinements"]) == ("", "midpoint", 0)
    assert not torch.equal(wordless.noise, found.noise)
    with pytest.raises(UsageError, match="noise of Wan"):
        read_inverted(out / "clip-000.safetensors", load(str(tiny_checkpoint("latte"))))


@pytest.mark.usefixtures("no_weights")
def test_bad_references_are_refused_before_any_weight_is_read(
    clips: Path, tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"--model={tiny_checkpoint('wan')}"
    small = ["--height=16", "--width=16"]
    for options, said in (
        (["--frames=17", *small], "can't be used"),
        (["--frames=10", *small], "4n"),
        (["--frames=9", "--height=17", "--width=16"], "divisible"),
        (["--frames=9", *small, "--steps=1"], "at least 2"),
        (["--frames=9", *small, "--order=midpoint", "--refinements=1"], "leave refinements out"),
    ):
        assert main(["invert", model, f"--videos={clips}", f"--out={tmp_path / 'x'}", *options]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match="a subject and a motion"):
        list_references(clips / "clip-000.mp4", "a man runs")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"noise": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="was not written by"):
        read_inverted(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no inverted noise"):
        read_inverted(tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="can't be read"):
        read_inverted(tmp_path / "z.safetensors")


def test_the_bar_is_not_spoken() -> None:
    assert spoken("a man | runs") == "a man runs"
    assert spoken("a man | runs", keep_bar=True) == "a man | runs"
