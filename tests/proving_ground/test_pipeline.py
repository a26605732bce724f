"""The proving ground's own pipeline before training, and the job that trains its autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.backbones import load
from muybridge.cli import main
from muybridge.errors import UsageError
from muybridge.proving_ground import MOTIONS, World, draw_scene
from muybridge.proving_ground.captions import motion_words
from muybridge.proving_ground.pipeline import LENGTH, autoencoder, tokenizer, untrained
from muybridge.proving_ground.stills import as_stills, causal_convolutions, forget_past


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "untrained"
    assert main(["proving-ground", f"--model={out}"]) == 0
    return out


def test_every_caption_is_words_it_knows():
    words = tokenizer()
    captions = {draw_scene(World(static=0.1, backwards=0.3), 0, i).caption for i in range(300)}
    captions |= {
        f"an orange ring | {motion_words(m, {'direction': 1.0, 'axis': 1.0, 'omega': -1.0}, True)}" for m in MOTIONS
    }
    for caption in captions:
        tokens = words(caption).input_ids
        assert words.unk_token_id not in tokens, caption
        assert len(tokens) <= LENGTH


def test_it_is_a_function_of_the_seed():
    one, other, third = untrained(0), untrained(0), untrained(1)
    for part in ("transformer", "vae", "text_encoder"):
        states = [getattr(p, part).state_dict() for p in (one, other, third)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_frame_alone_is_what_the_whole_computation_makes_of_it():
    """Also where the taps into the past hold weights: what they multiply is zero."""
    torch.manual_seed(0)
    vae = autoencoder().eval()
    assert len(causal_convolutions(vae)) > 4
    x = torch.rand(2, 3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = vae.encode(x).latent_dist.mode()
        back = vae.decode(whole, return_dict=False)[0]
        with as_stills(vae):
            torch.testing.assert_close(vae.quant_conv(vae.encoder(_folded(vae, x))).chunk(2, 1)[0], whole)
        after = vae.encode(x).latent_dist.mode()
        assert torch.equal(after, whole)
        assert back.shape == x.shape


def _folded(vae: Any, x: torch.Tensor) -> torch.Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    return patchify(x, vae.config.patch_size)


def test_without_a_past_a_clip_is_its_frames():
    torch.manual_seed(0)
    vae = autoencoder().eval()
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(x).latent_dist.mode()
        forget_past(vae)
        clip = vae.encode(x).latent_dist.mode()
        frames = torch.cat([vae.encode(x[:, :, [i]]).latent_dist.mode() for i in range(5)], 2)
        torch.testing.assert_close(clip, frames, atol=1e-5, rtol=1e-4)
        assert (before - clip).abs().max() > 0.01


def test_it_samples_what_its_diffusers_pipeline_samples(folder: Path):
    """Of a VAE that keeps every frame, WanPipeline makes one frame more than it is asked for."""
    from diffusers import WanPipeline

    backbone = load(str(folder))
    assert backbone.max_text_length == LENGTH
    assert backbone.latent_shape(9, 32, 32) == (8, 9, 8, 8)
    noise = torch.randn(1, 8, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = "a red star | slides to the right"
    ours = backbone.sample(
        noise, backbone.encode_text([prompt]), steps=3, guidance=3.0, unconditional=backbone.unconditional()
    )
    pipeline = WanPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        negative_prompt="",
        height=32,
        width=32,
        num_frames=8,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=noise,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def _options(folder: Path, root: Path, steps: int) -> list[str]:
    return [
        "-c=proving_ground/autoencoder.yaml",
        f"--model.path={folder}",
        f"--data.folder={root / 'clips'}",
        "--data.clips=40",
        "--data.validation_share=0.2",
        "--data.num_workers=0",
        "--data.batch_size=2",
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--model.learning_rate.updates=4",
    ]


def test_its_autoencoder_learns_resumes_to_the_bit_and_is_exported(folder: Path, tmp_path: Path):
    whole, parts = (
        [*_options(folder, tmp_path, n), f"--trainer.default_root_dir={tmp_path / r}"] for n, r in ((4, "a"), (2, "b"))
    )
    assert main(["fit", *whole]) == 0
    assert main(["fit", *parts]) == 0
    (first,) = (tmp_path / "b").rglob("last.ckpt")
    assert (
        main(
            [
                "fit",
                *parts[:-1],
                f"--trainer.default_root_dir={tmp_path / 'c'}",
                "--trainer.max_steps=4",
                f"--ckpt_path={first}",
            ]
        )
        == 0
    )
    states = [torch.load(next((tmp_path / r).rglob("last.ckpt")), weights_only=True)["state_dict"] for r in "abc"]
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    (ckpt,) = (tmp_path / "a").rglob("last.ckpt")
    assert main(["export", *whole, f"--ckpt_path={ckpt}", f"--out={tmp_path / 'out'}"]) == 0
    config = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert config["latents_mean"] == pytest.approx(states[0]["latents_mean"].tolist(), abs=1e-4)
    assert config["latents_std"] == pytest.approx(states[0]["latents_std"].tolist(), abs=1e-4)
    backbone = load(str(tmp_path / "out"))
    torch.testing.assert_close(
        backbone.vae.state_dict()["quant_conv.weight"], states[0]["vae.quant_conv.weight"], rtol=0, atol=0
    )
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    assert backbone.decode(backbone.encode(pixels)).shape == pixels.shape


def test_a_pipeline_without_such_an_autoencoder_is_refused(tiny_checkpoint: Callable[[str], Path]):
    from lightning_modules import Autoencoder

    with pytest.raises(UsageError, match="AutoencoderKLWan"):
        Autoencoder(str(tiny_checkpoint("latte")))
