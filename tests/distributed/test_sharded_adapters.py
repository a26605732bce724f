"""Adapters, gates and taps on a sharded network: the same file, the same switching, the same attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from support.denoising import denoising_inputs, open_tiny
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from muybridge.backbones import Backbone
from muybridge.backbones.adapters import (
    LoRA,
    adapter_parameters,
    inject,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from muybridge.backbones.sharding import full, shard
from muybridge.backbones.taps import AttentionTap
from muybridge.diffusion import Boundary
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
# The layers of proj_out belong to no block, so they are in the root unit, which stays gathered after a forward pass.
LORA = LoRA(alpha=8.0, targets=r"blocks\.\d+\.attn1\.to_v|proj_out", t_min=Boundary(700.0))


def prepared(path: Path) -> Backbone:
    backbone = open_tiny(path, gradient_checkpointing=True)
    inject(backbone, LORA)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(backbone).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return backbone


def measured(backbone: Backbone) -> dict[str, Tensor]:
    """Predictions on both sides of the gate, maps, and gradients of a pass above and a pass below it together."""
    found = {}
    latents, times, text = denoising_inputs(backbone)
    for t in (900.0, 300.0):
        tap = AttentionTap(backbone, kind=("temporal", "cross"))
        with torch.no_grad():
            found[f"prediction at {t}"] = tap.run(lambda: backbone.denoise(latents, times * (t / 900.0), text))  # noqa: B023
        for record in tap.records:
            found[f"{record.name} at {t}"] = record.attention_map()
    above, below = (backbone.denoise(latents, times - d, text) for d in (0.0, 600.0))
    (above * below).mean().backward()
    for name, parameter in adapter_parameters(backbone).items():
        assert parameter.grad is not None
        found[name] = full(parameter.grad)
    return found


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except UsageError as error:
        return str(error)
    return "not refused"


def on_ranks(path: str, out: str) -> Any:
    dist.init_process_group("gloo")
    backbone = prepared(Path(path))
    shard(backbone, init_device_mesh("cpu", (dist.get_world_size(),)))
    found = measured(backbone)
    with torch.no_grad():
        latents, times, text = denoising_inputs(backbone)
        backbone.denoise(latents, times, text)
    save_adapter(backbone, out)
    refused = [
        refusal(lambda: AttentionTap(backbone, early_exit=True)),
        refusal(lambda: inject(backbone, LoRA(), name="second")),
        refusal(lambda: merge_adapter(backbone, drop_range=True)),
    ]
    return found, refused


def test_sharding_changes_nothing_about_adapters_and_taps(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path, file = tiny_checkpoint("wan"), tmp_path / "motion.safetensors"
    whole = prepared(path)
    expected = measured(whole)
    ranks = run_ranks(on_ranks, str(path), str(file))
    for found, refused in ranks:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            largest = float(value.abs().max())
            torch.testing.assert_close(found[name], value, atol=1e-5 * largest, rtol=1e-4, msg=name)
        assert "early_exit on a sharded network" in refused[0]
        assert "sharded already" in refused[1]
        assert "sharded already" in refused[2]
    assert list(tmp_path.iterdir()) == [file]
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["muybridge"])["t_min"] == 700.0
    loaded = open_tiny(path)
    load_adapter(loaded, file)
    for (name, parameter), (other, value) in zip(
        adapter_parameters(whole).items(), adapter_parameters(loaded).items(), strict=True
    ):
        assert name == other
        assert torch.equal(parameter, value)
