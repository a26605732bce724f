"""LoRA in the names and shapes of the original releases, which is what ComfyUI's native models load.

ComfyUI multiplies by ``alpha/rank`` only where a file has a ``.alpha`` for the key, and by 1 otherwise. Wan's files get one,
as is usual for them. diffusers reads no ``.alpha`` of the other families, so there the factor is multiplied into the upper
matrix, which every reader understands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muybridge.errors import UsageError


@dataclass(frozen=True)
class LowRank:
    """One layer's ``ΔW = (alpha/rank) · up · down``.

    Args:
        down: (rank, inputs), peft's ``lora_A``.
        up: (outputs, rank), peft's ``lora_B``.
        alpha: The scale's numerator.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]

    def folded(self) -> LowRank:
        """The same change of weight with ``alpha`` equal to the rank."""
        return replace(self, up=self.up * (self.alpha / self.rank), alpha=float(self.rank))


def fuse(parts: Mapping[int, LowRank], sizes: list[int]) -> LowRank:
    """Several layers with one input as one layer with all their outputs, exactly.

    The lower matrices are stacked, the upper ones become the blocks of a block matrix; rows of layers that have no part stay
    zero. A LoRA of V alone so becomes a LoRA of the fused QKV that leaves Q and K as they are.

    Args:
        parts: Which of the outputs each one is of.
        sizes: Outputs of every layer, those without a part too.
    """
    folded = {i: parts[i].folded() for i in sorted(parts)}
    down = torch.cat([p.down for p in folded.values()])
    up = down.new_zeros(sum(sizes), down.shape[0])
    column = 0
    for i, part in folded.items():
        row = sum(sizes[:i])
        up[row : row + sizes[i], column : column + part.rank] = part.up
        column += part.rank
    return LowRank(down, up, float(down.shape[0]))


def _no_name(family: str, module: str) -> UsageError:
    return UsageError(
        f"{family}'s layer {module} has no name in ComfyUI that is known here",
        "an adapter on attention and feed-forward layers",
        "save it with format diffusers",
    )


_WAN = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def _wan(layers: Mapping[str, LowRank], outputs: Mapping[str, int]) -> dict[str, Tensor]:
    tensors = {}
    for module, layer in layers.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
        if match is None or match[2] not in _WAN:
            raise _no_name("Wan", module)
        key = f"diffusion_model.{match[1]}.{_WAN[match[2]]}"
        tensors[f"{key}.lora_down.weight"] = layer.down
        tensors[f"{key}.lora_up.weight"] = layer.up
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer_blocks": {"img_attn_qkv": _QKV, "txt_attn_qkv": _ADDED},
    "single_transformer_blocks": {"linear1": (*_QKV, "proj_mlp")},
}
_RENAMED: dict[str, dict[str, str]] = {
    "transformer_blocks": {
        "attn.to_out.0": "img_attn_proj",
        "attn.to_add_out": "txt_attn_proj",
        "ff.net.0.proj": "img_mlp.fc1",
        "ff.net.2": "img_mlp.fc2",
        "ff_context.net.0.proj": "txt_mlp.fc1",
        "ff_context.net.2": "txt_mlp.fc2",
    },
    "single_transformer_blocks": {"proj_out": "linear2"},
}
_ORIGINAL = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def _hunyuan(layers: Mapping[str, LowRank], outputs: Mapping[str, int]) -> dict[str, Tensor]:
    found: dict[str, LowRank] = {}
    fused: dict[str, tuple[list[str], dict[int, LowRank]]] = {}
    for module, layer in layers.items():
        match = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)", module)
        if match is None:
            raise _no_name("HunyuanVideo", module)
        kind, index, name = match.groups()
        block = f"diffusion_model.{_ORIGINAL[kind]}.{index}"
        if name in _RENAMED[kind]:
            found[f"{block}.{_RENAMED[kind][name]}"] = layer.folded()
            continue
        target = next((t for t, parts in _FUSED[kind].items() if name in parts), None)
        if target is None:
            raise _no_name("HunyuanVideo", module)
        names = _FUSED[kind][target]
        siblings = [f"{kind}.{index}.{part}" for part in names]
        fused.setdefault(f"{block}.{target}", (siblings, {}))[1][names.index(name)] = layer
    for key, (siblings, parts) in fused.items():
        found[key] = fuse(parts, [outputs[sibling] for sibling in siblings])
    return _as_ab(found)


def _ltx(layers: Mapping[str, LowRank], outputs: Mapping[str, int]) -> dict[str, Tensor]:
    return _as_ab({f"diffusion_model.{module}": layer.folded() for module, layer in layers.items()})


def _as_ab(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for key, layer in layers.items():
        tensors[f"{key}.lora_A.weight"] = layer.down
        tensors[f"{key}.lora_B.weight"] = layer.up
    return tensors


_FAMILIES = {"Wan": _wan, "HunyuanVideo": _hunyuan, "LTX": _ltx}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Families whose adapters can be written in ComfyUI's native names."""


def to_comfyui(family: str, layers: Mapping[str, LowRank], outputs: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a ComfyUI file.

    Args:
        family: The backbone's family.
        layers: By the layer's name in the diffusers network.
        outputs: Output sizes of all of the network's linear layers: original releases fuse some that diffusers has apart.
    """
    if family not in _FAMILIES:
        raise UsageError(
            f"there is no native ComfyUI naming for {family}'s adapters here",
            f"one of {', '.join(FAMILIES)} for format comfyui",
            "use format diffusers",
        )
    tensors = _FAMILIES[family](layers, outputs)
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
