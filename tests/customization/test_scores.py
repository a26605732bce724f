"""Scores of how much a clip is like words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.denoising import open_tiny
from torch import Tensor

from muybridge.customization.scores import ClipAlignment, ModelAlignment, ReaderAlignment, make_alignment
from muybridge.errors import UsageError
from muybridge.proving_ground import join_caption, look_of, split_caption
from muybridge.proving_ground.captions import subject_words
from muybridge.proving_ground.render import render
from muybridge.proving_ground.scene import draw_scene
from muybridge.proving_ground.small import SMALL
from muybridge.video import to_frames, to_pixels

Tiny = Callable[[str], Path]


def test_the_model_prefers_what_it_predicts(tiny_checkpoint: Tiny) -> None:
    """With a network that is perfect under one caption and wrong by a constant under the other, the score is known."""
    backbone = open_tiny(tiny_checkpoint("wan"))
    alignment = ModelAlignment(backbone, times=(400.0, 800.0))
    latents = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    texts = {c: backbone.encode_text([c.replace(" | ", " ")]) for c in ("a cat | runs", "a dog | runs")}
    marked = {c: replace(t, text=torch.full_like(t.text, 0.0 if "cat" in c else 0.5)) for c, t in texts.items()}
    alignment._text = dict(marked)

    def denoise(noisy: Tensor, t: Tensor, text: object) -> Tensor:
        # Flow: v = (z - x)/σ exactly, and off by what the text holds.
        exact = (noisy - latents) / (t.view(-1, 1, 1, 1, 1) / 1000.0)
        return exact + 2.0 * text.text.mean() + 1.0  # type: ignore[attr-defined]

    backbone.denoise = denoise  # type: ignore[method-assign]
    # Off by 2 under the source and by 1 under the target: (4 - 1)/4.
    found = alignment.score(latents, torch.zeros(1), "a cat | runs", "a dog | runs")
    assert found == pytest.approx(0.75, abs=1e-4)
    assert alignment.score(latents, torch.zeros(1), "a dog | runs", "a dog | runs") == 0.0


def test_the_model_scores_a_real_network(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("unet3d"))
    alignment = make_alignment("model", backbone, None, keep_bar=False)
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    there = alignment.score(latents, torch.zeros(1), "a cat | runs", "a dog | runs")
    assert there != 0.0
    assert alignment.score(latents, torch.zeros(1), "a cat | runs", "a dog | runs") == there


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Tiny) -> Path:
    """A tiny CLIP of the real classes, with the tokenizer of a tiny pipeline."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("animatediff") / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **small)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **small)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_is_the_mean_cosine_over_frames(clip_model: Path) -> None:
    alignment = ClipAlignment(str(clip_model))
    pixels = torch.rand(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = alignment.score(torch.zeros(1), pixels, "a cat | runs", "")
    single = [alignment.score(torch.zeros(1), pixels[:, :, i : i + 1], "a cat | runs", "") for i in range(3)]
    assert whole == pytest.approx(sum(single) / 3, abs=1e-4)
    # CLIP's own logits are these cosines times its temperature.
    model = alignment.model
    images = alignment.processor(images=list(to_frames(pixels[0])), return_tensors="pt")
    with torch.no_grad():
        logits = model(**alignment.tokenizer(["a cat runs"], return_tensors="pt"), **images).logits_per_image
    assert whole == pytest.approx(100.0 * float((logits / model.logit_scale.exp()).mean()), abs=1e-3)


def test_the_reader_counts_what_the_captions_differ_in() -> None:
    scene = draw_scene(SMALL, 0, 2)
    pixels = to_pixels(render(scene))[None]
    subject, motion = split_caption(scene.caption)
    shape, colour = look_of(scene.caption)
    other_colour = next(c for c in SMALL.colours if c != colour)
    other_shape = next(s for s in SMALL.shapes if s != shape)
    alignment = ReaderAlignment()

    def score(target: str, source: str) -> float:
        return alignment.score(torch.zeros(1), pixels, target, source)

    assert score(scene.caption, join_caption(subject_words(other_shape, other_colour), motion)) == 1.0
    assert score(join_caption(subject_words(other_shape, other_colour), motion), scene.caption) == 0.0
    # The colour is still the old one, and the shape and the motion are no news.
    half = join_caption(subject_words(shape, other_colour), motion)
    assert score(half, scene.caption) == 0.0
    assert score(half, join_caption(subject_words(other_shape, colour), motion)) == 0.5
    assert score(join_caption(subject, "bounces up and down"), scene.caption) == 0.0, "it slides"


def test_what_is_missing_is_said(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match="no CLIP model at"):
        make_alignment("clip", backbone, str(tmp_path), False)
    with pytest.raises(UsageError, match="--clip_model DIR"):
        make_alignment("clip", backbone, None, False)
    with pytest.raises(UsageError, match="one of model, clip, reader"):
        make_alignment("dino", backbone, None, False)
