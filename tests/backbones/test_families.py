"""Every family behind the one face: what it makes is what its diffusers pipeline makes, and what it can't do it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import CASES, NEGATIVE, PROMPT
from torch import Tensor, nn

from muybridge import backbones, tiny
from muybridge.backbones import Backbone, Pretrained, load
from muybridge.customization.references import clip_size
from muybridge.diffusion import Conditioning
from muybridge.errors import UsageError
from muybridge.registry import BACKBONES

every = pytest.mark.parametrize("name", CASES)
TIMES = torch.tensor([900.0, 300.0])
"""One on each side of the boundary between Wan 2.2's experts."""

Open = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Callable[[str], Path]) -> Open:
    """A loaded backbone for reading; tests that change one open their own."""
    made: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in made:
            made[name] = CASES[name].open(tiny_checkpoint(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = reference(tiny_checkpoint(name))
        return made[name]

    return get


def reference(path: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(path))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text(backbone: Backbone) -> Conditioning:
    """Two prompts of different length."""
    return backbone.encode_text(["a cat", "two dogs jump over"])


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the largest value, or of one where all are smaller."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# -- which family, and what is loaded ------------------------------------------------------------------------------


def test_every_family_has_a_tiny_checkpoint_and_every_tiny_checkpoint_a_case() -> None:
    assert set(CASES) == set(tiny.MAKERS)
    assert {case.family for case in CASES.values()} == set(BACKBONES)


@every
def test_the_family_is_picked_from_the_files(name: str, opened: Open, tiny_checkpoint: Callable) -> None:
    backbone = opened(name)
    assert type(backbone) is getattr(backbones, CASES[name].family)
    assert backbone.family == CASES[name].family
    assert type(Pretrained(str(tiny_checkpoint(name)))) is type(backbone)
    assert all(not p.is_meta for p in backbone.parameters())
    assert list(backbone.networks) == (
        ["transformer", "transformer_2"] if name == "wan22" else [backbone.network_names[0]]
    )


def test_a_pipeline_that_nothing_takes_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UsageError, match="FluxPipeline") as caught:
        load(str(tmp_path))
    assert "WanPipeline (Wan)" in caught.value.expected


def test_another_family_s_class_is_refused(tiny_checkpoint: Callable) -> None:
    with pytest.raises(UsageError, match="WanPipeline"):
        backbones.Latte(str(tiny_checkpoint("wan")))


@every
def test_only_what_is_asked_for_is_loaded(name: str, tiny_checkpoint: Callable, tmp_path: Path) -> None:
    """Without the weights of VAE and text encoder on the disk, the denoiser loads and works."""
    source, copied = tiny_checkpoint(name), tmp_path / name
    shutil.copytree(source, copied)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        for file in (copied / part).glob("*.safetensors"):
            file.unlink()
    backbone = CASES[name].open(copied, components=("denoiser",))
    c = text(CASES[name].open(source, components=("text_encoder",)))
    out = backbone.denoise(CASES[name].noise(backbone, 2), TIMES, c)
    assert torch.isfinite(out).all()
    with pytest.raises(UsageError, match="vae"):
        backbone.decode(out)
    with pytest.raises(UsageError, match="text_encoder"):
        backbone.encode_text([PROMPT])


@every
def test_the_network_is_refused_to_a_job_without_it(name: str, tiny_checkpoint: Callable) -> None:
    backbone = CASES[name].open(tiny_checkpoint(name), components=("vae",))
    assert not list(backbone.parameters())
    with pytest.raises(UsageError, match="denoiser"):
        backbone.denoise(CASES[name].noise(backbone), TIMES[:1], Conditioning(torch.zeros(1, 32, 32)))


@every
def test_a_skeleton_has_the_names_and_shapes_of_the_network(name: str, opened: Open, tiny_checkpoint: Callable) -> None:
    bare = Pretrained(str(tiny_checkpoint(name)), components=("denoiser",))
    for part, network in opened(name).networks.items():
        skeleton = bare.skeleton(part)
        assert all(p.is_meta for p in skeleton.parameters())
        shapes = {n: p.shape for n, p in network.state_dict().items()}
        assert {n: p.shape for n, p in skeleton.state_dict().items()} == shapes
    assert not bare.networks


@every
def test_weights_that_are_not_finite_are_refused(name: str, tiny_checkpoint: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_checkpoint(name), tmp_path / name)
    file = next((tmp_path / name / opened_part(name)).glob("*.safetensors"))
    weights = load_file(file)
    first = next(iter(weights))
    weights[first] = torch.full_like(weights[first], float("nan"))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UsageError, match=re.escape(first)):
        CASES[name].open(tmp_path / name)


def opened_part(name: str) -> str:
    return getattr(backbones, CASES[name].family).network_names[0]


# -- denoising -----------------------------------------------------------------------------------------------------


@every
def test_two_samples_at_two_times_are_the_two_separate_calls(name: str, opened: Open) -> None:
    backbone = opened(name)
    x, c = CASES[name].noise(backbone, 2), text(backbone)
    with torch.no_grad():
        both = backbone.denoise(x, TIMES, c)
        assert both.shape == x.shape
        assert torch.isfinite(both).all()
        for i in (0, 1):
            close(backbone.denoise(x[i : i + 1], TIMES[i : i + 1], c[i]), both[i : i + 1])
        # Each input matters.
        assert (backbone.denoise(x, TIMES.flip(0), c) - both).abs().max() > 1e-3
        assert (backbone.denoise(x, TIMES, c[[1, 0]]) - both).abs().max() > 1e-4


@every
def test_gradients_are_finite_and_reach_every_block(name: str, opened: Open) -> None:
    backbone = opened(name)
    x = CASES[name].noise(backbone, 2).requires_grad_()
    backbone.denoise(x, TIMES, text(backbone)).square().mean().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()
    found = gradients(backbone)
    backbone.zero_grad()
    assert all(torch.isfinite(g).all() for g in found.values())
    hit = [n for n, g in found.items() if g.any()]
    # Mochi's last block computes what its text stream asks and then has no text to answer.
    assert len(hit) >= len(list(backbone.parameters())) - (2 if name == "mochi" else 0)


@every
def test_checkpointing_recomputes_and_leaves_gradients_and_names(
    name: str, opened: Open, tiny_checkpoint: Callable
) -> None:
    plain = opened(name)
    saving = CASES[name].open(tiny_checkpoint(name), gradient_checkpointing=True)
    assert list(saving.state_dict()) == list(plain.state_dict())
    x, c = CASES[name].noise(plain, 2), text(plain)
    watched = saving.network.get_submodule(saving.matching(saving.motion_projections(("v",)))[-1])
    calls: list[int] = []
    watched.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for backbone in (plain, saving):
        backbone.zero_grad()
        out = backbone.denoise(x, TIMES, c)
        out.square().mean().backward()
        results.append((out.detach(), gradients(backbone)))
        backbone.zero_grad()
    (out, expected), (again, found) = results
    close(again, out, 1e-6)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).abs().max() <= 1e-6 * max(1e-3, gradient.abs().max().item()), parameter
    forward, backward = len(calls) // 2, len(calls)
    assert backward == 2 * forward > 0
    with torch.no_grad():
        saving.denoise(x, TIMES, c)
    assert len(calls) == backward + forward


def test_a_copy_of_a_checkpointed_unet_runs_itself(tiny_checkpoint: Callable) -> None:
    backbone = load(str(tiny_checkpoint("unet3d")), gradient_checkpointing=True)
    backbone.enable_gradient_checkpointing()
    x, c = CASES["unet3d"].noise(backbone), backbone.encode_text([PROMPT])
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    out = twin.denoise(x, TIMES[:1], c)
    assert not out.any()
    out.sum().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert backbone.denoise(x, TIMES[:1], c).any()


@every
def test_bfloat16_is_near_float32(name: str, opened: Open, tiny_checkpoint: Callable) -> None:
    backbone = opened(name)
    half = CASES[name].open(tiny_checkpoint(name), dtype="bfloat16", components=("denoiser",))
    x, c = CASES[name].noise(backbone, 2), text(backbone)
    with torch.no_grad():
        exact, rough = backbone.denoise(x, TIMES, c), half.denoise(x, TIMES, c)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).std() < 0.1 * exact.std()


@every
def test_the_text_has_a_dtype_of_its_own(name: str, opened: Open, tiny_checkpoint: Callable) -> None:
    """Half the memory, nearly the same embeddings; and the network's dtype, which sharding may set, has no part in it."""
    prompts = ["a cat", "two dogs jump over"]
    backbone = CASES[name].open(tiny_checkpoint(name), components=("text_encoder",), text_dtype="bfloat16")
    half, whole = backbone.encode_text(prompts), opened(name).encode_text(prompts)
    assert (backbone.dtype, half.text.dtype, whole.text.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    close(half.text.float(), whole.text, 0.05)
    assert not torch.equal(half.text.float(), whole.text)
    noise = CASES[name].noise(opened(name), 2)
    close(opened(name).denoise(noise, TIMES, half), opened(name).denoise(noise, TIMES, whole), 0.1)

    sharded = CASES[name].open(tiny_checkpoint(name), components=("text_encoder",))
    sharded.dtype = torch.bfloat16
    assert sharded.text_dtype == torch.float32
    assert torch.equal(sharded.encode_text(prompts).text, whole.text)


@every
def test_wrong_shapes_are_refused(name: str, opened: Open) -> None:
    backbone = opened(name)
    x, c = CASES[name].noise(backbone, 2), text(backbone)
    with pytest.raises(UsageError, match="channels"):
        backbone.denoise(x[:, :-1], TIMES, c)
    with pytest.raises(ValueError, match=r"\(B, C, F, H, W\)"):
        backbone.denoise(x[0], TIMES, c)
    with pytest.raises(ValueError, match="prompts"):
        backbone.denoise(x, TIMES, c[0])
    with pytest.raises(ValueError, match="times"):
        backbone.denoise(x, TIMES[:1], c)
    if backbone.geometry.patch[1] > 1:
        with pytest.raises(UsageError, match="multiple"):
            backbone.denoise(x[:, :, :, :1], TIMES, c)


@every
def test_times_per_frame(name: str, opened: Open) -> None:
    backbone = opened(name)
    x, c = CASES[name].noise(backbone, 2), text(backbone)
    per_frame = TIMES[:, None].expand(2, x.shape[2])
    if not backbone.per_frame_times:
        with pytest.raises(UsageError, match="per-frame"):
            backbone.denoise(x, per_frame, c)
        return
    with torch.no_grad():
        plain = backbone.denoise(x, TIMES, c)
        close(backbone.denoise(x, per_frame, c), plain)
        other = per_frame.clone()
        other[:, -1] = 10.0
        assert (backbone.denoise(x, other, c) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="one for each"):
        backbone.denoise(x, per_frame[:, :1].expand(2, x.shape[2] + 1), c)


# -- codec ---------------------------------------------------------------------------------------------------------


def vae_alone(backbone: Backbone, pixels: Tensor) -> Tensor:
    """A clip through the VAE and back, without any normalisation."""
    vae = backbone.vae
    images = next(vae.encoder.parameters()).ndim == 4
    x = pixels.transpose(1, 2).flatten(0, 1) if images else pixels
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return y.unflatten(0, (pixels.shape[0], -1)).transpose(1, 2) if images else y


@every
@torch.no_grad()
def test_encoding_undoes_decoding_s_normalisation(name: str, opened: Open) -> None:
    backbone = opened(name)
    pixels = torch.rand(2, 3, *CASES[name].clip, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode(pixels)
    assert latents.shape == (2, *backbone.latent_shape(*CASES[name].clip))
    assert latents.dtype == torch.float32
    decoded = backbone.decode(latents)
    assert decoded.shape == pixels.shape
    close(decoded, vae_alone(backbone, pixels).clamp(-1, 1))
    close(backbone.encode(pixels[1:]), latents[1:])


@every
@torch.no_grad()
def test_a_posterior_is_drawn_with_a_generator(name: str, opened: Open) -> None:
    backbone = opened(name)
    pixels = torch.zeros(1, 3, *CASES[name].clip)

    def draw(seed: int) -> Tensor:
        return backbone.encode(pixels, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(backbone.encode(pixels), backbone.encode(pixels))


@every
def test_the_codec_and_the_text_encoder_are_no_submodules(name: str, opened: Open) -> None:
    backbone = opened(name)
    held = {id(p) for p in backbone.parameters()}
    assert not held & {id(p) for p in backbone.vae.parameters()}
    assert not any(p.requires_grad for p in backbone.vae.parameters())
    before = backbone.encode_text([PROMPT])
    backbone.release("text_encoder")
    backbone.release("vae")
    assert torch.equal(backbone.encode_text([PROMPT]).text, before.text)


# -- sampling ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_sample_is_the_pipeline_s_own(name: str, guidance: float, opened: Open, pipelines: Callable) -> None:
    backbone, case = opened(name), CASES[name]
    noise = case.noise(backbone)
    c, u = backbone.encode_text([PROMPT]), backbone.unconditional(NEGATIVE)
    ours = backbone.sample(noise, c, 4, guidance, u, torch.Generator().manual_seed(5))
    theirs = case.from_pipeline(case.run_pipeline(pipelines(name), noise, guidance, output_type="latent"), noise.shape)
    close(ours, theirs)
    if guidance > 1:
        plain = backbone.sample(noise, c, 4, generator=torch.Generator().manual_seed(5))
        assert (plain - ours).abs().max() > 1e-3
        pixels = case.run_pipeline(pipelines(name), noise, guidance, output_type="pt")
        close(backbone.decode(ours), pixels.transpose(1, 2) * 2 - 1, 2e-5)


@every
def test_an_empty_prompt_is_the_default_of_guidance(name: str, opened: Open) -> None:
    backbone = opened(name)
    noise, c = CASES[name].noise(backbone), backbone.encode_text([PROMPT])
    g = torch.Generator
    default = backbone.sample(noise, c, 2, 3.0, generator=g().manual_seed(5))
    said = backbone.sample(noise, c, 2, 3.0, backbone.encode_text([""]), g().manual_seed(5))
    assert torch.equal(default, said)


@every
def test_a_list_of_times_runs_the_few_step_sampler(name: str, opened: Open) -> None:
    backbone = opened(name)
    noise, c = CASES[name].noise(backbone, 2), text(backbone)
    seen: list[float] = []
    sample = backbone.sample(
        noise, c, [1000.0, 600.0], generator=torch.Generator().manual_seed(0), on_step=lambda i, n, t, z: seen.append(t)
    )
    assert sample.shape == noise.shape
    assert torch.isfinite(sample).all()
    assert seen == [1000.0, 600.0]
    again = backbone.sample(noise, c, [1000.0, 600.0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample, again)


@every
def test_times_fall_while_sampling(name: str, opened: Open) -> None:
    backbone = opened(name)
    seen: list[float] = []
    backbone.sample(
        CASES[name].noise(backbone), backbone.encode_text([PROMPT]), 4, on_step=lambda i, n, t, z: seen.append(t)
    )
    assert len(seen) == 4
    assert all(a > b for a, b in itertools.pairwise(seen))
    assert 1000 >= seen[0] > 700


@every
def test_noise_is_added_as_the_checkpoint_s_scheduler_adds_it(name: str, opened: Open) -> None:
    backbone = opened(name)
    scheduler = backbone.inference_scheduler(10, CASES[name].noise(backbone))
    clean, noise = CASES[name].noise(backbone, 1, 1), CASES[name].noise(backbone, 1, 2)
    for index in (0, 4, 8):
        label = scheduler.timesteps[index : index + 1]
        time = backbone._scheduler_time(label).float()
        if name in ("wan", "wan22"):
            # Its labels are cut to whole numbers; its noise is not.
            time = 1000 * scheduler.sigmas[index : index + 1]
        if name == "mochi":
            # Counting from noise, the scheduler takes the noise for the clean latent.
            expected = scheduler.scale_noise(noise, label, clean)
        elif hasattr(scheduler, "scale_noise"):
            expected = scheduler.scale_noise(clean, label, noise)
        else:
            expected = scheduler.add_noise(clean, noise, label)
        close(backbone.schedule.add_noise(clean, noise, time), expected)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clip", "fits"),
    [
        ("wan", (10, 16, 16), "4n+1 frames, such as 9 or 13"),
        ("wan", (9, 24, 16), "divisible by 16"),
        ("cogvideox", (8, 32, 32), "4n+1 frames, such as 5 or 9"),
        ("cogvideox_rope", (9, 40, 32), "divisible by 16"),
        ("latte", (5, 32, 32), "4 frames, the only length"),
        ("latte", (4, 32, 40), "divisible by 16"),
        ("unet3d", (4, 36, 32), "divisible by 8"),
        ("hunyuan", (12, 32, 32), "4n+1 frames, such as 9 or 13"),
        ("hunyuan", (9, 32, 24), "divisible by 16"),
        ("ltx", (8, 64, 64), "8n+1 frames, such as 1 or 9"),
        ("ltx", (9, 48, 64), "divisible by 32"),
        ("mochi", (9, 32, 32), "6n+1 frames, such as 7 or 13"),
        ("animatediff", (17, 32, 32), "at most 16 frames"),
        ("animatediff", (4, 32, 33), "divisible by 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_ones_that_do(
    name: str, clip: tuple[int, int, int], fits: str, opened: Open
) -> None:
    with pytest.raises(UsageError, match="can't take") as caught:
        opened(name).latent_shape(*clip)
    assert fits in caught.value.expected
    with pytest.raises(UsageError, match="can't take"):
        opened(name).encode(torch.zeros(1, 3, *clip))


@pytest.mark.parametrize(("name", "frames"), [("latte", 3), ("animatediff", 17)])
def test_latents_of_a_length_without_positions_are_refused(name: str, frames: int, opened: Open) -> None:
    backbone = opened(name)
    c, height, width = backbone.geometry.channels, 4, 4
    with pytest.raises(UsageError, match="latent frames"):
        backbone.denoise(torch.zeros(1, c, frames, height, width), TIMES[:1], backbone.encode_text([PROMPT]))


def test_latte_takes_one_frame(opened: Open) -> None:
    backbone = opened("latte")
    assert backbone.latent_shape(1, 32, 32) == (4, 1, 4, 4)
    out = backbone.denoise(torch.randn(1, 4, 1, 4, 4), TIMES[:1], backbone.encode_text([PROMPT]))
    assert out.shape == (1, 4, 1, 4, 4)


# -- blocks and projections ----------------------------------------------------------------------------------------


@every
def test_blocks_are_called_as_modules_and_hold_most_parameters(name: str, opened: Open) -> None:
    backbone = opened(name)
    blocks = backbone.blocks()
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len(set(held)), "blocks overlap"
    assert sum(p.numel() for b in blocks for p in b.parameters()) > 0.5 * sum(p.numel() for p in backbone.parameters())
    called: set[int] = set()
    hooks = [
        block.register_forward_hook(lambda *_, i=i: called.add(i))  # type: ignore[misc]
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        backbone.denoise(CASES[name].noise(backbone, 2), TIMES, text(backbone))
    for hook in hooks:
        hook.remove()
    assert called == set(range(len(blocks)))


@every
def test_motion_projections_hit_what_carries_motion_and_nothing_else(name: str, opened: Open) -> None:
    backbone = opened(name)
    two, four = CASES[name].projections
    hits = backbone.matching(backbone.motion_projections())
    assert len(hits) == len(set(hits)) == two
    assert len(backbone.matching(backbone.motion_projections(("q", "k", "v", "o")))) == four
    # Of a block with both, the values and outputs are half each.
    ends = {hit.split(".attn", 1)[1].split(".", 1)[1] for hit in hits}
    assert ends == {"to_v", "to_out.0"}
    text_only = re.compile(r"token_refiner|add_|to_add|caption|context_embedder|text")
    for hit in backbone.matching(backbone.motion_projections(("q", "k", "v", "o"))):
        assert not text_only.search(hit)
        if backbone.cross_attention is not None:
            assert not re.fullmatch(backbone.cross_attention, hit.rsplit(".to_", 1)[0])


@pytest.mark.parametrize(
    ("family", "network", "sizes", "expected"),
    [
        ("Wan", "WanTransformer3DModel", {}, 80),
        ("CogVideoX", "CogVideoXTransformer3DModel", {"num_layers": 42, "num_attention_heads": 48}, 84),
        ("UNet3D", "UNet3DConditionModel", {}, 68),
        ("HunyuanVideo", "HunyuanVideoTransformer3DModel", {}, 80),
        ("LTX", "LTXVideoTransformer3DModel", {}, 56),
        ("Mochi", "MochiTransformer3DModel", {}, 96),
        ("AnimateDiff", "UNetMotionModel", {}, 84),
    ],
)
def test_motion_projections_of_published_sizes(family: str, network: str, sizes: dict[str, int], expected: int) -> None:
    import diffusers

    cls = getattr(backbones, family)
    pattern = re.compile(rf"(?:{cls.temporal_attention})\.(?:{cls.projections['v']}|{cls.projections['o']})")
    with torch.device("meta"):
        model = getattr(diffusers, network)(**sizes)
    assert sum(bool(pattern.fullmatch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)) == expected


@every
def test_attention_regexes_hit_the_attention_modules(name: str, opened: Open) -> None:
    backbone = opened(name)
    modules = [n for n, m in backbone.network.named_modules() if hasattr(m, "to_q")]
    temporal, cross = CASES[name].attentions
    assert len([n for n in modules if re.fullmatch(backbone.temporal_attention, n)]) == temporal
    found = [n for n in modules if backbone.cross_attention and re.fullmatch(backbone.cross_attention, n)]
    assert len(found) == cross
    assert (backbone.cross_attention is None) == (backbone.text_tokens is not None)


@every
def test_attention_is_of_the_kind_the_family_says(name: str, opened: Open) -> None:
    """Attention over one place or over all, with text beside it, as the only source, or without: by what is passed."""
    backbone = opened(name)
    x, c = CASES[name].noise(backbone, 1), backbone.encode_text([PROMPT])
    tokens = c.text.shape[1]
    motion: list[tuple[int, int, bool]] = []
    crossing: list[bool] = []

    def given(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
        hidden = args[0] if args else kwargs["hidden_states"]
        other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        return hidden, isinstance(other, Tensor) and other.shape[1] == tokens

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, has_text = given(args, kwargs)
        motion.append((hidden.shape[0], hidden.shape[1], has_text))

    def watch_cross(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        crossing.append(given(args, kwargs)[1])

    hooks = []
    for module_name, module in backbone.network.named_modules():
        for pattern, hook in ((backbone.temporal_attention, watch), (backbone.cross_attention, watch_cross)):
            if pattern is not None and re.fullmatch(pattern, module_name):
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        backbone.denoise(x, TIMES[:1], c)
    for handle in hooks:
        handle.remove()

    f, h, w = (n // p for n, p in zip(x.shape[2:], backbone.geometry.patch, strict=True))
    assert len(motion) == CASES[name].attentions[0]
    assert crossing == [True] * CASES[name].attentions[1]
    for batch, length, has_text in motion:
        assert has_text == (backbone.text_tokens is not None)
        if backbone.attention_kind == "factorised":
            assert length == f
            # The UNets' lower level has a quarter of the places.
            assert batch in {h * w, h * w // 4}
        else:
            assert (batch, length) == (1, f * h * w)


def test_a_regex_that_hits_nothing_is_refused_with_ones_that_do(opened: Open) -> None:
    with pytest.raises(UsageError, match="no linear layer") as caught:
        opened("wan").matching(r"to_v")
    assert "blocks.0.attn1.to_v" in caught.value.expected
    with pytest.raises(UsageError, match="no regular expression"):
        opened("wan").matching("(")
    with pytest.raises(UsageError, match="projections"):
        opened("latte").motion_projections(("v", "x"))
    with pytest.raises(UsageError, match="projections"):
        opened("latte").motion_projections(())


# -- what would fail in silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latte", "hunyuan", "ltx", "mochi"])
def test_masked_tokens_do_not_matter(name: str, opened: Open) -> None:
    backbone = opened(name)
    x, c = CASES[name].noise(backbone, 2), text(backbone)
    assert c.mask is not None
    assert c.mask.dtype == torch.bool
    assert c.mask.sum(1).tolist() == [6, 19] or name == "hunyuan"
    noisy = torch.where(c.mask[..., None], c.text, torch.randn_like(c.text))
    with torch.no_grad():
        out = backbone.denoise(x, TIMES, c)
        close(backbone.denoise(x, TIMES, Conditioning(noisy, c.mask, c.pooled)), out)
        kept = torch.where(c.mask[..., None], torch.randn_like(c.text), c.text)
        assert (backbone.denoise(x, TIMES, Conditioning(kept, c.mask, c.pooled)) - out).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["hunyuan", "ltx", "mochi"])
def test_text_without_its_mask_is_refused(name: str, opened: Open) -> None:
    backbone = opened(name)
    c = backbone.encode_text([PROMPT])
    with pytest.raises(UsageError, match="mask"):
        backbone.denoise(CASES[name].noise(backbone), TIMES[:1], Conditioning(c.text, None, c.pooled))


def test_latte_s_prompts_do_not_depend_on_their_neighbours(opened: Open) -> None:
    """The pipeline crops one prompt and zeroes the padding of several; here each prompt is always as if alone."""
    backbone = opened("latte")
    c = text(backbone)
    for i, prompt in enumerate(("a cat", "two dogs jump over")):
        alone = backbone.encode_text([prompt])
        close(c.text[i : i + 1], alone.text)
        assert torch.equal(c.mask[i : i + 1], alone.mask)
    paired = backbone.pair_unconditional(c, backbone.unconditional(NEGATIVE))
    assert torch.equal(paired.mask, c.mask)
    assert len(paired) == 2


def test_cogvideox_always_has_its_rotary_positions(opened: Open) -> None:
    backbone = opened("cogvideox_rope")
    x, c = CASES["cogvideox_rope"].noise(backbone), backbone.encode_text([PROMPT])
    with torch.no_grad():
        ours = backbone.denoise(x, TIMES[:1], c)
        without = backbone.network(x.transpose(1, 2), c.text, TIMES[:1], return_dict=False)[0].transpose(1, 2)
    assert (ours - without).abs().max() > 1e-3


def test_cogvideox_2b_takes_one_text_length(opened: Open, tiny_checkpoint: Callable) -> None:
    backbone = opened("cogvideox")
    assert backbone.encode_text([PROMPT]).text.shape[1] == backbone.max_text_length == 32
    with pytest.raises(UsageError, match="text of 16 tokens") as caught:
        backbone.denoise(CASES["cogvideox"].noise(backbone), TIMES[:1], Conditioning(torch.zeros(1, 16, 32)))
    assert "32" in caught.value.expected
    with pytest.raises(UsageError, match="max_text_length is 64"):
        load(str(tiny_checkpoint("cogvideox")), max_text_length=64)
    rotary = load(str(tiny_checkpoint("cogvideox_rope")), max_text_length=16)
    assert rotary.encode_text([PROMPT]).text.shape[1] == 16


@pytest.mark.parametrize(("name", "length"), [("latte", 64), ("unet3d", 77), ("animatediff", 16)])
def test_fixed_text_lengths_are_refused_otherwise(name: str, length: int, tiny_checkpoint: Callable) -> None:
    with pytest.raises(UsageError, match=f"max_text_length is {length}"):
        load(str(tiny_checkpoint(name)), max_text_length=length)


def test_mochi_s_empty_prompt_blanks_itself_alone(opened: Open) -> None:
    backbone = opened("mochi")
    c = backbone.encode_text(["a cat", ""])
    close(c[0].text, backbone.encode_text(["a cat"]).text)
    assert c.mask.any(1).tolist() == [True, False]


def test_a_scheduler_that_does_not_belong_is_refused(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    def edited(name: str, **changes: Any) -> str:
        path = tmp_path / name
        shutil.copytree(tiny_checkpoint(name), path)
        file = path / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return str(path)

    with pytest.raises(UsageError, match="prediction_type"):
        load(edited("unet3d", prediction_type="flow_prediction"))
    with pytest.raises(UsageError, match="beta_schedule"):
        load(edited("latte", beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(UsageError, match="use_flow_sigmas"):
        load(edited("wan", use_flow_sigmas=False))
    with pytest.raises(UsageError, match="invert_sigmas"):
        load(edited("mochi", invert_sigmas=False))


def test_a_learned_variance_is_refused_for_latte(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    path = tmp_path / "latte"
    shutil.copytree(tiny_checkpoint("latte"), path)
    index = json.loads((path / "model_index.json").read_text())
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "variance_type": "learned_range"}))

    def sample(steps: object, scheduler: str) -> torch.Tensor:
        (path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
        backbone = load(str(path))
        noise, c = CASES["latte"].noise(backbone), backbone.encode_text([PROMPT])
        return backbone.sample(noise, c, steps)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="learned_range"):
        sample(4, "DDPMScheduler")
    assert torch.isfinite(sample([1000.0, 500.0], "DDPMScheduler")).all()
    assert torch.isfinite(sample(4, "DDIMScheduler")).all(), "which has no such choice"


def test_latte_with_a_temporal_decoder(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLTemporalDecoder

    path = tmp_path / "latte"
    shutil.copytree(tiny_checkpoint("latte"), path)
    shutil.rmtree(path / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 32)
        )
    vae.save_pretrained(str(path / "vae"))
    index = json.loads((path / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLTemporalDecoder"]
    (path / "model_index.json").write_text(json.dumps(index))
    backbone = load(str(path))
    latents = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = reference(path).decode_latents(latents[:1], 4)
    ours = backbone.decode(latents)
    close(ours[:1], theirs.clamp(-1, 1))
    close(backbone.decode(latents[1:]), ours[1:])


# -- what single families have -------------------------------------------------------------------------------------


def test_hunyuan_s_embedded_guidance_and_ltx_s_frame_rate(tiny_checkpoint: Callable, opened: Open) -> None:
    for name, option in (("hunyuan", {"embedded_guidance": 1.0}), ("ltx", {"frame_rate": 8.0})):
        backbone, other = opened(name), load(str(tiny_checkpoint(name)), **option)
        x, c = CASES[name].noise(backbone), backbone.encode_text([PROMPT])
        with torch.no_grad():
            difference = backbone.denoise(x, TIMES[:1], c) - other.denoise(x, TIMES[:1], c)
        assert difference.abs().max() > 1e-4
    with pytest.raises(UsageError, match="frame_rate"):
        load(str(tiny_checkpoint("ltx")), frame_rate=0.0)


def test_ltx_s_shift_grows_with_the_clip(opened: Open) -> None:
    backbone = opened("ltx")
    small = backbone.inference_scheduler(4, torch.zeros(1, 8, 2, 2, 2)).timesteps
    large = backbone.inference_scheduler(4, torch.zeros(1, 8, 21, 16, 22)).timesteps
    assert (large[1:-1] > small[1:-1]).all()
    assert small[-1].item() == pytest.approx(100.0, abs=1e-3)


def test_mochi_needs_two_steps(opened: Open) -> None:
    backbone = opened("mochi")
    with pytest.raises(UsageError, match="at least 2"):
        backbone.sample(CASES["mochi"].noise(backbone), backbone.encode_text([PROMPT]), 1)


def test_clips_are_of_the_size_that_the_checkpoint_names(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    """CogVideoX 1.5 and Wan's TI2V-5B were trained for other clips than the models they are named after."""
    path = tmp_path / "cogvideox"
    shutil.copytree(tiny_checkpoint("cogvideox"), path)
    file = path / "transformer" / "config.json"
    config = json.loads(file.read_text())

    def size(**settings: Any) -> tuple[int, int, int]:
        file.write_text(json.dumps({**config, **settings}))
        return clip_size(Pretrained(str(path)))

    spatial = Pretrained(str(path)).geometry.spatial
    named = {"sample_frames": 81, "sample_height": 768 // spatial, "sample_width": 1360 // spatial}
    assert size(**{**named, "sample_frames": 49}) == (49, 768, 1360)
    assert size(**named, patch_size_t=2) == (85, 768, 1360), (
        "81 frames are 21 latent ones, of which its patches take two"
    )
    assert size(sample_height=None) == (49, 480, 720)

    path = tmp_path / "wan"
    shutil.copytree(tiny_checkpoint("wan"), path)
    assert clip_size(Pretrained(str(path))) == (81, 480, 832)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    assert clip_size(Pretrained(str(path))) == (121, 704, 1280)
    assert clip_size(Pretrained(str(path)), frames=9, height=16) == (9, 16, 1280)


def test_cogvideox_1_5_has_patches_in_time(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    from muybridge.tiny.parts import wake

    path = tmp_path / "cogvideox_1_5"
    shutil.copytree(tiny_checkpoint("cogvideox_rope"), path)
    config = json.loads((path / "transformer" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel.from_config({**config, "patch_size_t": 2, "patch_bias": False})
    wake(transformer).save_pretrained(str(path / "transformer"))
    backbone = load(str(path))
    with pytest.raises(UsageError, match=r"9 frames \(3 latent frames\)") as caught:
        backbone.latent_shape(9, 32, 32)
    assert "such as 13 frames" in caught.value.expected
    c = backbone.encode_text([PROMPT])
    with pytest.raises(UsageError, match="latents of 4x6") as caught:
        backbone.denoise(torch.zeros(1, *backbone.latent_shape(13, 32, 48)), TIMES[:1], c)
    assert "at most 4x4" in caught.value.expected
    noise = torch.randn(1, *backbone.latent_shape(13, 32, 16), generator=torch.Generator().manual_seed(0))
    ours = backbone.sample(noise, c, 4, 6.0, backbone.unconditional(), torch.Generator().manual_seed(5))
    theirs = reference(path)(
        PROMPT,
        height=32,
        width=16,
        num_frames=13,
        num_inference_steps=4,
        guidance_scale=6.0,
        latents=noise.transpose(1, 2).clone(),
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=32,
        output_type="latent",
    ).frames
    close(ours, theirs.transpose(1, 2))


def test_animatediff_from_an_image_unet_beside_an_adapter(
    tiny_checkpoint: Callable, tmp_path: Path, opened: Open
) -> None:
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    path = tmp_path / "animatediff"
    shutil.copytree(tiny_checkpoint("animatediff"), path)
    adapter = MotionAdapter.from_pretrained(str(path), subfolder="motion_adapter")
    shutil.rmtree(path / "unet")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    unet.save_pretrained(str(path / "unet"))
    index = json.loads((path / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (path / "model_index.json").write_text(json.dumps(index))

    backbone = load(str(path))
    assert isinstance(backbone.network, UNetMotionModel)
    assert list(backbone.skeleton().state_dict()) == list(backbone.network.state_dict())
    assert backbone.geometry == opened("animatediff").geometry
    x, c = CASES["animatediff"].noise(backbone), backbone.encode_text([PROMPT])
    joined = UNetMotionModel.from_unet2d(unet, adapter).eval()
    with torch.no_grad():
        expected = joined(x, TIMES[:1], c.text.repeat_interleave(4, dim=0), return_dict=False)[0]
        close(backbone.denoise(x, TIMES[:1], c), expected)
