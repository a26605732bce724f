"""Cutting a backbone's networks for FSDP2, one unit per block.

``fully_shard`` replaces each parameter by a DTensor of which every rank holds a part, and gathers a block's parameters only
while the block runs. Nothing else changes: names, ``state_dict``, adapters and hooks stay what they were.
"""

from __future__ import annotations

import warnings
from typing import Optional

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from muybridge.backbones.base import Backbone
from muybridge.errors import UsageError


def shard(
    backbone: Backbone,
    mesh: DeviceMesh,
    param_dtype: Optional[torch.dtype] = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> Backbone:
    """Shard the backbone's networks in place: each block is a unit, and what is left of a network is one more.

    Call it after adapters are injected and parameters are frozen or not, and before optimizers and averages are made.
    Frozen and trained parameters may share a unit; those that are trained must have one dtype.

    Args:
        backbone: A materialized backbone.
        mesh: One dimension shards over its ranks; two replicate over the first and shard over the second (HSDP).
        param_dtype: Gather and compute in this dtype, while the shards that the optimizer sees keep theirs.
        reduce_dtype: Dtype in which gradients are summed over ranks, where ``param_dtype`` is given.
        reshard_after_forward: Give a block's memory back between forward and backward, at the price of gathering it twice.
        cpu_offload: Keep shards, gradients and optimizer states in CPU memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if not backbone.networks:
        raise RuntimeError("shard() after materialize(): there is no network yet")
    if any(isinstance(network, FSDPModule) for network in backbone.networks.values()):
        return backbone
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    precision = MixedPrecisionPolicy()
    if param_dtype is not None:
        # Inputs are not cast by the units: that would round times (937 is 936 in bfloat16) and rotary angles. Instead the
        # backbone hands its networks latents and text in this dtype, as if they had been loaded in it.
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        backbone.dtype = param_dtype
    for name, network in backbone.networks.items():
        dtypes = {str(p.dtype) for p in network.parameters() if p.requires_grad}
        if len(dtypes) > 1:
            raise UsageError(
                f"{name} trains weights of {' and '.join(sorted(dtypes))}",
                "one dtype for all that is trained, or FSDP2 cannot sum their gradients together",
                "load the backbone with dtype: float32, or train the adapter alone",
            )
    # It warns of in-place changes of a network's output, which may be a view. Nothing in this toolkit makes any.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module .* returned a view tensor")
    for module in [*backbone.blocks(), *backbone.networks.values()]:
        fully_shard(
            module, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard_after_forward
        )
    return backbone


def reshard(module: nn.Module) -> None:
    """Bring every FSDP2 unit below ``module`` back to its shards; nothing to do where there are none.

    After a forward without gradients a network's root unit stays gathered. Its parameters are then plain tensors that the
    next forward throws away, beside blocks whose parameters are DTensors: reading them mixes the two, and writing to them
    is lost. So this comes before anything that touches parameters.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all ranks (all must call); a plain tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
