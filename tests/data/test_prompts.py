"""Prompts from files, sampled and trained on, with and without a text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from support.jobs import finetuning, trainer

from callbacks.samples import Samples
from datamodules.prompts import PromptData, prompt_id, read_prompts
from muybridge.backbones import Pretrained, load
from muybridge.cli import main
from muybridge.data.cache import Cache
from muybridge.errors import UsageError
from muybridge.video import frame_count

Tiny = Callable[[str], Path]
PROMPTS = ["a dog runs", "zwei Hunde – schnell", "a dog\u2028runs on"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_line_is_a_prompt(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"p.{suffix}"
    lines = PROMPTS if suffix == "txt" else [json.dumps({"prompt": p}, ensure_ascii=False) for p in PROMPTS]
    file.write_bytes(("\r\n".join(lines) + "\n").encode("utf-8-sig"))
    ids, prompts = read_prompts(str(file))
    assert prompts == PROMPTS
    assert ids == ["0000-a-dog-runs", "0001-zwei-hunde-schnell", "0002-a-dog-runs-on"]


def test_lines_may_bring_their_ids_and_captions(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "x/1", "caption": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert read_prompts(str(file)) == (["x/1", "0001-b"], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("p.txt", b"", "holds nothing"),
        ("p.txt", b"a\n\nb\n", "blank lines: 2"),
        ("p.txt", b"a\xff\n", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: KeyError"),
        ("p.jsonl", b"a dog\n", "line 1: JSONDecodeError"),
        ("p.jsonl", b'{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n', "1 ids more than once, such as x"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=word):
        read_prompts(str(tmp_path / name))


def test_prompts_must_be_given_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        PromptData(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="both are given"):
        PromptData("p.txt", ["a"])
    with pytest.raises(UsageError, match="neither is given"):
        PromptData()


def test_every_prompt_comes_once_an_epoch() -> None:
    data = PromptData(texts=[f"prompt {i}" for i in range(7)], batch_size=1)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = ([name for batch in loader for name in batch.ids] for _ in range(2))
    assert sorted(first) == sorted(second) == [prompt_id(i, f"prompt {i}") for i in range(7)]
    assert first != second


CONFIG = """
trainer: {{accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false, default_root_dir: .,
  callbacks: [{{class_path: Samples, init_args: {{dirpath: out, prompts: [a cat sits]}}}}]}}
model:
  class_path: Finetuning
  init_args:
    backbone:
      class_path: Pretrained
      init_args: {{path: {model}, max_text_length: 16, components: [denoiser, vae]}}
    losses: [{{class_path: Denoising}}]
    sampling: {{steps: 2, guidance: 3.0, negative_prompt: blurry, frames: 5, height: 16, width: 16, fps: 8}}
data:
  class_path: PromptData
  init_args: {{prompts: p.jsonl, batch_size: 2}}
"""


def test_cached_prompts_are_sampled_without_a_text_encoder(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command caches what a config will need: its prompts, the negative one and those sampled during training."""
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint("wan")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog runs"}\n{"prompt": "a dog sits"}\n{"prompt": "go"}\n', "utf-8")
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
    assert main(["cache", "-c", "c.yaml", "--out", "cache", "--verify", "true"]) == 0
    said = capsys.readouterr().out
    assert "cache: 6 texts" in said
    assert "every row is as it was written" in said
    cache = Cache("cache")
    assert cache.columns == ["text"]
    assert sorted(cache.negative_prompts) == ["", "blurry"]
    assert cache.has_text("a cat sits")

    # GIFs, because the same frames are not always the same bytes of H.264.
    gif = "--trainer.callbacks.format=gif"
    assert main(["predict", "-c", "c.yaml", gif, "--data.cache=cache"]) == 0
    from_cache = sorted((tmp_path / "out" / "predictions").glob("*.gif"))
    assert [f.stem for f in from_cache] == ["0000-a-dog-runs", "0001-a-dog-sits", "0002-go"]
    assert [frame_count(f) for f in from_cache] == [5, 5, 5]
    whole = "--model.backbone.components=[denoiser,vae,text_encoder]"
    assert main(["predict", "-c", "c.yaml", gif, whole, "--trainer.callbacks.dirpath=encoded"]) == 0
    for file in from_cache:
        assert (tmp_path / "encoded" / "predictions" / file.name).read_bytes() == file.read_bytes()

    capsys.readouterr()
    (tmp_path / "p.jsonl").write_text('{"prompt": "a horse"}\n', "utf-8")
    assert main(["predict", "-c", "c.yaml", "--data.cache=cache"]) == 2
    assert "lacks 1 of 1 texts, such as 'a horse'" in capsys.readouterr().err


def test_sampling_while_training_takes_texts_from_the_cache(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A job that has no text encoder at all samples prompts that the cache of its datamodule holds."""
    from support.caches import make_cache, make_clips

    from datamodules.latents import LatentData

    path = str(tiny_checkpoint("wan"))
    encoders = load(path, components=("vae", "text_encoder"), max_text_length=16)
    cache = make_cache(tmp_path / "cache", encoders, make_clips(tmp_path / "videos"))
    job = finetuning(path, backbone=Pretrained(path, max_text_length=16, components=("denoiser", "vae")))
    samples = Samples(["a dog number 1"], every=1, dirpath=str(tmp_path / "out"))
    run: Trainer = trainer(tmp_path, max_steps=1, callbacks=[samples])
    run.fit(job, LatentData(str(cache), num_workers=0))
    assert (tmp_path / "out" / "samples" / "update-0000001" / "00.mp4").is_file()
    assert torch.equal(job.backbone.unconditional().text, encoders.unconditional().text)
