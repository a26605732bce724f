"""One motion from one clip in one command."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from muybridge.backbones import load
from muybridge.backbones.adapters import load_adapter
from muybridge.backbones.base import Backbone
from muybridge.backbones.hunyuan import HunyuanVideo
from muybridge.backbones.ltx import LTX
from muybridge.backbones.unet3d import UNet3D
from muybridge.cli import configs_dir, devices, main
from muybridge.cli.verbs.customize import EPSILON, RECIPES
from muybridge.customization.report import read_cells, write_cells
from muybridge.customization.tau import KNOWN
from muybridge.registry import LOSSES
from muybridge.toy_clips import write_clips
from muybridge.video import frame_count, frame_rate

Tiny = Callable[[str], Path]
SMALL = ["--frames=4", "--height=32", "--width=32", "--steps=2"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    return write_clips(folder, 1, frames=9, height=32, width=32)[0]


def test_from_a_clip_to_videos_of_a_new_subject(
    clip: Path, tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["customize", f"--model={tiny_checkpoint('unet3d')}", f"--reference={clip}", f"--out={out}", *SMALL]
    command += ["--caption=a disc | moves right", "--prompt=a robot | moves right", "--updates=3", "--beta=0.3"]
    assert main(command) == 0
    said, progress = capsys.readouterr()
    assert "sampling steps" in progress
    assert "the adapter acts from time 700 on" in said, "the family's published boundary"
    videos = sorted(p.name for p in (out / "videos").glob("*.mp4"))
    assert videos == [
        "0000-a-robot-moves-right-0-base.mp4",
        "0000-a-robot-moves-right-0-customized.mp4",
        "reference.mp4",
    ]
    assert all(frame_count(out / "videos" / name) == 4 for name in videos)
    assert (out / "sheet.png").is_file()
    backbone = load(str(tiny_checkpoint("unet3d")))
    adapter = load_adapter(backbone, out / "adapter/adapter.safetensors")
    assert (adapter.t_min, adapter.t_max) == (700.0, 1000.0)
    # What it trained with is a config for fit.
    config = yaml.safe_load((out / "customize.yaml").read_text())
    assert config["model"]["class_path"] == "MotionCustomization"
    assert main(["fit", "-c", str(out / "customize.yaml"), "--print_config"]) == 0
    # A second run trains nothing, and other settings do not take the place of these.
    capsys.readouterr()
    assert main(command) == 0
    assert "adapter already" in capsys.readouterr().out
    assert main([*command, "--rank=8"]) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--caption=a disc moves right"], "a subject and a motion"),
        (["--prompt=a robot"], "a subject and a motion"),
        (["--prompt=a disc | moves right"], "another subject than"),
        (["--tau=1200"], "0 to 1000"),
        (["--tau=999.5"], "below 999"),
        (["--frames=16"], "can't be used"),
        (["--updates=0"], "1 or more"),
        (["--steps=0"], "1 or more"),
        (["--steps=1", "--beta=0.5"], "at least 2"),
        (["--beta=1.5"], "from 0 (fresh noise)"),
        (["--rank=0"], "rank is 0"),
        (["--projections=[]"], "some of q, k, v, o"),
        (["--from_probe=nowhere"], "no result of a probe"),
        (["--device=cuda:7"], "can't be used"),
        (["--reference=nowhere.mp4"], "nowhere.mp4"),
    ],
)
def test_what_cannot_work_is_refused_before_any_weight_is_read(
    options: list[str],
    said: str,
    clip: Path,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loads: list[Backbone],
) -> None:
    command = ["customize", f"--model={tiny_checkpoint('unet3d')}", f"--reference={clip}", f"--out={tmp_path / 'x'}"]
    command += [*SMALL, "--caption=a disc | moves right", "--prompt=a robot | moves right", *options]
    assert main(command) == 2
    assert said in capsys.readouterr().err
    assert not loads
    assert not (tmp_path / "x").exists()


def test_one_model_is_held_at_a_time(
    clip: Path, tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, its export and the videos each open the model, and what came before is let go."""
    held, open_model = [], devices.open_model

    def note(*arguments: Any) -> Backbone:
        gc.collect()
        held.append([b for b in gc.get_objects() if type(b) is UNet3D and b.networks and b.checkpoint.given == mine])
        return open_model(*arguments)

    mine = str(tmp_path / "unet3d")
    shutil.copytree(tiny_checkpoint("unet3d"), mine)
    monkeypatch.setattr(devices, "open_model", note)
    command = ["customize", f"--model={mine}", f"--reference={clip}", f"--out={tmp_path / 'out'}", *SMALL]
    command += ["--caption=a disc | moves right", "--prompt=a robot | moves right", "--updates=1", "--compare=false"]
    assert main(command) == 0
    assert held == [[]]


def test_ltx_is_told_how_fast_the_reference_runs(
    clip: Path, tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in videos; its own default is 25 frames a second."""
    rates, forward = [], LTX._forward

    def note(self: LTX, *arguments: Tensor) -> Tensor:
        rates.append(self.frame_rate)
        return forward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LTX, "_forward", note)
    command = ["customize", f"--model={tiny_checkpoint('ltx')}", f"--reference={clip}", f"--out={tmp_path / 'out'}"]
    command += ["--frames=9", "--height=32", "--width=32", "--steps=2", "--updates=2", "--tau=700", "--compare=false"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frame_rate")
        assert main([*command, "--caption=a disc | moves right", "--prompt=a robot | moves right"]) == 0
    assert set(rates) == {frame_rate(clip)}
    assert len(rates) == 2 + 2 * 2, "two updates, two guided steps"
    config = yaml.safe_load((tmp_path / "out/customize.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["init_args"]["frame_rate"] == frame_rate(clip) != 25.0
    with pytest.warns(UserWarning, match="sampling.fps is 25 and the backbone's frame_rate"):
        main(["fit", "-c", str(tmp_path / "out/customize.yaml"), "--model.sampling.fps=25", "--trainer.max_steps=1"])


def test_hunyuan_s_usual_guidance_is_the_embedded_one(
    clip: Path, tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline's guidance_scale of 6 costs one call a step; the one of two calls is off unless it is asked for."""
    calls, forward = [], HunyuanVideo._forward

    def note(self: HunyuanVideo, *arguments: Tensor) -> Tensor:
        calls.append(self.embedded_guidance)
        return forward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(HunyuanVideo, "_forward", note)
    command = ["customize", f"--model={tiny_checkpoint('hunyuan')}", f"--reference={clip}", f"--out={tmp_path / 'out'}"]
    command += ["--frames=9", "--height=32", "--width=32", "--steps=3", "--updates=2", "--tau=700", "--compare=false"]
    assert main([*command, "--caption=a disc | moves right", "--prompt=a robot | moves right"]) == 0
    assert calls == [6.0] * (2 + 3)


def test_where_nothing_is_published_the_reference_is_probed(
    clip: Path, tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of random weights parts nothing, and the command says so rather than guess; a boundary that is found is taken."""
    out = tmp_path / "out"
    command = ["customize", f"--model={tiny_checkpoint('wan')}", f"--reference={clip}", f"--out={out}"]
    command += ["--frames=5", "--height=16", "--width=16", "--steps=4", "--updates=1"]
    command += ["--caption=a disc | moves right", "--prompt=a robot | moves right", "--compare=false"]
    cells = out / "probe/cells/clip-000.5f.subject.csv"
    assert main(command) == 2
    caught = capsys.readouterr()
    assert "a probe of the reference" in caught.out
    assert "found no boundary" in caught.err
    assert not (out / "adapter").exists()
    # What it would have measured of a model whose first half of steps settles the motion and whose second half the look.
    made = read_cells(cells)
    assert {cell.target for cell in made} == {"a robot | moves right"}
    parted = [
        replace(
            cell,
            alignment=float(len({2, 3} & set(range(cell.start, cell.end)))),
            similarity=1.0 - 0.4 * len({0, 1} & set(range(cell.start, cell.end))),
        )
        for cell in made
    ]
    write_cells(cells, parted)
    assert main(command) == 0
    tau = next(cell.t_start for cell in made if cell.start == 2)
    assert f"the adapter acts from time {tau:g} on" in capsys.readouterr().out
    adapter = load_adapter(load(str(tiny_checkpoint("wan"))), out / "adapter/adapter.safetensors")
    assert adapter.t_min == pytest.approx(tau)
    assert len(list((out / "videos").glob("*.mp4"))) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_losses_that_there_are(recipe: str) -> None:
    assert set(RECIPES[recipe]) <= set(LOSSES)


def test_shipped_configs_have_the_published_numbers() -> None:
    """Rank 4 on value and output, from the family's published boundary on, or from a probe's where there is none."""
    shipped = {file.stem: yaml.safe_load(file.read_text()) for file in (configs_dir() / "customize").glob("*.yaml")}
    matching = shipped.pop("matching")["model"]["init_args"]
    assert matching["losses"][0]["class_path"] == "MotionFeatureMatching"
    assert matching["optimizer"]["init_args"]["eps"] == EPSILON["matching"]["eps"]
    found = {}
    for name, config in shipped.items():
        settings = config["model"]["init_args"]
        assert settings["adapter"] == {"rank": 4, "projections": ["v", "o"]}
        found[name] = settings["tau"]
    known = {name: {"value": KNOWN[family].tau} for name, family in PUBLISHED.items()}
    assert found == {**known, "wan-1.3b": {"from_probe": "runs/probe/wan-1.3b"}}


PUBLISHED = {"modelscope": "UNet3D", "latte-1": "Latte", "cogvideox-2b": "CogVideoX"}
