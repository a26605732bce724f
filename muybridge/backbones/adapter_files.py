"""Adapter files: written as diffusers and ComfyUI read them, read back for every family.

diffusers' own loaders lack some families (Latte, ModelScope's UNet); its *files* are what is written here, so the others'
pipelines load them with ``load_lora_weights``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.base import Backbone
from muybridge.backbones.comfy import LowRank, to_comfyui
from muybridge.backbones.gates import adapter_layers
from muybridge.backbones.lora import (
    NAME,
    Adapter,
    adapters,
    find_adapter,
    insert,
    is_limited,
    linears,
    loaded_networks,
    peft_config,
    register,
)
from muybridge.errors import UsageError, did_you_mean
from muybridge.permissions import as_usual
from muybridge.whole import whole

Format = Literal["diffusers", "comfyui"]
HEADER = "muybridge"
"""Our key in the header of adapter files, beside diffusers' ``lora_adapter_metadata``."""


def _whole(parameter: Tensor) -> Tensor:
    """A parameter as one CPU tensor, gathered from its shards."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().cpu().contiguous()


def _layers_of(network: nn.Module, name: str) -> dict[str, LowRank]:
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        from muybridge.backbones.sharding import reshard

        # A root unit that stayed gathered holds what it computes with, which may be bfloat16.
        reshard(network)
    return {
        module: LowRank(_whole(m.lora_A[name].weight), _whole(m.lora_B[name].weight), float(m.lora_alpha[name]))
        for module, m in adapter_layers(network, name).items()
    }


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with whole(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **header})
        as_usual(partial)


def save_adapter(backbone: Backbone, path: str | Path, format: Format = "diffusers", name: str = NAME) -> list[Path]:
    """Write an adapter to a file for each network that carries it; returns the files.

    One network gives one file, ``path``. Wan 2.2 with adapters on both experts gives ``*_transformer.safetensors`` (high
    noise) and ``*_transformer_2.safetensors`` (low noise), because diffusers and ComfyUI load experts from separate files.
    Under a sharded strategy all ranks must call this together; the first one writes.

    Args:
        backbone: With the adapter on it.
        path: Where to, ending in ``.safetensors``.
        format: ``diffusers`` for ``pipe.load_lora_weights`` and :func:`load_adapter`; its header keeps the time range.
            ``comfyui`` for ComfyUI's native loader; a time range can't be expressed there.
        name: The adapter.
    """
    from muybridge import __version__

    adapter = find_adapter(backbone, name)
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UsageError(f"an adapter file called {target.name}", "a name that ends in .safetensors")
    if format not in ("diffusers", "comfyui"):
        raise UsageError(
            f"adapter format {format!r}", "diffusers or comfyui", did_you_mean(format, ("diffusers", "comfyui"))
        )
    if format == "comfyui" and is_limited(backbone, adapter.networks, adapter.t_min, adapter.t_max):
        warnings.warn(
            f"ComfyUI files can't say that the adapter acts from time {adapter.t_min:g} to {adapter.t_max:g} only: "
            "give its loader a strength for each step there, 0 outside the range",
            stacklevel=2,
        )
    prefix = backbone.network_names[0]
    files: dict[Path, tuple[dict[str, Tensor], dict[str, str]]] = {}
    for network_name in adapter.networks:
        network = backbone.networks[network_name]
        layers = _layers_of(network, name)
        about = {
            "version": __version__,
            "family": backbone.family,
            "pipeline": backbone.checkpoint.pipeline_class,
            "network": network_name,
            "t_min": adapter.t_min,
            "t_max": adapter.t_max,
        }
        header = {HEADER: json.dumps(about)}
        if format == "comfyui":
            outputs = {n: m.out_features for n, m in linears(network).items()}
            tensors = to_comfyui(backbone.family, layers, outputs)
        else:
            tensors = {}
            for module, layer in layers.items():
                tensors[f"{prefix}.{module}.lora_A.weight"] = layer.down
                tensors[f"{prefix}.{module}.lora_B.weight"] = layer.up
            config = peft_config({m: (layer.rank, layer.alpha) for m, layer in layers.items()})
            kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
            header["lora_adapter_metadata"] = json.dumps({f"{prefix}.{k}": getattr(config, k) for k in kept})
        several = len(adapter.networks) > 1
        file = target.with_name(f"{target.stem}_{network_name}.safetensors") if several else target
        files[file] = tensors, header
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for file, (tensors, header) in files.items():
            _write(file, tensors, header)
    return list(files)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        hint = ""
        if path.parent.is_dir():
            near = sorted(p.name for p in path.parent.glob(f"{path.stem}*.safetensors"))
            hint = f"next to it lies {', '.join(near[:3])}" if near else ""
        raise UsageError(f"there is no adapter file {path}", "a .safetensors file", hint)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(
            f"{path} can't be read as safetensors ({error})",
            "a whole .safetensors file",
            "copy or download it again; pickled adapters (.bin, .pt) are not loaded",
        ) from error


def _header(header: Mapping[str, str], key: str, path: Path) -> Optional[dict[str, Any]]:
    if key not in header:
        return None
    try:
        value = json.loads(header[key])
    except json.JSONDecodeError as error:
        raise UsageError(f"the header {key!r} of {path} is not JSON ({error})", "an unbroken file") from error
    return value if isinstance(value, dict) else None


def _strip(backbone: Backbone, tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors by the names of our network, and whether diffusers converted them (which folds the scale in)."""
    prefix = f"{backbone.network_names[0]}."
    if any(key.startswith(prefix) for key in tensors):
        foreign = [key for key in tensors if not key.startswith(prefix)]
        if foreign:
            raise UsageError(
                f"{path} also holds {foreign[0]}, which is not of the {backbone.network_names[0]}",
                "an adapter of the denoising network alone",
                "text encoder adapters are not loaded",
            )
        return {key.removeprefix(prefix): value for key, value in tensors.items()}, False
    import diffusers

    pipeline = getattr(diffusers, backbone.checkpoint.pipeline_class, None)
    convert = getattr(pipeline, "lora_state_dict", None)
    spelled = [key for key in tensors if key.startswith(("diffusion_model.", "lora_unet_"))]
    if convert is None or not spelled:
        raise UsageError(
            f"{path} holds no LoRA of {backbone.family}: its first key is {next(iter(tensors), 'missing')}",
            f"keys such as {prefix}<layer>.lora_A.weight",
            "check that the file is a LoRA, and of this family",
        )
    try:
        state = convert(dict(tensors))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"diffusers can't convert the names in {path} ({type(error).__name__}: {error})",
            "diffusers or ComfyUI names",
            "a file in diffusers names loads without conversion",
        ) from error
    state = state[0] if isinstance(state, tuple) else state
    return {key.removeprefix(prefix): value for key, value in state.items()}, True


_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")


def _pair(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The two matrices of every layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UsageError(
                f"{path} holds {key}, which is no plain LoRA matrix",
                "keys that end in lora_A.weight and lora_B.weight",
                "DoRA, LoKr and adapters with biases are not loaded",
            )
        layers.setdefault(match[1], {})[match[2]] = value
    if not layers:
        raise UsageError(f"{path} holds no LoRA keys", "keys that end in lora_A.weight and lora_B.weight")
    return layers


def _fit(
    backbone: Backbone, network: nn.Module, layers: Mapping[str, Mapping[str, Tensor]], path: Path
) -> dict[str, int]:
    """The ranks of the layers; refuses those that don't fit the network."""
    known, ranks = linears(network), {}
    for module, pair in layers.items():
        if module not in known:
            raise UsageError(
                f"{path} adapts {module}, which {backbone.family}'s network does not have",
                f"layers such as {next(iter(known))}",
                "the adapter is of another family or another size of the model",
            )
        if set(pair) != {"A", "B"}:
            raise UsageError(
                f"{path} holds only half of the adapter of {module}", "both lora_A and lora_B", "the file is broken"
            )
        linear, down, up = known[module], pair["A"], pair["B"]
        rank = down.shape[0] if down.ndim == 2 else 0
        expected = ((rank, linear.in_features), (linear.out_features, rank))
        if rank < 1 or (tuple(down.shape), tuple(up.shape)) != expected:
            raise UsageError(
                f"{path} adapts {module} with matrices of shapes {tuple(down.shape)} and {tuple(up.shape)}",
                f"(r, {linear.in_features}) and ({linear.out_features}, r) with a rank r of at least 1",
                "the adapter is of another size of the model, or the file is broken",
            )
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise UsageError(
                f"{path} adapts {module} with numbers that are not finite", "finite weights", "its run diverged"
            )
        ranks[module] = rank
    return ranks


def _alphas(
    metadata: Optional[Mapping[str, Any]], prefix: str, ranks: Mapping[str, int], converted: bool, path: Path
) -> dict[str, float]:
    """The scale's numerator of every layer, from diffusers' header."""
    said = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    odd = [key for key in ("use_rslora", "use_dora", "lora_bias") if said.get(key)]
    if odd:
        raise UsageError(f"{path} was made with {odd[0]}", "a plain LoRA", "merge it with the library that made it")
    if "lora_alpha" not in said:
        if not converted:
            warnings.warn(
                f"{path} does not say its alpha (lora_adapter_metadata in the header): alpha = rank is assumed, a scale of 1",
                stacklevel=3,
            )
        return {module: float(rank) for module, rank in ranks.items()}
    from peft.utils.other import get_pattern_key

    patterns = said.get("alpha_pattern") or {}
    return {m: float(patterns.get(get_pattern_key(list(patterns), m), said["lora_alpha"])) for m in ranks}


def load_adapter(
    backbone: Backbone,
    path: str | Path,
    name: str = NAME,
    gate: bool = True,
    network: Optional[str] = None,
    trainable: bool = False,
) -> Adapter:
    """Put an adapter from a file on a backbone, frozen, with its time range applied.

    Reads the diffusers files of :func:`save_adapter` and of others, for every family, and what diffusers can convert (among
    it ComfyUI's names). A diffusers pipeline built around the backbone's network, ``from_pretrained(path,
    transformer=backbone.network)``, then samples with adapter and gate.

    Args:
        backbone: With its network loaded.
        path: A ``.safetensors`` file. Wan 2.2's two experts have one each: load both, under one name.
        name: What it is called on the backbone.
        gate: Apply the time range that the file's header holds. Off, it acts at all times.
        network: Which network of a backbone with several; where not given the one in the header, or else the first.
        trainable: Let it be trained further; base weights stay as trainable or frozen as they are.
    """
    file = Path(path)
    networks = loaded_networks(backbone)
    tensors, header = _read(file)
    about = _header(header, HEADER, file) or {}
    family = about.get("family", backbone.family)
    if family != backbone.family:
        raise UsageError(
            f"{path} is an adapter of {family}", f"one of {backbone.family}", "load it on the family it was made for"
        )
    stripped, converted = _strip(backbone, tensors, file)
    layers = _pair(stripped, file)
    target = network or about.get("network") or next(iter(networks))
    if target not in networks:
        raise UsageError(
            f"{path} is for the network {target!r}",
            f"one of {', '.join(networks)}",
            "say which with the argument network",
        )
    ranks = _fit(backbone, networks[target], layers, file)
    metadata = _header(header, "lora_adapter_metadata", file)
    alphas = _alphas(metadata, f"{backbone.network_names[0]}.", ranks, converted, file)
    low, high = float(about.get("t_min", 0.0)), float(about.get("t_max", 1000.0))
    known = adapters(backbone).get(name)
    if known is not None and (known.t_min, known.t_max) != (low, high):
        raise UsageError(
            f"{path} acts from time {low:g} to {high:g}, {name!r} on the backbone from {known.t_min:g} to {known.t_max:g}",
            "one range for the files of one adapter",
            "load it under another name",
        )
    made = insert(networks[target], name, {m: (ranks[m], alphas[m]) for m in layers})
    for module, layer in made.items():
        for letter in "AB":
            weight = getattr(layer, f"lora_{letter}")[name].weight
            with torch.no_grad():
                weight.copy_(layers[module][letter])
            weight.requires_grad_(trainable)
    if known is not None and known.gate is not None:
        known.gate.remove()
    names = (*(known.networks if known else ()), target)
    return register(backbone, name, names, low, high, gate)
