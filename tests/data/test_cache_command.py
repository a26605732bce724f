"""From videos through ``muybridge cache`` to training: same losses, whatever stopped the encoding on its way."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
from support.jobs import finetuning, trainer
from support.ranks import run_ranks

from datamodules.clips import CachedClips
from datamodules.latents import LatentData
from datamodules.video import VideoData
from muybridge.backbones import Pretrained
from muybridge.cli import main
from muybridge.data.buckets import Bucket
from muybridge.data.cache import Cache
from muybridge.data.encoding import Material
from muybridge.errors import UsageError
from muybridge.toy_clips import write_clips

Tiny = Callable[[str], Path]
ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
trainer: {{accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false, max_epochs: 1}}
model:
  class_path: Finetuning
  init_args:
    backbone: {{class_path: Pretrained, init_args: {{path: {model}, max_text_length: 16}}}}
    losses: [{{class_path: Denoising}}]
data:
  class_path: VideoData
  init_args: {{videos: {videos}, frames: 5, height: 16, width: 16, batch_size: 2, num_workers: 0}}
"""


class Losses(pl.Callback):
    """Remembers the ids and the loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[bool]]] = []
        self.losses: list[float] = []
        self.validation: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        present = batch.present.tolist() if batch.present is not None else [True] * len(batch)
        self.seen.append((batch.ids, present))
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validation.append(float(trainer.callback_metrics["val/loss"]))


def train(path: Path, root: Path, data: Any, components: tuple[str, ...], **settings: Any) -> Losses:
    """Train for an epoch, with so much caption dropout that the unconditional branch matters."""
    backbone = Pretrained(str(path), max_text_length=16, components=components)
    job, losses = finetuning(path, backbone=backbone, caption_dropout=0.4), Losses()
    trainer(root, max_epochs=1, callbacks=[losses], **settings).fit(job, data)
    assert losses.losses
    if components == ("denoiser",):
        assert backbone._parts == {}
    return losses


WHOLE = ("denoiser", "vae", "text_encoder")


def write_config(folder: Path, model: Path, videos: Path) -> str:
    file = folder / "c.yaml"
    file.write_text(CONFIG.format(model=model, videos=videos), encoding="utf-8")
    return str(file)


def copies(folder: Path, count: int) -> Path:
    """One clip under many names, each with its own caption."""
    [clip] = write_clips(folder, 1, frames=9, height=16, width=16)
    for i in range(1, count):
        shutil.copy(clip, folder / f"clip-{i:03d}.mp4")
        (folder / f"clip-{i:03d}.txt").write_text(f"copy number {i}", encoding="utf-8")
    return folder


def rows(column: Path) -> list[str]:
    """Ids in all parts of an index, doubled ones too."""
    return [name for part in column.glob("[0-9]*.parquet") for name in pq.read_table(part)["id"].to_pylist()]


def equal(first: Path, second: Path) -> bool:
    """Whether two caches hold the same rows, bit by bit."""
    a, b = Cache(first), Cache(second)
    assert a.ids == b.ids
    same = [torch.equal(a.clips([i]).latents, b.clips([i]).latents) for i in a.ids]
    same += [torch.equal(a.text(c).text, b.text(c).text) for c in a.captions]
    return all(same)


# -- the same training ---------------------------------------------------------------------------------------------


def test_losses_from_a_cache_are_those_from_the_videos(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """With a clip that can't be read, two shapes of clips, a selection, and validation clips of the same names."""
    model = tiny_checkpoint("wan")
    write_clips(tmp_path / "videos", 6, frames=9, height=32, width=16)
    for path in write_clips(tmp_path / "wide", 5, frames=9, height=16, width=32):
        for file in (path, path.with_suffix(".txt")):
            shutil.move(file, tmp_path / "videos" / f"wide-{file.name}")
    broken = tmp_path / "videos" / "clip-002.mp4"
    broken.write_bytes(broken.read_bytes()[:700])
    write_clips(tmp_path / "validation", 3, frames=9, height=16, width=32)
    (tmp_path / "chosen.txt").write_text(
        "".join(f"{p.stem}\n" for p in (tmp_path / "videos").glob("*.mp4") if p.stem != "clip-005"), encoding="utf-8"
    )
    options: dict[str, Any] = dict(
        videos=str(tmp_path / "videos"),
        validation=str(tmp_path / "validation"),
        buckets=[Bucket(5, 16, 32), Bucket(5, 32, 16)],
        selection=str(tmp_path / "chosen.txt"),
        repeats=2,
        batch_size=2,
        num_workers=0,
        max_bad_fraction=0.5,
    )
    from_video = train(model, tmp_path, VideoData(**options), WHOLE)
    cached = VideoData(**options)
    encode(model, cached, tmp_path / "cache")
    data = VideoData(**options, cache=str(tmp_path / "cache"))
    from_cache = train(model, tmp_path, data, ("denoiser",))
    assert isinstance(data.train_dataset(), CachedClips)
    assert from_cache.seen == from_video.seen
    assert len(from_cache.losses) == 9
    torch.testing.assert_close(from_cache.losses, from_video.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(from_cache.validation, from_video.validation, rtol=1e-5, atol=1e-6)
    # The videos may be gone where the cache is enough.
    latents = LatentData(
        str(tmp_path / "cache"), str(tmp_path / "cache" / "validation"), repeats=2, batch_size=2, num_workers=1
    )
    shutil.rmtree(tmp_path / "videos")
    alone = train(model, tmp_path, latents, ("denoiser",))
    assert alone.seen == from_video.seen
    assert alone.losses == from_cache.losses
    assert alone.validation == from_cache.validation


def encode(model: Path, data: VideoData, out: Path) -> None:
    """The command's own work on a datamodule that has been made already."""
    from muybridge.cli.verbs.cache import Job
    from muybridge.cli.verbs.cache import encode as run
    from muybridge.data.cache import Share

    backbone = Pretrained(str(model), max_text_length=16)
    run(Job(backbone, data, [], [], str(out), "float32", 512.0, "cpu"), Share(), 0)


def test_an_unreadable_clip_keeps_its_slot(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model, videos = tiny_checkpoint("wan"), tmp_path / "videos"
    write_clips(videos, 6, frames=9, height=16, width=16)
    (videos / "clip-002.mp4").write_bytes((videos / "clip-002.mp4").read_bytes()[:700])
    options: dict[str, Any] = dict(videos=str(videos), frames=5, height=16, width=16, batch_size=2, num_workers=0)
    options |= dict(max_bad_fraction=0.2)
    from_video = train(model, tmp_path, VideoData(**options), WHOLE)
    encode(model, VideoData(**options), tmp_path / "cache")
    from_cache = train(model, tmp_path, VideoData(**options, cache=str(tmp_path / "cache")), ("denoiser",))
    assert sum(not there for _, present in from_cache.seen for there in present) == 1
    assert from_cache.seen == from_video.seen
    torch.testing.assert_close(from_cache.losses, from_video.losses, rtol=1e-5, atol=1e-6)
    [noted] = (tmp_path / "cache" / "bad_videos.jsonl").read_text(encoding="utf-8").splitlines()
    assert "clip-002" in noted
    assert list(Cache(tmp_path / "cache").bad) == ["clip-002"]
    encode(model, VideoData(**options), tmp_path / "cache")
    assert len((tmp_path / "cache" / "bad_videos.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    with pytest.raises(UsageError, match="1 of 6 clips skipped"):
        encode(model, VideoData(**{**options, "max_bad_fraction": 0.1}), tmp_path / "cache")
    with pytest.raises(UsageError, match="clip-002 can't be used"):
        encode(model, VideoData(**options, on_error="raise"), tmp_path / "cache")


def test_mixed_precision_leaves_the_encoders_alone(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Under bf16-mixed the VAE still runs in its own dtype: otherwise the cache would hold better latents than training sees."""
    model = tiny_checkpoint("wan")
    write_clips(tmp_path / "videos", 2, frames=9, height=16, width=16)
    options: dict[str, Any] = dict(videos=str(tmp_path / "videos"), frames=5, height=16, width=16, num_workers=0)
    from_video = train(model, tmp_path, VideoData(**options), WHOLE, precision="bf16-mixed")
    encode(model, VideoData(**options), tmp_path / "cache")
    data = VideoData(**options, cache=str(tmp_path / "cache"))
    from_cache = train(model, tmp_path, data, ("denoiser",), precision="bf16-mixed")
    torch.testing.assert_close(from_cache.losses, from_video.losses, rtol=1e-6, atol=0)


def test_motion_weights_reach_the_batch(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from muybridge.data.cache import open_column
    from muybridge.diffusion.draws import keyed_noise

    model = tiny_checkpoint("wan")
    write_clips(tmp_path / "videos", 3, frames=9, height=16, width=16)
    options: dict[str, Any] = dict(frames=5, height=16, width=16, num_workers=0)
    encode(model, VideoData(str(tmp_path / "videos"), **options), tmp_path / "cache")
    data = LatentData(str(tmp_path / "cache"), motion_weights=True, batch_size=3, num_workers=0)
    with pytest.raises(UsageError, match="holds latents, text"):
        data.setup("fit")
    with open_column(tmp_path / "cache", "weights", {"tracker": "none"}) as writer:
        for name in ("clip-000", "clip-002"):
            writer.add(name, {"weights": keyed_noise((1, 2, 2, 2), 0, name)})
    with pytest.raises(UsageError, match="no motion weights for 1 of 3 clips, such as clip-001"):
        LatentData(str(tmp_path / "cache"), motion_weights=True).setup("fit")
    (tmp_path / "two.txt").write_text("clip-000\nclip-002\n", encoding="utf-8")
    data = LatentData(
        str(tmp_path / "cache"), selection=str(tmp_path / "two.txt"), motion_weights=True, batch_size=2, num_workers=0
    )
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert torch.equal(batch.weights, torch.stack([keyed_noise((1, 2, 2, 2), 0, name) for name in batch.ids]))


def test_weighted_clips_come_in_proportion(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """4 clips with weights 0, 1, 2, 5 over 50 repeats; counts stay within 4 standard deviations."""
    write_clips(tmp_path / "videos", 4, frames=9, height=16, width=16)
    encode(
        tiny_checkpoint("wan"),
        VideoData(str(tmp_path / "videos"), frames=5, height=16, width=16, num_workers=0),
        tmp_path / "cache",
    )
    weights = {"clip-000": 0, "clip-001": 1, "clip-002": 2, "clip-003": 5}
    file = tmp_path / "w.csv"
    file.write_text("id,weight\n" + "".join(f"{i},{w}\n" for i, w in weights.items()), encoding="utf-8")
    data = LatentData(str(tmp_path / "cache"), sampling_weights=str(file), repeats=50, batch_size=10, num_workers=0)
    data.setup("fit")
    ids = [name for batch in data.train_dataloader() for name in batch.ids]
    assert len(ids) == 200
    for name, w in weights.items():
        share = w / 8
        assert abs(ids.count(name) - 200 * share) <= 4 * (200 * share * (1 - share)) ** 0.5


def test_a_cache_under_other_settings_is_refused_by_the_command(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "videos", 3, frames=9, height=32, width=32)
    config = write_config(tmp_path, tiny_checkpoint("wan"), tmp_path / "videos")
    assert main(["cache", "-c", config, "--out", "cache"]) == 0
    fit = ["fit", "-c", config, "--data.cache=cache", "--model.backbone.components=[denoiser]"]
    assert main(fit) == 0
    for options, words in {
        ("--data.fps=4",): "fps is None there and 4.0 here",
        ("--data.framing=letterbox",): "framing is 'crop' there and 'letterbox' here",
        ("--data.width=32",): "clips is ['5x16x16'] there and ['5x16x32'] here",
        ("--data.window=all",): "mode is 'centre' there and 'all' here",
        ("--data.decoder=av",): "decoder is 'auto' there and 'av' here",
        ("--model.backbone.vae_dtype=bfloat16",): "vae_dtype is 'float32' there and 'bfloat16' here",
        ("--model.backbone.max_text_length=32",): "max_text_length is 16 there and 32 here",
    }.items():
        capsys.readouterr()
        assert main([*fit, *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["cache", "-c", config, "--out", "cache", "--data.fps=4"]) == 2
    assert "fps is None there and 4.0 here" in capsys.readouterr().err
    assert main(["cache", "-c", config, "--out", "cache", "--dtype=bfloat16"]) == 2
    assert "dtype is 'float32' there and 'bfloat16' here" in capsys.readouterr().err
    assert main(["cache", "-c", config, "--out", "half", "--dtype=bfloat16"]) == 0
    whole, half = Cache("cache").clips(["clip-000"]).latents, Cache("half").clips(["clip-000"]).latents
    assert torch.equal(half, whole.bfloat16().float())
    assert main(["cache", "-c", config, "--out", "other", "--data.window=random"]) == 2
    assert "window is random" in capsys.readouterr().err
    write_clips(tmp_path / "videos", 4, frames=9, height=32, width=32)
    assert main(fit) == 2
    assert "lacks 1 of 4 clips, such as clip-003" in capsys.readouterr().err


def test_a_crop_of_a_manifest_that_changed_is_refused_until_it_is_cached(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Afterwards the cache holds what training from the video would see, bit by bit."""
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "videos", 3, frames=9, height=64, width=64)
    config = write_config(tmp_path, tiny_checkpoint("wan"), tmp_path / "list.json")

    def listed(crop: list[int]) -> None:
        entries: list[dict[str, Any]] = [{"path": f"videos/clip-{i:03d}.mp4", "cap": [f"clip {i}"]} for i in range(3)]
        entries[1]["crop"] = crop
        (tmp_path / "list.json").write_text(json.dumps(entries), encoding="utf-8")

    cache, fit = ["cache", "-c", config, "--out"], ["fit", "-c", config, "--data.cache=cache"]
    listed([0, 32, 0, 32])
    assert main([*cache, "cache"]) == 0
    assert main(fit) == 0
    before = Cache("cache").clips(["videos/clip-001"]).latents
    listed([32, 64, 32, 64])
    capsys.readouterr()
    assert main(fit) == 2
    assert "1 of 3 clips changed since cache was made, such as videos/clip-001 (its crop)" in capsys.readouterr().err
    assert main([*cache, "cache"]) == 0
    assert main(fit) == 0
    assert main([*cache, "fresh"]) == 0
    assert equal(Path("cache"), Path("fresh"))
    assert not torch.equal(Cache("cache").clips(["videos/clip-001"]).latents, before)


# -- stopped, shared -----------------------------------------------------------------------------------------------


def parts(out: Path) -> int:
    return len(list((out / "latents").glob("[0-9]*.parquet")))


def stop_midway(config: str, out: Path, number: int, shard_mib: float, ready: Callable[[], bool]) -> int:
    """Start the command in a process of its own, and send it a signal once there is something to lose."""
    command = [sys.executable, "-m", "muybridge", "cache", "-c", config, "--out", str(out), f"--shard_mib={shard_mib}"]
    # On a busy machine the one that sends the signal goes first, or there is nothing left to stop.
    command = ["nice", "-n", "5", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=out.parent)
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_a_stopped_run_is_gone_on_with_and_nothing_is_lost_or_doubled(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    count, out = 120, tmp_path / "cache"
    config = write_config(tmp_path, tiny_checkpoint("wan"), copies(tmp_path / "videos", count))
    row = 1e-4  # MiB: every shard holds one row
    assert stop_midway(config, out, signal.SIGKILL, row, lambda: parts(out) >= 5) == -signal.SIGKILL
    killed = parts(out)
    assert 5 <= killed < count
    # What it was writing when it was killed is listed nowhere, or whole.
    assert Cache(out).verify() == {}
    # SIGTERM, as a scheduler sends it: rows that are not enough for a shard are written first.
    manifest = (out / "latents" / "manifest.json").stat().st_mtime_ns
    assert stop_midway(config, out, signal.SIGTERM, row * 8, lambda: parts(out) > killed) == 128 + signal.SIGTERM
    done = rows(out / "latents")
    assert killed < len(done) < count
    assert len(set(done)) == len(done)
    assert main(["cache", "-c", config, "--out", str(out)]) == 0
    done = rows(out / "latents")
    assert len(done) == len(set(done)) == count
    assert len(rows(out / "text")) == count + 1
    assert (out / "latents" / "manifest.json").stat().st_mtime_ns == manifest
    assert Cache(out).verify() == {}
    assert main(["cache", "-c", config, "--out", str(tmp_path / "whole")]) == 0
    assert equal(out, tmp_path / "whole")


def cache_as_a_rank(config: str, out: str) -> int:
    return main(["cache", "-c", config, "--out", out])


def test_ranks_and_processes_share_the_work(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Two ranks of a launcher, and two processes of the command's own: every clip and text once, the same bytes."""
    count = 24
    config = write_config(tmp_path, tiny_checkpoint("wan"), copies(tmp_path / "videos", count))
    assert run_ranks(cache_as_a_rank, config, str(tmp_path / "ranks")) == [0, 0]
    assert main(["cache", "-c", config, "--out", str(tmp_path / "devices"), "--devices", "2"]) == 0
    assert main(["cache", "-c", config, "--out", str(tmp_path / "one")]) == 0
    for name in ("ranks", "devices"):
        for column, number in (("latents", count), ("text", count + 1)):
            done = rows(tmp_path / name / column)
            assert len(done) == len(set(done)) == number
            assert parts(tmp_path / name) == 2
        assert equal(tmp_path / name, tmp_path / "one")


def test_a_process_that_fails_is_not_swallowed(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    videos = copies(tmp_path / "videos", 8)
    for i in range(6):
        (videos / f"clip-{i:03d}.mp4").write_bytes(b"")
    config = write_config(tmp_path, tiny_checkpoint("wan"), videos)
    assert main(["cache", "-c", config, "--out", str(tmp_path / "cache"), "--devices", "2"]) == 2
    assert "empty" in (tmp_path / "cache" / "bad_videos.jsonl").read_text(encoding="utf-8")


# -- other datamodules ---------------------------------------------------------------------------------------------


def test_what_has_nothing_to_cache_says_so(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_checkpoint("wan"), tmp_path)
    data = ["--data=LatentData", f"--data.path={tmp_path}"]
    assert main(["cache", "-c", config, *data, "--out", str(tmp_path / "cache")]) == 2
    assert "LatentData has nothing to cache" in capsys.readouterr().err


def test_the_material_of_videos_is_each_clip_once(tmp_path: Path) -> None:
    write_clips(tmp_path, 3, frames=9, height=16, width=16)
    data = VideoData(str(tmp_path), frames=5, height=16, width=16, repeats=7)
    data.setup("fit")
    material: Material = data.to_cache()
    assert material.clips is not None
    assert [clip.id for clip in material.clips.clips] == ["clip-000", "clip-001", "clip-002"]


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_about_caches_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "caches.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M)
    commands = [line for kind, text in blocks if not kind for line in text.splitlines() if line.startswith("muybridge")]
    assert len(commands) == 3
    for command in commands:
        short = ["--trainer.max_steps=4"] if " fit " in command else []
        assert main([*shlex.split(command)[1:], *short]) == 0, command
    names: dict[str, Any] = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, names)
    assert Cache("runs/tiny/cache").weights.read("clip-000")["weights"].shape == (1, 3, 4, 4)
    assert pq.read_table("best.parquet")["weight"].to_pylist() == [4, 3, 2, 1]
    (tmp_path / "latents.yaml").write_text(next(text for kind, text in blocks if kind == "yaml"), encoding="utf-8")
    short = ["--trainer.max_steps=2", "--model.backbone.components=[denoiser]", "--data.motion_weights=true"]
    selection = ["--data.selection=best.parquet"]
    assert main(["fit", "-c", "tiny/wan.yaml", "-c", "latents.yaml", *short, *selection]) == 2
    short[-1] = "--data.motion_weights=false"
    assert main(["fit", "-c", "tiny/wan.yaml", "-c", "latents.yaml", *short, *selection]) == 0
