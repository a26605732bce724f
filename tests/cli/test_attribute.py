"""From clips to a selection that is trained on, by the commands of the page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from muybridge.attribution.influence import influence
from muybridge.attribution.selecting import select
from muybridge.attribution.store import InfluenceStore, StoreWriter
from muybridge.data.cache import Cache
from muybridge.data.selection import read_selection
from muybridge.toy_clips import write_clips

from .conftest import ROOT, Command, kill_once_saved

CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_steps: 1
  callbacks:
    - class_path: GradientCapture
      init_args:
        out: store
        projection: {{class_path: CountSketchProjection, init_args: {{dim: 128}}}}
        times: [{{value: 500}}]
model:
  class_path: Finetuning
  init_args:
    backbone: {{class_path: Pretrained, init_args: {{path: {model}, max_text_length: 16}}}}
    losses: [{{class_path: Denoising}}]
data:
  class_path: VideoData
  init_args:
    videos: {videos}
    validation: {queries}
    frames: 5
    height: 16
    width: 16
    batch_size: 2
    num_workers: 0
"""


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> str:
    write_clips(tmp_path / "clips", 5, frames=5, height=16, width=16)
    write_clips(tmp_path / "queries", 2, frames=5, height=16, width=16)
    file = tmp_path / "job.yaml"
    file.write_text(
        CONFIG.format(model=tiny_checkpoint("wan"), videos=tmp_path / "clips", queries=tmp_path / "queries")
    )
    return str(file)


def test_from_clips_to_a_selection(config: str, command: Command, tmp_path: Path) -> None:
    floor = "--weights.floor=0.05"
    cached = command("cache", "-c", config, "--out=cache", "--motion=DIS", floor)
    assert cached.code == 0, cached.err
    assert "5 motion weights" in cached.out
    held = Cache(tmp_path / "cache").clips(["clip-000"], weights=True)
    assert held.weights is not None
    assert held.latents is not None
    assert held.weights.shape == (1, 1, *held.latents.shape[2:])
    assert min(Cache(tmp_path / "cache").motion().values()) > 0

    data = ["--data.cache=cache", "--data.motion_weights=true", "--model.backbone.components=[denoiser]"]
    first = command("attribute", "-c", config, *data)
    assert first.code == 0, first.err
    assert "store: 7 ok" in first.out
    store = InfluenceStore(tmp_path / "store")
    assert store.ids("train") == [f"clip-{i:03d}" for i in range(5)]
    assert store.ids("query") == ["clip-000", "clip-001"]
    assert store.manifest["weights"]["estimator"] == "DIS"
    assert store.manifest["loss"] == {"class": "MotionWeightedDenoising", "weights": "motion", "per_frame": True}

    videos = ["--videos=clips", "--query_videos=queries"]
    chosen = command("select", "--store=store", "--top=40%", *videos)
    assert chosen.code == 0, chosen.err
    selection = read_selection(tmp_path / "selection.parquet")
    assert len(selection.ids) == 2
    assert selection.meta["store"] == "store"
    # The queries are clips 0 and 1 themselves, and nothing helps a clip more than itself.
    assert set(selection.ids) == {"clip-000", "clip-001"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 + 2 * (1 + 5 + 5)
    linked = command(
        "select", "--store=store", "--query=[clip-001,clip-000]", "--embed_mib=0", "--out=l.parquet", *videos
    )
    assert linked.code == 0, linked.err
    assert read_selection(tmp_path / "l.parquet").meta["query"] == ["clip-001", "clip-000"]
    page = (tmp_path / "report.html").read_text()
    assert 'src="clips/clip-000.mp4"' in page
    assert 'src="queries/clip-000.mp4"' in page
    controls = [("motion", []), ("similarity", ["--query_cache=cache/validation"])]
    for by, more in controls:
        done = command("select", "--store=store", "--top=2", f"--by={by}", "--cache=cache", "--out=c.parquet", *more)
        assert done.code == 0, done.err
        assert len(pq.read_table(tmp_path / "c.parquet")) == 2


def test_a_killed_pass_goes_on_and_ends_as_the_one_that_was_not(config: str, command: Command, tmp_path: Path) -> None:
    write_clips(tmp_path / "queries", 20, frames=5, height=16, width=16)
    plain = "--trainer.callbacks.loss=Denoising"
    attribute = ["attribute", "-c", config, plain]
    kill_once_saved(tmp_path / "store", *attribute, cwd=tmp_path, saved="part-*.parquet")
    killed = InfluenceStore(tmp_path / "store")
    assert len(killed.ids("train")) == 5, "what was written is there"
    assert len(killed.ids("query")) < 20, "it was killed before its end"
    there = {file.name: file.read_bytes() for file in killed.files}
    for out in ("store", "whole"):
        result = command(*attribute, f"--trainer.callbacks.out={out}")
        assert result.code == 0, result.err
    gone_on, whole = InfluenceStore(tmp_path / "store"), InfluenceStore(tmp_path / "whole")
    assert {name: (tmp_path / "store" / name).read_bytes() for name in there} == there, "nothing is written again"
    for part, count in (("train", 5), ("query", 20)):
        vectors = [
            {name: vector for block in one.blocks(part) for name, vector in zip(block.ids, block.vectors, strict=True)}
            for one in (gone_on, whole)
        ]
        assert len(vectors[0]) == count
        assert all(np.array_equal(vectors[0][name], vectors[1][name]) for name in vectors[1])
        assert gone_on.ids(part) == whole.ids(part)


@pytest.fixture
def store(tmp_path: Path) -> InfluenceStore:
    """Thirty clips and four queries, of vectors by chance."""
    generator = torch.Generator().manual_seed(0)
    manifest = {"projection": {"dim": 8}}
    for folder, parts in (("store", ("train", "query")), ("other", ("query",))):
        with StoreWriter(tmp_path / folder, manifest) as writer:
            for part in parts:
                for i in range(30 if part == "train" else 4):
                    vector = torch.randn(8, generator=generator) * (1 + i)
                    writer.add(f"{folder}-{part}-{i:02d}", part, 0, 500.0, vector)  # type: ignore[arg-type]
    return InfluenceStore(tmp_path / "store")


def test_every_way_to_select_is_that_of_its_name(store: InfluenceStore, command: Command, tmp_path: Path) -> None:
    cosine, other = influence(store), influence(store, InfluenceStore(tmp_path / "other"))
    wanted = {
        "": select(cosine, 9),
        "--by=mean": select(cosine, 9, how="mean"),
        "--by=random --seed=3": select(cosine, 9, how="random", seed=3),
        "--percentile=50": select(cosine, 9, percentile=50.0),
        "--query=store-query-02": select(cosine, 9, query="store-query-02"),
        "--score=dot": select(influence(store, kind="dot"), 9),
        "--centre=true": select(influence(store, centre=True), 9),
        "--score=kernel --damping=0.01": select(influence(store, kind="kernel", damping=0.01), 9),
        "--queries=other": select(other, 9),
        "--drop_harmful=true": select(cosine, 9, drop=True),
    }
    assert len({tuple(names) for names in wanted.values()}) == len(wanted), "they differ, or nothing is told"
    for options, names in wanted.items():
        done = command("select", "--store=store", "--report=", "--top=9", *shlex.split(options))
        assert done.code == 0, done.err
        assert list(read_selection(tmp_path / "selection.parquet").ids) == names, options
    assert command("select", "--store=store", "--report=").code == 0
    assert len(read_selection(tmp_path / "selection.parquet").ids) == 3, "a tenth, where nothing else is said"


@pytest.mark.parametrize("model", ["wan-1.3b", "cogvideox-2b", "latte-1", "modelscope"])
def test_training_on_a_selection_follows_the_published_recipe(model: str, command: Command) -> None:
    files = ["-c", f"finetune/{model}.yaml", "-c", "finetune/selection.yaml"]
    done = command("fit", *files, "--data.videos=clips", "--print_config")
    assert done.code == 0, done.err
    config = yaml.safe_load(done.out)
    model_, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model_["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert model_["optimizer"]["init_args"]["lr"] == 1e-5
    assert model_["learning_rate"]["shape"] == "constant"
    assert model_["adapter"] is None, "all weights of the network"
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (1, -1)
    assert (data["selection"], data["repeats"]) == ("selection.parquet", 50)
    if model == "wan-1.3b":
        sampling = model_["sampling"]
        assert [sampling[k] for k in ("frames", "height", "width", "fps")] == [81, 480, 832, 16]
        assert [data[k] for k in ("frames", "height", "width", "fps")] == [81, 480, 832, 16]


def test_what_can_be_wrong_is_said(config: str, command: Command, tmp_path: Path) -> None:
    assert "is no influence store" in command("select", "--store=nowhere").message
    assert (
        "motion_weights is true, and there is no cache"
        in command("attribute", "-c", config, "--data.motion_weights=true").message
    )
    assert "ends in .parquet" in command("select", "--store=nowhere", "--out=x.txt").message
    check = ["attribution-check", "-c", config, "--trainer.callbacks.loss=MotionWeightedDenoising"]
    check += ["--trainer.callbacks.loss.weights=ones", "--clips=5", "--memory_gib=0.0001"]
    assert re.search(r"full gradients of 5 clips take .* GiB.*\n.*\n.*fewer --clips", command(*check).message)


def test_the_commands_of_the_page_run(command: Command, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("muybridge ")]
    verbs = []
    for line in lines:
        _, *arguments = shlex.split(line)
        verbs.append(arguments[0])
        done = command(*arguments)
        assert done.code == 0, f"{line}\n{done.err}"
    assert verbs == ["tiny", "cache", "attribute", "select", "fit", "attribution-check"]
    assert (tmp_path / "runs/tiny/report.html").is_file()
