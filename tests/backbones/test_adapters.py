"""Adapters: the base model until trained, exactly the same from a file, off exactly where they should be."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.denoising import denoising_inputs, open_tiny
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from muybridge import tiny
from muybridge.backbones import Backbone, load
from muybridge.backbones.adapters import (
    LoRA,
    adapter_parameters,
    adapters,
    check_lora,
    disabled,
    gate_by_time,
    inject,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
)
from muybridge.backbones.comfy import LowRank, to_comfyui
from muybridge.backbones.gates import adapter_layers
from muybridge.diffusion import Boundary
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
FAMILIES = list(tiny.MAKERS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def train(backbone: Backbone, seed: int = 1, name: str | None = None) -> None:
    """Stand-in for training: weights that make a visible difference."""
    generator = torch.Generator().manual_seed(seed)
    for full_name, parameter in adapter_parameters(backbone, name).items():
        if "lora_B" in full_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def adapted(path: Path, lora: LoRA = LoRA(alpha=8.0), **options: Any) -> Backbone:  # noqa: B008 - immutable
    backbone = open_tiny(path, **options)
    inject(backbone, lora)
    train(backbone)
    return backbone


@torch.no_grad()
def predict(backbone: Backbone, t: float = 900.0) -> Tensor:
    latents, times, text = denoising_inputs(backbone, t=t)
    return backbone.denoise(latents, times, text)


# -- injection ---------------------------------------------------------------------------------------------------------


@every_family
def test_injection(name: str, tiny_checkpoint: Tiny) -> None:
    # torch multiplies with other roundings by weights that require gradients, so they are frozen for a comparison of bits.
    backbone = open_tiny(tiny_checkpoint(name)).requires_grad_(False)
    base = predict(backbone)
    expected = set()
    for network_name, network in backbone.networks.items():
        for layer, module in network.named_modules():
            owner, _, projection = layer.removesuffix(".0").rpartition(".")
            linear = isinstance(module, nn.Linear) and projection in ("to_v", "to_out")
            if linear and re.fullmatch(backbone.temporal_attention, owner):
                expected.add(f"networks.{network_name}.{layer}")
    inject(backbone, LoRA(rank=3))
    parameters = adapter_parameters(backbone)
    assert {n.split(".lora_")[0] for n in parameters} == expected
    assert len(parameters) == 2 * len(expected)
    assert torch.equal(predict(backbone), base)

    train(backbone)
    assert (predict(backbone) - base).abs().max() > 1e-4
    boundary = getattr(backbone, "expert_boundary", None)
    for t in [900.0] if boundary is None else [900.0, 500.0]:
        latents, times, text = denoising_inputs(backbone, t=t)
        backbone.denoise(latents, times, text).pow(2).mean().backward()
    assert all(p.grad is None for n, p in backbone.named_parameters() if n not in parameters)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    assert all(p.requires_grad == (n in parameters) for n, p in backbone.named_parameters())


def test_initial_weights_depend_on_seed_and_name_alone(tiny_checkpoint: Tiny) -> None:
    made = []
    for seed, noise in ((0, 1), (0, 2), (7, 1)):
        torch.manual_seed(noise)
        backbone = open_tiny(tiny_checkpoint("wan"))
        inject(backbone, LoRA(init_seed=seed))
        made.append(adapter_parameters(backbone))
    down = [n for n in made[0] if "lora_A" in n]
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
    assert not any(torch.equal(made[0][n], made[2][n]) for n in down)
    assert not torch.equal(made[0][down[0]], made[0][down[1]])
    width = made[0][down[0]].shape[1]
    assert 0.9 * width**-0.5 < max(float(made[0][n].detach().abs().max()) for n in down) <= width**-0.5


def test_the_base_may_be_bfloat16(tiny_checkpoint: Tiny) -> None:
    backbone = load(str(tiny_checkpoint("wan")), dtype="bfloat16")
    base = predict(backbone)
    inject(backbone, LoRA())
    assert all(p.dtype == torch.float32 for p in adapter_parameters(backbone).values())
    assert torch.equal(predict(backbone), base)
    train(backbone)
    assert predict(backbone).dtype == torch.bfloat16
    assert not torch.equal(predict(backbone), base)


def test_several_adapters_add_up_and_come_off_one_by_one(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    base = predict(backbone)
    inject(backbone, LoRA(), name="first")
    train(backbone, 1, "first")
    with_first = predict(backbone)
    inject(backbone, LoRA(rank=2, projections=["q", "v"]), name="second")
    assert torch.equal(predict(backbone), with_first)
    assert all(p.requires_grad for p in adapter_parameters(backbone).values())
    train(backbone, 2, "second")
    both = predict(backbone)
    with disabled(backbone, "second"):
        assert torch.equal(predict(backbone), with_first)
    with disabled(backbone):
        assert torch.equal(predict(backbone), base)
        with disabled(backbone, "second"):
            assert torch.equal(predict(backbone), base)
        assert torch.equal(predict(backbone), base)
    assert torch.equal(predict(backbone), both)
    for parameter in adapter_parameters(backbone, "first").values():
        parameter.requires_grad_(False)
    remove_adapter(backbone, "second")
    assert torch.equal(predict(backbone), with_first)
    assert not any(p.requires_grad for p in backbone.parameters())
    remove_adapter(backbone, "first")
    assert torch.equal(predict(backbone), base)
    assert not adapters(backbone)
    assert set(backbone.state_dict()) == set(open_tiny(tiny_checkpoint("wan")).state_dict())


@every_family
def test_merged_weights_do_what_the_adapter_did(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint(name))
    expected, names = predict(backbone), set(open_tiny(tiny_checkpoint(name)).state_dict())
    merge_adapter(backbone)
    torch.testing.assert_close(predict(backbone), expected, atol=1e-5, rtol=1e-5)
    assert set(backbone.state_dict()) == names
    assert not hasattr(backbone.network, "peft_config")


def test_an_adapter_with_a_range_merges_only_if_told_to(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"), LoRA(t_min=Boundary(700.0)))
    expected = predict(backbone)
    with pytest.raises(UsageError, match=r"700 to 1000(.|\n)*drop_range"):
        merge_adapter(backbone)
    merge_adapter(backbone, drop_range=True)
    torch.testing.assert_close(predict(backbone), expected, atol=1e-5, rtol=1e-5)
    assert not backbone.network._forward_pre_hooks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LoRA(rank=0), "rank is 0"),
        (lambda: LoRA(alpha=-1.0), "alpha is -1"),
        (lambda: LoRA(projections=["z"]), "some of q, k, v, o"),  # type: ignore[list-item]
        (lambda: LoRA(projections=[]), "projections"),
        (lambda: LoRA(targets=r"blocks\.\d+\.attn9"), "hits no linear layer"),
        (lambda: LoRA(targets="("), "no regular expression"),
        (lambda: LoRA(networks=["transfomer"]), "did you mean transformer"),
        (lambda: LoRA(t_min=Boundary(900.0), t_max=Boundary(100.0)), "t_min below t_max"),
        (lambda: LoRA(networks=["transformer_2"], t_min=Boundary(900.0)), "overlaps 0 to 875"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_weights_load(
    wrong: Callable[[], LoRA], message: str, tiny_checkpoint: Tiny
) -> None:
    from muybridge.backbones import Pretrained

    backbone = Pretrained(str(tiny_checkpoint("wan22")))
    with pytest.raises(UsageError, match=message):
        check_lora(backbone, wrong())
    assert not backbone.networks


def test_lora_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--adapter", type=LoRA)
    text = '{"rank": 8, "projections": ["q", "v"], "t_min": {"value": 0.7, "unit": "sigma"}}'
    made = parser.instantiate(parser.parse_args(["--adapter", text])).adapter
    assert made == LoRA(rank=8, projections=["q", "v"], t_min=Boundary(0.7, "sigma"))


# -- time --------------------------------------------------------------------------------------------------------------


@every_family
def test_a_gate_is_the_base_below_and_the_adapter_above(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint(name))
    with disabled(backbone):
        base = {t: predict(backbone, t) for t in (999.0, 700.0, 699.0, 300.0)}
    always = {t: predict(backbone, t) for t in base}
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    assert all(not torch.equal(base[t], always[t]) for t in base)
    gate = gate_by_time(backbone, 700.0)
    for t in base:
        assert torch.equal(predict(backbone, t), always[t] if t >= 700.0 else base[t]), t
    assert torch.equal(predict(backbone, 999.0), always[999.0])
    latents, times, text = denoising_inputs(backbone)
    times[1] = 300.0
    if len(backbone.networks) == 1:
        with pytest.raises(UsageError, match="both sides of the adapter's range 700 to 1000"):
            backbone.denoise(latents, times, text)
    gate.remove()
    for t in base:
        assert torch.equal(predict(backbone, t), always[t])
    assert flags == {n: p.requires_grad for n, p in backbone.named_parameters()}
    upper = gate_by_time(backbone, t_max=699.5)
    for t in base:
        assert torch.equal(predict(backbone, t), always[t] if t < 699.5 else base[t]), t
    upper.remove()


def test_gates_compose_with_each_other_with_disabled_and_with_failures(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    base = predict(backbone), predict(backbone, 300.0)
    inject(backbone, LoRA(t_min=Boundary(500.0)), name="high")
    inject(backbone, LoRA(t_max=Boundary(600.0)), name="low")
    train(backbone)
    with disabled(backbone, "low"):
        high = predict(backbone)
    with disabled(backbone, "high"):
        low = predict(backbone, 300.0)
    assert torch.equal(predict(backbone), high)
    assert torch.equal(predict(backbone, 300.0), low)
    assert not torch.equal(high, base[0])
    assert not torch.equal(low, base[1])
    with disabled(backbone):
        assert torch.equal(predict(backbone), base[0])
        assert torch.equal(predict(backbone, 300.0), base[1])

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    middle = predict(backbone, 550.0)
    handle = backbone.network.get_submodule("blocks.1").register_forward_hook(fail)
    for t in (900.0, 300.0):
        with pytest.raises(KeyError):
            predict(backbone, t)
    handle.remove()
    assert torch.equal(predict(backbone, 550.0), middle)
    assert torch.equal(predict(backbone), high)


def test_gates_that_close_together_open_together(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    inject(backbone, LoRA(t_min=Boundary(500.0)), name="wide")
    inject(backbone, LoRA(t_min=Boundary(600.0)), name="narrow")
    train(backbone)
    both, one = predict(backbone), predict(backbone, 550.0)
    predict(backbone, 300.0)
    assert torch.equal(predict(backbone), both)
    assert torch.equal(predict(backbone, 550.0), one)
    with disabled(backbone, "narrow"):
        assert torch.equal(predict(backbone, 550.0), one)
        assert not torch.equal(predict(backbone), both)


def test_a_deep_copy_is_gated_by_itself(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"), LoRA(t_min=Boundary(700.0)))
    above, below = predict(backbone), predict(backbone, 300.0)
    twin = copy.deepcopy(backbone)
    train(twin, seed=9)
    assert torch.equal(predict(twin, 300.0), below)
    assert not torch.equal(predict(twin), above)
    gate = adapters(twin)["muybridge"].gate
    assert gate is not None
    gate.remove()
    assert not torch.equal(predict(twin, 300.0), below)
    assert torch.equal(predict(backbone, 300.0), below)
    assert torch.equal(predict(backbone), above)
    alone = copy.deepcopy(backbone.network)
    [hook] = alone._forward_pre_hooks.values()
    assert hook.__self__.to_time.__self__ is backbone  # type: ignore[attr-defined]


def test_a_call_with_a_time_per_frame_lies_on_the_side_of_its_noisy_frames(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    latents, _, text = denoising_inputs(backbone)
    times = torch.full((2, latents.shape[2]), 800.0)
    times[:, 0] = 0.0  # a given first frame
    with torch.no_grad():
        always = backbone.denoise(latents, times, text)
        gate_by_time(backbone, 700.0)
        assert torch.equal(backbone.denoise(latents, times, text), always)
        with disabled(backbone):
            base = backbone.denoise(latents, times - 200.0 * (times > 0), text)
        assert torch.equal(backbone.denoise(latents, times - 200.0 * (times > 0), text), base)
        times[:, 1] = 300.0
        with pytest.raises(UsageError, match="both sides"):
            backbone.denoise(latents, times, text)


def test_a_label_in_bfloat16_is_the_time_it_was_rounded_from(tiny_checkpoint: Tiny) -> None:
    """Two of diffusers' pipelines cast it to the latents' dtype; a range that begins at a step begins with that step."""
    backbone = adapted(tiny_checkpoint("hunyuan"))
    layers = list(adapter_layers(backbone.network).values())
    acted: list[bool] = []
    layers[0].register_forward_hook(lambda *_: acted.append(not layers[0].disable_adapters))
    latents, _, text = denoising_inputs(backbone, samples=1)
    # Seven times of a sampler with a shift of 7, and what lies a little below each.
    for tau in (984.4, 965.5, 913.0, 823.5, 636.4, 343.2, 127.3):
        gate = gate_by_time(backbone, tau)
        for label, wanted in ((tau, True), (tau - 10.0, False)):
            for dtype in (torch.float32, torch.bfloat16):
                acted.clear()
                backbone._forward(latents, torch.tensor([label]).to(dtype), text)
                assert acted == [wanted], (tau, label, dtype)
        acted.clear()
        backbone._forward(latents, torch.tensor([tau - 0.1]), text)
        assert acted == [False], "in float32 a tenth of a timestep below is below"
        gate.remove()


@pytest.mark.parametrize("name", ["wan", "mochi", "unet3d"])
def test_the_gate_works_inside_a_diffusers_pipeline(name: str, tiny_checkpoint: Tiny) -> None:
    path = tiny_checkpoint(name)
    backbone = adapted(path)
    part = backbone.network_names[0]
    cls = getattr(diffusers, backbone.checkpoint.pipeline_class)
    pipe = cls.from_pretrained(path, **{part: backbone.network})
    pipe.set_progress_bar_config(disable=True)
    latents, _, _ = denoising_inputs(backbone, samples=1)
    frames = (latents.shape[2] - 1) * backbone.geometry.temporal + 1
    side = 8 * backbone.geometry.spatial
    label = (lambda t: 1000.0 - t) if name == "mochi" else (lambda t: t)

    def trajectory() -> dict[float, Tensor]:
        """Predictions of the network by our time."""
        seen: dict[float, Tensor] = {}

        def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            t = kwargs["timestep"] if "timestep" in kwargs else args[1]
            seen[label(float(torch.as_tensor(t).flatten()[0]))] = out[0].clone()

        handle = backbone.network.register_forward_hook(note, with_kwargs=True)
        pipe(
            prompt="a dog",
            height=side,
            width=side,
            num_frames=frames,
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=latents.clone(),
            output_type="latent",
        )
        handle.remove()
        return seen

    always = trajectory()
    tau = sorted(always)[1] + 0.5
    gate = gate_by_time(backbone, tau)
    gated = trajectory()
    gate.remove()
    assert list(always) == list(gated)
    before, after = [t for t in always if t >= tau], [t for t in always if t < tau]
    assert before
    assert after
    assert all(torch.equal(always[t], gated[t]) for t in before)
    assert not any(torch.equal(always[t], gated[t]) for t in after)
    again = trajectory()
    assert all(torch.equal(always[t], again[t]) for t in always)


def test_a_gate_needs_an_adapter(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match="carries no adapter"):
        gate_by_time(backbone, 700.0)
    with pytest.raises(UsageError, match="carries no adapter called 'muybridge'"):
        remove_adapter(backbone)


# -- recomputation -----------------------------------------------------------------------------------------------------


def two_passes(backbone: Backbone, switch: str) -> dict[str, Tensor]:
    """Gradients of one adapted and one base pass, with the backward after the switch was turned back."""
    latents, times, text = denoising_inputs(backbone)
    noisy = latents.clone().requires_grad_()
    student = backbone.denoise(noisy, times, text)
    if switch == "disabled":
        with disabled(backbone):
            frozen = backbone.denoise(noisy, times - 600.0, text)
    else:
        frozen = backbone.denoise(noisy, times - 600.0, text)
        backbone.denoise(latents, times, text)  # opens the gate again
    (student * frozen).mean().backward()
    assert noisy.grad is not None
    found = {"latents": noisy.grad}
    for name, parameter in adapter_parameters(backbone).items():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("switch", ["disabled", "gate"])
@every_family
def test_switching_before_backward_gives_right_gradients_under_checkpointing(
    name: str, switch: str, tiny_checkpoint: Tiny
) -> None:
    lora = LoRA(t_min=Boundary(700.0)) if switch == "gate" else LoRA()
    plain = two_passes(adapted(tiny_checkpoint(name), lora), switch)
    recomputed = two_passes(adapted(tiny_checkpoint(name), lora, gradient_checkpointing=True), switch)
    assert set(plain) == set(recomputed)
    assert len(plain) > 4
    for key, gradient in plain.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-5 * scale, rtol=1e-4)


def test_checkpointing_that_does_not_know_the_switches_fails_loudly(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    plain = two_passes(adapted(tiny_checkpoint("wan")), "disabled")
    backbone.network.enable_gradient_checkpointing()  # type: ignore[operator]
    with pytest.raises(CheckpointError):
        two_passes(backbone, "disabled")
    # Held until after the backward pass, it is right there too.
    latents, times, text = denoising_inputs(backbone)
    noisy = latents.clone().requires_grad_()
    student = backbone.denoise(noisy, times, text).detach()
    with disabled(backbone):
        (student * backbone.denoise(noisy, times - 600.0, text)).mean().backward()
    reference = adapted(tiny_checkpoint("wan"))
    again = latents.clone().requires_grad_()
    student = reference.denoise(again, times, text).detach()
    with disabled(reference):
        frozen = reference.denoise(again, times - 600.0, text)
    (student * frozen).mean().backward()
    torch.testing.assert_close(noisy.grad, again.grad, atol=1e-8, rtol=1e-4)
    assert not torch.allclose(noisy.grad, plain["latents"])


# -- files -------------------------------------------------------------------------------------------------------------


@every_family
def test_saved_and_loaded_is_the_same(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    lora = LoRA(rank=3, alpha=7.0, t_min=Boundary(0.6, "sigma"))
    backbone = adapted(tiny_checkpoint(name), lora)
    files = save_adapter(backbone, tmp_path / "motion.safetensors")
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert len(files) == len(adapters(backbone)["muybridge"].networks)
    other, ungated = open_tiny(tiny_checkpoint(name)).requires_grad_(False), open_tiny(tiny_checkpoint(name))
    base = {t: predict(other, t) for t in (950.0, 100.0)}
    for file in files:
        made = load_adapter(other, file)
        load_adapter(ungated, file, gate=False)
    expected = adapters(backbone)["muybridge"]
    assert (made.networks, made.t_min, made.t_max) == (expected.networks, expected.t_min, expected.t_max)
    assert made.gate is not None
    assert torch.equal(predict(other), predict(backbone))
    assert torch.equal(predict(other, 100.0), base[100.0])
    assert not torch.equal(predict(ungated, 100.0), base[100.0])
    assert all(p.requires_grad == (".lora_" not in n) for n, p in ungated.named_parameters())
    with safe_open(files[0], "pt") as file:
        header = json.loads(file.metadata()["muybridge"])
    assert (header["family"], header["t_min"]) == (backbone.family, expected.t_min)


LOADERS = ["wan", "cogvideox", "cogvideox_rope", "hunyuan", "ltx", "mochi", "animatediff"]


def through_diffusers(path: Path, file: Path, **options: Any) -> Backbone:
    """A backbone around the network of a pipeline that diffusers loaded the file into."""
    backbone = open_tiny(path)
    pipe = getattr(diffusers, backbone.checkpoint.pipeline_class).from_pretrained(path)
    pipe.load_lora_weights(str(file), adapter_name="motion", **options)
    for name in backbone.networks:
        backbone.networks[name] = getattr(pipe, name).eval()
    return backbone


@pytest.mark.parametrize("name", LOADERS)
def test_diffusers_pipelines_load_the_file(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tiny_checkpoint(name)
    backbone = adapted(path, LoRA(rank=4, alpha=8.0))
    [file] = save_adapter(backbone, tmp_path / "motion.safetensors")
    torch.testing.assert_close(predict(through_diffusers(path, file)), predict(backbone), atol=1e-6, rtol=1e-5)


def test_every_family_is_either_loaded_by_diffusers_or_known_not_to_be() -> None:
    assert set(FAMILIES) == {*LOADERS, "wan22", "latte", "unet3d"}
    assert not hasattr(diffusers.LattePipeline, "load_lora_weights")
    assert not hasattr(diffusers.UNet3DConditionModel, "load_lora_adapter")


def test_each_expert_has_its_file(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tiny_checkpoint("wan22")
    high = adapted(path, LoRA(t_min=Boundary(875.0)))
    assert adapters(high)["muybridge"].networks == ("transformer",)
    assert adapters(high)["muybridge"].gate is None  # the expert's own range is the gate
    both = adapted(path, LoRA(t_min=Boundary(700.0), alpha=8.0))
    assert adapters(both)["muybridge"].networks == ("transformer", "transformer_2")
    files = save_adapter(both, tmp_path / "motion.safetensors")
    assert [f.name for f in files] == ["motion_transformer.safetensors", "motion_transformer_2.safetensors"]
    with pytest.raises(UsageError, match=r"next to it lies motion_transformer\.safetensors"):
        load_adapter(both, tmp_path / "motion.safetensors", name="other")

    pipe = diffusers.WanPipeline.from_pretrained(path)
    pipe.load_lora_weights(str(files[0]), adapter_name="motion")
    pipe.load_lora_weights(str(files[1]), adapter_name="motion", load_into_transformer_2=True)
    theirs = open_tiny(path)
    theirs.networks["transformer"], theirs.networks["transformer_2"] = pipe.transformer, pipe.transformer_2
    for t in (900.0, 800.0):
        assert torch.equal(predict(theirs, t), predict(both, t))

    low = adapted(path, LoRA(networks=["transformer_2"]))
    [file] = save_adapter(low, tmp_path / "low.safetensors")
    again = open_tiny(path)
    assert load_adapter(again, file).networks == ("transformer_2",)
    assert torch.equal(predict(again, 800.0), predict(low, 800.0))
    other_range = adapted(path, LoRA(networks=["transformer"], t_min=Boundary(900.0)))
    [file] = save_adapter(other_range, tmp_path / "high.safetensors")
    with pytest.raises(UsageError, match="one range for the files of one adapter"):
        load_adapter(again, file)


def test_ranks_and_scales_may_differ_between_layers(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tiny_checkpoint("wan")
    wide, narrow = adapted(path, LoRA(rank=6, alpha=3.0)), adapted(path, LoRA(rank=2, alpha=4.0))
    mixed = {}
    for backbone, block in ((wide, "blocks.0."), (narrow, "blocks.1.")):
        [file] = save_adapter(backbone, tmp_path / "part.safetensors")
        mixed |= {k: v for k, v in load_file(file).items() if block in k}
    said = {
        "transformer.r": 6,
        "transformer.lora_alpha": 3.0,
        "transformer.target_modules": ["to_v", "to_out.0"],
        "transformer.rank_pattern": {r"blocks\.1\.attn1\.(?:to_v|to_out\.0)": 2},
        "transformer.alpha_pattern": {r"blocks\.1\.attn1\.(?:to_v|to_out\.0)": 4.0},
    }
    save_file(mixed, tmp_path / "mixed.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    ours = open_tiny(path)
    load_adapter(ours, tmp_path / "mixed.safetensors")
    theirs = through_diffusers(path, tmp_path / "mixed.safetensors")
    torch.testing.assert_close(predict(ours), predict(theirs), atol=1e-6, rtol=1e-5)
    [file] = save_adapter(ours, tmp_path / "again.safetensors")
    torch.testing.assert_close(predict(through_diffusers(path, file)), predict(ours), atol=1e-6, rtol=1e-5)


def test_a_file_that_does_not_say_its_scale_is_loaded_with_a_warning(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint("wan"), LoRA(rank=4))
    [file] = save_adapter(backbone, tmp_path / "motion.safetensors")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    other = open_tiny(tiny_checkpoint("wan"))
    with pytest.warns(UserWarning, match="alpha = rank is assumed"):
        load_adapter(other, tmp_path / "bare.safetensors", trainable=True)
    assert torch.equal(predict(other), predict(backbone))
    assert all(p.requires_grad for p in adapter_parameters(other).values())


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    backbone = adapted(tiny_checkpoint("wan"))
    [file] = save_adapter(backbone, tmp_path / "motion.safetensors")
    before = file.read_bytes()
    real = safetensors.torch.save_file

    def full_disk(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if metadata is not None:
            real(tensors, filename, metadata)
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    train(backbone, seed=5)
    with pytest.raises(OSError, match="no space"):
        save_adapter(backbone, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(safetensors.torch, "save_file", real)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(backbone, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def broken(kind: str, good: Path, out: Path) -> Path:
    """A copy of an adapter file with something wrong."""
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        header = dict(file.metadata())
    first = next(k for k in tensors if "lora_A" in k)
    second = first.replace("lora_A", "lora_B")
    if kind == "truncated":
        out.write_bytes(good.read_bytes()[:-200])
        return out
    if kind == "text":
        out.write_text("this is no adapter")
        return out
    if kind == "empty":
        tensors = {}
    elif kind == "weights":
        tensors = {"transformer.blocks.0.attn1.to_v.weight": torch.zeros(24, 24)}
    elif kind == "other names":
        tensors = {"blocks.0.something": torch.zeros(3)}
    elif kind == "text encoder":
        tensors["text_encoder.layers.0.lora_A.weight"] = torch.zeros(4, 8)
    elif kind == "other size":
        tensors[first] = torch.zeros(4, 999)
    elif kind == "rank 0":
        tensors[first], tensors[second] = tensors[first][:0].clone(), tensors[second][:, :0].clone()
    elif kind == "half":
        del tensors[second]
    elif kind == "infinite":
        tensors[first] = tensors[first] * float("inf")
    elif kind == "other layer":
        tensors = {k.replace("attn1", "attn7"): v for k, v in tensors.items()}
    elif kind == "bad header":
        header["muybridge"] = "{"
    elif kind == "dora":
        said = json.loads(header["lora_adapter_metadata"])
        header["lora_adapter_metadata"] = json.dumps(said | {"transformer.use_dora": True})
    elif kind == "musubi":
        renamed = {}
        for key, value in tensors.items():
            block, layer = re.match(r"transformer\.blocks\.(\d+)\.attn1\.(to_v|to_out\.0)", key).groups()  # type: ignore[union-attr]
            side = "lora_down" if "lora_A" in key else "lora_up"
            renamed[f"lora_unet_blocks_{block}_self_attn_{'v' if layer == 'to_v' else 'o'}.{side}.weight"] = value
        tensors = renamed
    save_file(tensors, out, metadata=header)
    return out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "can't be read as safetensors"),
        ("text", "can't be read as safetensors"),
        ("empty", "holds no LoRA"),
        ("weights", "no plain LoRA matrix"),
        ("other names", "holds no LoRA of Wan"),
        ("text encoder", "also holds text_encoder"),
        ("other size", "shapes"),
        ("rank 0", "rank r of at least 1"),
        ("half", "only half"),
        ("infinite", "not finite"),
        ("other layer", "does not have"),
        ("bad header", "is not JSON"),
        ("dora", "use_dora"),
        ("musubi", "can't convert the names"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(
    kind: str, message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    [good] = save_adapter(backbone, tmp_path / "good.safetensors")
    other = open_tiny(tiny_checkpoint("wan"))
    names = set(other.state_dict())
    with pytest.raises(UsageError, match=message):
        load_adapter(other, broken(kind, good, tmp_path / "broken.safetensors"))
    assert set(other.state_dict()) == names
    assert not adapters(other)


def test_other_ways_to_be_wrong_about_files(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    [file] = save_adapter(backbone, tmp_path / "motion.safetensors")
    with pytest.raises(UsageError, match="an adapter of Wan"):
        load_adapter(open_tiny(tiny_checkpoint("ltx")), file)
    with pytest.raises(UsageError, match="already"):
        load_adapter(backbone, file)
    with pytest.raises(UsageError, match="for the network 'transformer_2'"):
        load_adapter(backbone, file, name="other", network="transformer_2")
    with pytest.raises(UsageError, match="there is no adapter file"):
        load_adapter(backbone, tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        save_adapter(backbone, tmp_path / "motion.pt")
    with pytest.raises(UsageError, match="did you mean comfyui"):
        save_adapter(backbone, file, format="comfy")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="carries no adapter called 'motion'"):
        save_adapter(backbone, file, name="motion")
    with pytest.raises(UsageError, match="without dots"):
        load_adapter(backbone, file, name="a.b")


# -- ComfyUI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "ltx"])
@pytest.mark.parametrize("alpha", [None, 2.0, 6.0])
def test_comfyui_files_read_back_the_same(
    name: str, alpha: float | None, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = tiny_checkpoint(name)
    lora = LoRA(rank=4, alpha=alpha, targets=r".*\.attn[12]\.(?:to_q|to_v|to_out\.0)|.*\.net\.2")
    backbone = adapted(path, lora)
    [file] = save_adapter(backbone, tmp_path / "comfy.safetensors", format="comfyui")
    keys = list(load_file(file))
    assert all(key.startswith("diffusion_model.") for key in keys)
    if name == "wan":
        assert "diffusion_model.blocks.0.self_attn.o.lora_down.weight" in keys
        assert "diffusion_model.blocks.0.self_attn.o.alpha" in keys
    expected = predict(backbone)
    torch.testing.assert_close(predict(through_diffusers(path, file)), expected, atol=1e-5, rtol=1e-5)
    ours = open_tiny(path)
    load_adapter(ours, file)
    torch.testing.assert_close(predict(ours), expected, atol=1e-5, rtol=1e-5)


def test_a_time_range_is_not_lost_in_silence(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint("wan"), LoRA(t_min=Boundary(700.0)))
    with pytest.warns(UserWarning, match=r"ComfyUI files can't say(.|\n)*700 to 1000"):
        [file] = save_adapter(backbone, tmp_path / "comfy.safetensors", format="comfyui")
    again = open_tiny(tiny_checkpoint("wan"))
    assert load_adapter(again, file).t_min == 700.0  # our own header still knows
    assert torch.equal(predict(again), predict(backbone))


def test_hunyuans_fused_layers_change_exactly_what_was_adapted(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint("hunyuan"), LoRA(rank=2, alpha=3.0))
    [file] = save_adapter(backbone, tmp_path / "comfy.safetensors", format="comfyui")
    tensors = load_file(file)
    network = backbone.network
    for block, layers in (
        ("double_blocks.0.img_attn_qkv", "transformer_blocks.0.attn"),
        ("single_blocks.0.linear1", "single_transformer_blocks.0.attn"),
    ):
        down, up = (tensors[f"diffusion_model.{block}.lora_{x}.weight"].double() for x in "AB")
        layer: Any = network.get_submodule(f"{layers}.to_v")
        a, b = layer.lora_A["muybridge"].weight.double(), layer.lora_B["muybridge"].weight.double()
        width = layer.out_features
        change = up @ down
        torch.testing.assert_close(change[2 * width : 3 * width], 1.5 * b @ a, atol=1e-6, rtol=1e-6)
        assert not change[: 2 * width].any()
        assert not change[3 * width :].any()
    mlp: Any = network.get_submodule("single_transformer_blocks.0.proj_mlp")
    assert tensors["diffusion_model.single_blocks.0.linear1.lora_B.weight"].shape[0] == 3 * width + mlp.out_features
    assert "diffusion_model.double_blocks.0.img_attn_proj.lora_A.weight" in tensors


def test_diffusers_takes_hunyuans_fused_layers_apart_again() -> None:
    # Its converter knows the released model's width only, so the matrices have that.
    width, mlp, generator = 3072, 4 * 3072, torch.Generator().manual_seed(0)
    block = "single_transformer_blocks.3"
    outputs = {f"{block}.attn.to_{x}": width for x in "qkv"} | {f"{block}.proj_mlp": mlp}
    outputs |= {f"transformer_blocks.1.attn.to_{x}": width for x in "qkv"}

    def some(module: str, rank: int, alpha: float) -> LowRank:
        up = torch.randn(outputs.get(module, width), rank, generator=generator)
        return LowRank(torch.randn(rank, width, generator=generator), up, alpha)

    layers = {
        f"{block}.attn.to_v": some(f"{block}.attn.to_v", 2, 4.0),
        f"{block}.proj_mlp": some(f"{block}.proj_mlp", 3, 3.0),
        "transformer_blocks.1.attn.to_q": some("transformer_blocks.1.attn.to_q", 2, 2.0),
        "transformer_blocks.1.attn.to_v": some("transformer_blocks.1.attn.to_v", 1, 5.0),
        "transformer_blocks.1.attn.to_out.0": some("transformer_blocks.1.attn.to_out.0", 2, 1.0),
    }
    converted = diffusers.HunyuanVideoPipeline.lora_state_dict(to_comfyui("HunyuanVideo", layers, outputs))
    found = {}
    for key in converted:
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            down, up = converted[key], converted[key.replace("lora_A", "lora_B")]
            found[module] = (down, up)
    assert set(layers) < set(found)
    for module, (down, up) in found.items():
        if module in layers:
            layer = layers[module]
            expected = layer.alpha / layer.rank * layer.up[::97].double() @ layer.down[:, ::31].double()
            torch.testing.assert_close(up[::97].double() @ down[:, ::31].double(), expected, atol=1e-4, rtol=1e-5)
        else:
            # What was not adapted does not change: no rank of it has both an input and an output.
            assert not (up.abs().sum(0) * down.abs().sum(1)).any()


@pytest.mark.parametrize("name", ["cogvideox", "latte", "unet3d", "mochi", "animatediff"])
def test_families_without_comfyui_names_say_so(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint(name))
    with pytest.raises(UsageError, match="no native ComfyUI naming"):
        save_adapter(backbone, tmp_path / "comfy.safetensors", format="comfyui")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "targets"), [("wan", "proj_out"), ("hunyuan", r"context_embedder\..*\.to_v")])
def test_layers_without_comfyui_names_say_so(name: str, targets: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = adapted(tiny_checkpoint(name), LoRA(targets=targets))
    with pytest.raises(UsageError, match="has no name in ComfyUI"):
        save_adapter(backbone, tmp_path / "comfy.safetensors", format="comfyui")
