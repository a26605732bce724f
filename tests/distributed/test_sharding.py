"""A sharded network computes what the whole one does: predictions, gradients, for every family, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from support.backbones import small_call
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from muybridge import backbones
from muybridge.backbones.adapters import LoRA, inject
from muybridge.backbones.base import Backbone
from muybridge.backbones.sharding import full, local, reshard, shard
from muybridge.errors import UsageError
from muybridge.tiny import MAKERS

Tiny = Callable[[str], Path]


def opened(path: str, lora: bool = False, **options: Any) -> Backbone:
    backbone = backbones.load(path, **options)
    if lora:
        inject(backbone, LoRA(rank=2))
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for p in backbone.parameters() if p.requires_grad):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    else:
        backbone.networks.requires_grad_(True)
    return backbone


def gradients(backbone: Backbone, rank: int = 0, ranks: int = 1) -> tuple[float, dict[str, Tensor]]:
    """The loss on this rank's share of four samples, and the whole gradients."""
    latents, t, text = small_call(backbone, 4)
    mine = slice(rank, None, ranks)
    loss = backbone(latents[mine], t[mine], text[list(range(rank, 4, ranks))]).float().square().mean()
    loss.backward()
    return float(loss.detach()), {n: full(p.grad).clone() for n, p in backbone.named_parameters() if p.grad is not None}


def one_mesh(replicate: int = 1) -> Any:
    dist.init_process_group("gloo")
    if replicate == 1:
        return init_device_mesh("cpu", (dist.get_world_size(),))
    return init_device_mesh(
        "cpu", (replicate, dist.get_world_size() // replicate), mesh_dim_names=("replicate", "shard")
    )


def sharded_gradients(
    path: str, lora: bool, replicate: int, checkpointing: bool, reshard_after: bool, offload: bool
) -> Any:
    mesh = one_mesh(replicate)
    backbone = opened(path, lora, gradient_checkpointing=checkpointing)
    shard(backbone, mesh, reshard_after_forward=reshard_after, cpu_offload=offload)
    units = sum(isinstance(m, FSDPModule) for m in backbone.modules())
    assert units == len(backbone.blocks()) + len(backbone.networks)
    assert all(isinstance(p, DTensor) for p in backbone.parameters())
    loss, found = gradients(backbone, dist.get_rank(), dist.get_world_size())
    return loss, found


def compare(path: Path, lora: bool = False, replicate: int = 1, **how: bool) -> None:
    options = {"checkpointing": False, "reshard_after": True, "offload": False, **how}
    loss, wanted = gradients(opened(str(path), lora))
    ranks = run_ranks(sharded_gradients, str(path), lora, replicate, *options.values())
    assert sum(r[0] for r in ranks) / len(ranks) == pytest.approx(loss, rel=1e-5)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for _, found in ranks:
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * largest), name


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "wan"])
def test_two_shards_give_the_gradients_of_one_process(name: str, tiny_checkpoint: Tiny) -> None:
    compare(tiny_checkpoint(name))


@pytest.mark.parametrize("name", ["wan", "cogvideox", "unet3d"])
def test_frozen_and_adapter_weights_share_a_unit(name: str, tiny_checkpoint: Tiny) -> None:
    compare(tiny_checkpoint(name), lora=True)


@pytest.mark.parametrize(
    "how",
    [dict(checkpointing=True), dict(reshard_after=False, replicate=2), dict(offload=True)],
    ids=["recomputation", "replicas", "offload"],
)
def test_options_change_memory_and_not_gradients(how: dict[str, Any], tiny_checkpoint: Tiny) -> None:
    compare(tiny_checkpoint("wan"), **how)


# -- reshard -----------------------------------------------------------------------------------------------------------


def after_a_look(path: str) -> tuple[bool, bool, Tensor, Tensor]:
    backbone = shard(opened(path), one_mesh(), reshard_after_forward=False)
    with torch.no_grad():
        backbone(*small_call(backbone))
        gathered = not any(isinstance(p, DTensor) for p in backbone.parameters())
        reshard(backbone)
        parts = all(isinstance(p, DTensor) for p in backbone.parameters())
        for parameter in backbone.parameters():
            local(parameter).zero_()
        return gathered, parts, full(next(backbone.parameters())).clone(), backbone(*small_call(backbone))


def test_parameters_can_be_written_after_a_forward_without_gradients(tiny_checkpoint: Tiny) -> None:
    for gathered, parts, weight, output in run_ranks(after_a_look, str(tiny_checkpoint("wan"))):
        assert gathered, "nothing to reshard: the test does not test"
        assert parts
        assert not weight.any()
        assert not output.any()


# -- mixed precision ---------------------------------------------------------------------------------------------------


def in_bfloat16(path: str, t: float) -> tuple[Tensor, float, set[str], set[str]]:
    backbone = shard(opened(path), one_mesh(), param_dtype=torch.bfloat16)
    times: list[float] = []
    backbone.network.register_forward_pre_hook(lambda m, a, k: times.append(float(k["timestep"][0])), with_kwargs=True)
    output = backbone(*small_call(backbone, t=t))
    output.float().square().mean().backward()
    weights = {str(p.dtype) for p in backbone.parameters()}
    return output.detach(), times[0], weights, {str(p.grad.dtype) for p in backbone.parameters() if p.grad is not None}


def test_bfloat16_computes_as_a_bfloat16_network_and_does_not_round_times(tiny_checkpoint: Tiny) -> None:
    path, t = str(tiny_checkpoint("wan")), 937.3
    exact, low = opened(path), opened(path, dtype="bfloat16")
    with torch.no_grad():
        wanted, native = exact(*small_call(exact, t=t)), low(*small_call(low, t=t))
    native_error = float((native.float() - wanted).norm() / wanted.norm())
    for output, seen, weights, grads in run_ranks(in_bfloat16, path, t):
        assert output.dtype == torch.bfloat16
        assert seen == pytest.approx(t, abs=1e-4)
        assert weights == grads == {"torch.float32"}
        assert float((output.float() - wanted).norm() / wanted.norm()) < 2 * native_error + 1e-3


def low_adapter(path: str, train_base: bool) -> Optional[str]:
    backbone = opened(path, lora=True, dtype="bfloat16")
    if train_base:
        backbone.networks.requires_grad_(True)
    try:
        shard(backbone, one_mesh())
    except UsageError as error:
        return str(error)
    _, found = gradients(backbone, dist.get_rank(), 2)
    assert found
    assert all(g.dtype == torch.float32 for g in found.values())
    return None


def test_a_float32_adapter_trains_on_a_frozen_bfloat16_base(tiny_checkpoint: Tiny) -> None:
    assert run_ranks(low_adapter, str(tiny_checkpoint("wan")), False) == [None, None]


def test_training_weights_of_two_dtypes_is_refused_before_it_fails_inside(tiny_checkpoint: Tiny) -> None:
    for message in run_ranks(low_adapter, str(tiny_checkpoint("wan")), True):
        assert "torch.bfloat16 and torch.float32" in message
