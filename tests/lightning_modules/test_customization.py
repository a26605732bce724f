"""Customization: what is trained, when it acts, what it starts from, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.families import CASES
from support.jobs import SHAPES, LatentClips, Latents, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.samples import Samples
from datamodules import VideoData
from datamodules.collate import collate
from lightning_modules import MotionCustomization, Sampling
from muybridge.backbones import Pretrained, load
from muybridge.backbones.adapters import LoRA, adapter_parameters, load_adapter
from muybridge.backbones.gates import adapter_layers
from muybridge.batch import Batch
from muybridge.customization.inverted import How, Inverted, about, write_inverted
from muybridge.customization.tau import Tau
from muybridge.diffusion import Boundary, LogitNormal, Uniform, keyed_noise
from muybridge.errors import UsageError
from muybridge.losses import AttentionMotionFlow, Denoising, FrameResidual, MotionFeatureMatching
from muybridge.toy_clips import write_clips

Tiny = Callable[[str], Path]


def customization(path: Path, name: str = "wan", **settings: Any) -> MotionCustomization:
    frames, height, width = SHAPES[name]
    return MotionCustomization(
        **{
            "backbone": Pretrained(str(path), max_text_length=16 if name.startswith("wan") else None),
            "losses": [Denoising()],
            "tau": Tau(600.0),
            "captions": "free",
            "optimizer": lambda p: torch.optim.AdamW(p, lr=2e-2),
            "sampling": Sampling(steps=4, guidance=1.0, frames=frames, height=height, width=width, fps=8),
            **settings,
        }
    )


class OneClip(LatentClips):
    """The same clip again and again."""

    def train_dataset(self) -> Any:
        return torch.utils.data.Subset(Latents(self.shape, 1), [0] * self.count)

    def val_dataloader(self) -> Any:
        return DataLoader(Latents(self.shape, 1), batch_size=1, collate_fn=collate)


def clips_for(job: MotionCustomization, name: str = "wan", count: int = 8, **settings: Any) -> OneClip:
    return OneClip(job.backbone.latent_shape(*SHAPES[name]), count=count, batch_size=1, **settings)


def trained(path: Path, root: Path, name: str = "wan", steps: int = 8, **settings: Any) -> MotionCustomization:
    job = customization(path, name, **settings)
    trainer(root, max_steps=steps, limit_val_batches=0).fit(job, clips_for(job, name))
    return job


def states(job: MotionCustomization) -> tuple[list[float], list[Tensor]]:
    """Times and latents of a sampling run."""
    times, latents = [], []

    def note(index: int, count: int, time: float, z: Tensor) -> None:
        times.append(time)
        latents.append(z.clone())

    job.make_videos(Batch(ids=["a"], prompts=["a dog"]), job.sampling, note)
    return times, latents


def test_times_are_drawn_where_the_adapter_acts(tiny_checkpoint: Tiny) -> None:
    for sampler in (Uniform(), LogitNormal()):
        job = customization(tiny_checkpoint("wan"), timesteps=sampler)
        t = job.draw(Batch(ids=[str(i) for i in range(500)], prompts=[""] * 500), (1,))[1]
        assert float(t.min()) >= 600.0
        assert job.adapter is not None
        assert job.adapter.t_min == Boundary(600.0)
        assert sampler.low is None, "the caller's own sampler is left as it is"
    everywhere = customization(tiny_checkpoint("wan"), tau=Tau(0.0))
    assert everywhere.adapter is not None
    assert everywhere.adapter.t_min is None


@pytest.mark.parametrize("name", CASES)
def test_below_tau_every_step_of_a_sampling_is_the_base_models_bit_for_bit(
    name: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """In every family: trained on one clip, sampled, and each of the network's calls held against the untouched model's."""
    case, path = CASES[name], str(tiny_checkpoint(name))
    tau = 900.0 if name in ("hunyuan", "mochi") else 600.0  # whose few steps are nearly all noisier
    frames, height, width = case.clip
    job = MotionCustomization(
        backbone=Pretrained(path, **case.options),
        losses=[Denoising(), MotionFeatureMatching()],
        tau=Tau(tau),
        captions="free",
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2, eps=1e-16),
        sampling=Sampling(steps=4, guidance=3.0, frames=frames, height=height, width=width, fps=8),
    )
    data = OneClip(job.backbone.latent_shape(*case.clip), count=2, batch_size=1)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(job, data)
    calls: list[tuple[float, Tensor, Tensor]] = []
    # Frozen as the adapted one: torch takes another convolution for weights that could be trained.
    untouched = case.open(path).requires_grad_(False)
    run = job.backbone._forward

    def note(latents: Tensor, t: Tensor, text: Any) -> Tensor:
        out = run(latents, t, text)
        calls.append((float(t[0]), out, untouched._forward(latents, t, text)))
        return out

    job.backbone._forward = note  # type: ignore[method-assign]
    job.make_videos(Batch(ids=["a"], prompts=["a dog"]), job.sampling)
    below = [torch.equal(ours, base) for t, ours, base in calls if t < tau]
    above = [torch.equal(ours, base) for t, ours, base in calls if t >= tau]
    assert below
    assert all(below)
    assert above
    assert not all(above)


def test_training_teaches_the_clip_above_tau_and_nothing_below(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = customization(tiny_checkpoint("wan"), validation_quantiles=[0.3, 0.8])
    data, run = clips_for(job, count=40), trainer(tmp_path, max_steps=40)
    before = run.validate(job, data, verbose=False)[0]
    run.fit(job, data)
    after = run.validate(job, data, verbose=False)[0]
    assert after["val/loss_t300"] == before["val/loss_t300"]
    assert after["val/loss_t800"] < 0.99 * before["val/loss_t800"]
    trained_names = {n for n, p in job.named_parameters() if p.requires_grad}
    assert trained_names == {f"backbone.{n}" for n in adapter_parameters(job.backbone)}
    assert all(".attn1.to_v." in n or ".attn1.to_out.0." in n for n in trained_names)


@pytest.mark.parametrize("projections", [["v", "o"], ["q", "k"], ["q", "k", "v"], ["q", "k", "v", "o"]])
def test_projections_are_a_choice(projections: list[Any], tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = trained(tiny_checkpoint("wan"), tmp_path, steps=1, adapter=LoRA(projections=projections))
    letters = {n.split(".")[-4].removeprefix("to_") for n in adapter_parameters(job.backbone)}
    ends = {"q": "q", "k": "k", "v": "v", "o": "0"}
    assert letters == {ends[p] for p in projections}
    assert {p.shape[0] for n, p in adapter_parameters(job.backbone).items() if "lora_A" in n} == {4}


def test_the_published_rank_and_the_range_travel_in_the_file(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = trained(tiny_checkpoint("wan"), tmp_path / "run", steps=3)
    # Where nothing is said, rank and alpha are 4, so the scale is 1, on value and output.
    layers = adapter_layers(job.backbone.network)
    assert {n.rpartition(".to_")[2] for n in layers} == {"v", "out.0"}
    for layer in layers.values():
        assert (layer.r["muybridge"], layer.lora_alpha["muybridge"], layer.scaling["muybridge"]) == (4, 4.0, 1.0)
    files = job.export(str(tmp_path / "adapter"))
    assert [Path(f).name for f in files] == ["adapter.safetensors", "adapter_comfyui.safetensors"]
    with safe_open(files[0], "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (4, 4.0)
    assert not said["transformer.rank_pattern"]
    assert not said["transformer.alpha_pattern"]
    comfy = load_file(files[1])
    assert {float(v) for k, v in comfy.items() if k.endswith(".alpha")} == {4.0}
    backbone = load(str(tiny_checkpoint("wan")), max_text_length=16)
    adapter = load_adapter(backbone, files[0])
    assert (adapter.t_min, adapter.t_max) == (600.0, 1000.0)
    _, ours = states(job)
    job.backbone = backbone
    _, theirs = states(job)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_several_losses_work_together(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    losses = [Denoising(), MotionFeatureMatching(), FrameResidual()]
    job = trained(tiny_checkpoint("wan"), tmp_path, steps=2, losses=losses, loss_weights=[1.0, 0.5, 0.1])
    assert job.updates == 2
    moved = [p for n, p in adapter_parameters(job.backbone).items() if "lora_B" in n]
    assert all(float(p.detach().abs().max()) > 0 for p in moved)


# -- references --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    write_clips(folder, 1, frames=9, height=32, width=32)
    return folder


def video(clips: Path, caption: str, **settings: Any) -> VideoData:
    options = {"frames": 9, "height": 16, "width": 16, "num_workers": 0, "repeats": 3, "on_error": "raise", **settings}
    return VideoData(videos=str(clips / "clip-000.mp4"), caption=caption, **options)


def test_a_reference_is_encoded_once_and_its_bar_is_not_spoken(
    clips: Path, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    job = customization(tiny_checkpoint("wan"), captions="split")
    encoded, spoken = [], []
    encode, encode_text = job.backbone.encode, job.backbone.encode_text
    job.backbone.encode = lambda pixels, *a: (encoded.append(len(pixels)), encode(pixels, *a))[1]  # type: ignore
    job.backbone.encode_text = lambda texts: (spoken.extend(texts), encode_text(texts))[1]  # type: ignore
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(job, video(clips, "a disc | moves right"))
    assert job.updates == 3
    assert encoded == [1]
    assert spoken == ["a disc moves right"]


def test_the_text_encoder_goes_before_the_first_step(clips: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Captions, prompts of samples, the empty caption and the negative prompt are all it is asked for."""
    size = Sampling(steps=2, guidance=2.0, negative_prompt="blurry", frames=9, height=16, width=16, fps=8)
    job = customization(tiny_checkpoint("wan"), captions="split", caption_dropout=0.5, sampling=size)
    spoken, held = [], []
    encode_text, denoise = job.backbone.encode_text, job.backbone.denoise
    job.backbone.encode_text = lambda texts: (spoken.extend(texts), encode_text(texts))[1]  # type: ignore

    def watched(*arguments: Any) -> Tensor:
        held.append("text" in job.backbone._parts)
        return denoise(*arguments)

    job.backbone.forward = job.backbone.denoise = watched  # type: ignore[method-assign]
    samples = Samples(["a square | moves right"], every=2, dirpath=str(tmp_path))
    runner = trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=[samples])
    runner.fit(job, video(clips, "a disc | moves right", repeats=4))
    assert len(list(tmp_path.rglob("update-*/*.mp4"))) == 2
    assert len(held) >= 4
    assert not any(held)
    assert sorted(spoken) == ["", "a disc moves right", "a square moves right", "blurry"], "each once"


@pytest.mark.parametrize("name", ["clip-000", "another"])
def test_clips_of_one_name_are_not_one_clip(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A validation clip called like the reference is looked at first, and is not what is learnt."""
    one, two = write_clips(tmp_path / "clips", 2, frames=9, height=32, width=32)
    folder = tmp_path / "validation"
    folder.mkdir()
    two.rename(folder / f"{name}.mp4")
    (folder / f"{name}.txt").write_text("a disc | moves left")
    job = customization(tiny_checkpoint("wan"), captions="split")
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    inner = job.clean_latents

    def note(batch: Batch, backbone: Any) -> Tensor:
        latents = inner(batch, backbone)
        wanted = backbone.encode(batch.pixels)
        torch.testing.assert_close(latents, wanted)
        seen[job.trainer.training].append(latents)
        return latents

    job.clean_latents = note  # type: ignore[method-assign]
    data = video(one.parent, "a disc | moves right", validation=str(folder))
    trainer(tmp_path, max_steps=2, num_sanity_val_steps=1, limit_val_batches=1).fit(job, data)
    assert len(seen[True]) == 2
    assert seen[False]
    assert (seen[True][0] - seen[False][0]).abs().max() > 1e-3


def test_a_cache_of_captions_with_bars_is_refused(clips: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Training would hear the bar, and videos not."""
    job = customization(tiny_checkpoint("wan"), captions="split")
    job._cache = object()  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"the cache holds the caption 'a disc \| moves' encoded with its bar"):
        job._check_cached("a disc | moves")
    job._check_cached("a disc moves")
    job.keep_bar = True
    job._check_cached("a disc | moves")


def test_several_references_are_each_encoded_once(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    write_clips(folder, 2, frames=9, height=32, width=32)
    for file in folder.glob("*.txt"):
        file.write_text(file.read_text().replace(" moves", " | moves"))
    job = customization(tiny_checkpoint("wan"), captions="split")
    encoded: list[int] = []
    encode = job.backbone.encode
    job.backbone.encode = lambda pixels, *a: (encoded.append(len(pixels)), encode(pixels, *a))[1]  # type: ignore
    options = {"frames": 9, "height": 16, "width": 16, "num_workers": 0, "repeats": 4, "on_error": "raise"}
    trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(job, VideoData(videos=str(folder), **options))
    assert job.updates == 8
    assert encoded == [1, 1]


def test_captions_without_a_subject_are_refused_before_weights_load(
    clips: Path, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    job = customization(tiny_checkpoint("wan"), captions="split")
    with pytest.raises(UsageError, match="a subject and a motion"):
        trainer(tmp_path, max_steps=1).fit(job, video(clips, "moves right"))
    assert not job.backbone.networks
    free = customization(tiny_checkpoint("wan"), captions="free")
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(free, video(clips, "moves right"))


def test_a_reference_that_is_too_short_is_refused_before_weights_load(
    clips: Path, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    job = customization(tiny_checkpoint("wan"), captions="split")
    with pytest.raises(UsageError, match="longer clip"):
        trainer(tmp_path, max_steps=1).fit(job, video(clips, "a disc | moves right", frames=13))
    assert not job.backbone.networks


# -- starting noise ----------------------------------------------------------------------------------------------------


def test_videos_start_from_mixed_noise(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = load(str(tiny_checkpoint("wan")), max_text_length=16)
    shape = backbone.latent_shape(*SHAPES["wan"])
    noise = keyed_noise(shape, 3, "inverted")
    made = about(backbone, "clip", "a dog", How(), SHAPES["wan"])
    file = write_inverted(tmp_path / "noise.safetensors", Inverted(noise, torch.zeros_like(noise), made))
    mixed = customization(tiny_checkpoint("wan"), inverted=str(file), beta=0.36)
    plain = customization(tiny_checkpoint("wan"))
    mixed.check()
    found = mixed.noise_for(["a", "b"], mixed.sampling)
    fresh = plain.noise_for(["a", "b"], plain.sampling)
    torch.testing.assert_close(found, 0.6 * noise + 0.8 * fresh)
    wrong = customization(
        tiny_checkpoint("wan"), inverted=str(file), beta=0.3, sampling=replace(mixed.sampling, frames=5)
    )
    with pytest.raises(UsageError, match="at the size that is sampled"):
        wrong.check()


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": Tau()}, "none is published for Wan"),
        ({"tau": Tau(999.9)}, "below 999"),
        ({"adapter": LoRA(t_min=Boundary(500.0))}, "tau alone"),
        ({"beta": 0.3}, "both or neither"),
        ({"inverted": "x.safetensors"}, "both or neither"),
        ({"captions": "some"}, "split or free"),
        ({"losses": []}, "at least one loss"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, said: str, tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match=said):
        customization(tiny_checkpoint("wan"), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timesteps": Uniform(low=Boundary(100.0))}, "inside the adapter's range"),
        ({"adapter": LoRA(targets=r"temporal\.to_v")}, "hits no linear layer"),
        ({"inverted": "nowhere.safetensors", "beta": 0.5}, "no inverted noise"),
        (
            {"losses": [MotionFeatureMatching(layers=r"blocks\.\d+\.temporal")]},
            r"hits no module(.|\n)*blocks\.0\.attn1",
        ),
        ({"losses": [MotionFeatureMatching(layers="(")]}, "no regular expression"),
    ],
)
def test_a_check_refuses_the_rest_before_weights_load(settings: dict, said: str, tiny_checkpoint: Tiny) -> None:
    job = customization(tiny_checkpoint("wan"), **settings)
    with pytest.raises(UsageError, match=said):
        job.check()
    assert not job.backbone.networks


def test_a_loss_that_the_family_cannot_have_is_refused_before_weights_load(tiny_checkpoint: Tiny) -> None:
    job = customization(tiny_checkpoint("latte"), "latte", losses=[AttentionMotionFlow()])
    with pytest.raises(UsageError, match="stays at one place"):
        job.check()
    assert not job.backbone.networks


def test_rank_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        LoRA(rank=0)
