"""LoRA for every family: one way to inject, save, load and merge, through peft alone.

diffusers' own loaders lack some families (Latte, ModelScope's UNet); its *files* are what is written here, so the others'
pipelines load them with ``load_lora_weights``.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.base import Backbone, Projection
from muybridge.backbones.comfy import LowRank, to_comfyui
from muybridge.backbones.gates import Gate, adapter_layers, disabled, gate_by_time, resolve_range
from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError, did_you_mean

__all__ = [
    "Adapter",
    "LoRA",
    "adapter_parameters",
    "adapters",
    "check_lora",
    "disabled",
    "gate_by_time",
    "inject",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
    "save_adapter",
]

Format = Literal["diffusers", "comfyui"]
NAME = "muybridge"
"""What an adapter is called where nobody says otherwise."""
HEADER = "muybridge"
"""Our key in the header of adapter files, beside diffusers' ``lora_adapter_metadata``."""


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adapters ``W + (alpha/rank) B A`` on the attention that carries motion.

    Args:
        rank: Rank of the update.
        alpha: Numerator of its scale; the rank where not given, so that the scale is 1. Some readers of LoRA files ignore
            the scale, so another value is best avoided.
        projections: Which projections of the motion-carrying attention are adapted: some of ``q``, ``k``, ``v``, ``o``.
        targets: Full-match regex of the linear layers to adapt instead, such as ``blocks\.\d+\.attn[12]\.to_[qkv]``.
        networks: Which networks of a backbone with several (Wan 2.2's experts ``transformer``, high noise, and
            ``transformer_2``, low noise); those that work inside the time range where not given.
        t_min: The adapter acts from this time on, so that appearance, which is settled below it, stays the base model's.
        t_max: The adapter acts up to this time.
        init_seed: The initial weights are a function of this seed and the layers' names.
    """

    rank: int = 4
    alpha: Optional[float] = None
    projections: list[Projection] = field(default_factory=lambda: ["v", "o"])
    targets: Optional[str] = None
    networks: Optional[list[str]] = None
    t_min: Optional[Boundary] = None
    t_max: Optional[Boundary] = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"LoRA rank is {self.rank}", "a whole number of at least 1", "4 to 64 are usual")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UsageError(f"LoRA alpha is {self.alpha}", "a number above 0", "leave it out for a scale of 1")

    @property
    def scale_numerator(self) -> float:
        """``alpha``, or the rank where it is not given."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class Adapter:
    """An adapter that is on a backbone.

    Args:
        name: What it is called there.
        networks: The networks that carry it.
        t_min: It acts from this time on.
        t_max: It acts up to this time.
        gate: What keeps it off outside these times; ``None`` where it acts at all times or was loaded ungated.
    """

    name: str
    networks: tuple[str, ...]
    t_min: float
    t_max: float
    gate: Optional[Gate]


def adapters(backbone: Backbone) -> dict[str, Adapter]:
    """The adapters on a backbone, by name."""
    known: dict[str, Adapter] = backbone._parts.setdefault("adapters", {})
    return known


# -- putting layers in and taking them out -----------------------------------------------------------------------------


def _linears(network: nn.Module) -> dict[str, Any]:
    """The linear layers of a network by the names they have without adapters: plain ones, and those already adapted."""
    layers: dict[str, Any] = adapter_layers(network)
    inside = tuple(f"{name}." for name in layers)
    plain = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)}
    return plain | layers


def _working_range(backbone: Backbone, network: str) -> tuple[float, float]:
    """The times at which a network is called: all, or an expert's share."""
    boundary: Optional[float] = getattr(backbone, "expert_boundary", None)
    if boundary is None:
        return 0.0, 1000.0
    return (boundary, 1000.0) if network == backbone.network_names[0] else (0.0, boundary)


def check_lora(backbone: Backbone, lora: LoRA) -> dict[str, list[str]]:
    """The layers that ``lora`` would adapt, by network; refuses what can't work. Needs no weights.

    Args:
        backbone: Loaded or not.
        lora: What to inject.
    """
    present = backbone._present_networks()
    unknown = [n for n in lora.networks or () if n not in present]
    if unknown:
        raise UsageError(
            f"LoRA networks name {unknown[0]!r}", f"some of {', '.join(present)}", did_you_mean(unknown[0], present)
        )
    t_min, t_max = resolve_range(backbone, lora.t_min, lora.t_max)
    chosen = []
    for name in lora.networks or present:
        low, high = _working_range(backbone, name)
        if t_min < high and t_max >= low:
            chosen.append(name)
        elif lora.networks:
            raise UsageError(
                f"an adapter on {name} that acts from time {t_min:g} to {t_max:g}",
                f"a range that overlaps {low:g} to {high:g}, where {name} works",
                "leave networks out to adapt those that work inside the range",
            )
    pattern = lora.targets if lora.targets is not None else backbone.motion_projections(lora.projections)
    return {name: _matching(backbone, pattern, name) for name in chosen}


def _matching(backbone: Backbone, pattern: str, name: str) -> list[str]:
    if name in backbone.networks and adapter_layers(backbone.networks[name]):
        # Adapted layers are no plain linear layers any more, but keep their names.
        hits = [n for n in _linears(backbone.networks[name]) if re.fullmatch(pattern, n)]
        if hits:
            return hits
    return backbone.matching(pattern, name)


def _config(layers: Mapping[str, tuple[int, float]]) -> Any:
    """The peft configuration for layers of the given (rank, alpha)."""
    from peft import LoraConfig

    ranks, alphas = [r for r, _ in layers.values()], [a for _, a in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # A string is matched whole, a list by its ends: those would also hit blocks nested elsewhere.
        target_modules="|".join(re.escape(n) for n in layers),
        rank_pattern={f"^{re.escape(n)}": r for n, (r, _) in layers.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, (_, a) in layers.items() if a != alpha},
    )


def _insert(network: nn.Module, name: str, wanted: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Put layers of the given (rank, alpha) in place, in float32, frozen and active; nothing else changes."""
    from peft import inject_adapter_in_model

    if not name or "." in name:
        raise UsageError(f"an adapter called {name!r}", "a name without dots", "letters, digits and _ are safe")
    if adapter_layers(network, name):
        raise UsageError(
            f"there is an adapter called {name!r} on the network already",
            f"another name than {', '.join(sorted(network.peft_config))}",  # type: ignore[arg-type]
            "remove_adapter or merge_adapter takes it off",
        )
    # peft freezes the base, and makes whatever it injected last the only active and the only trainable adapter.
    flags = {p: p.requires_grad for p in network.parameters()}
    active = {n: (list(m.active_adapters), m.disable_adapters) for n, m in adapter_layers(network).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(_config(wanted), network, adapter_name=name)
    made = adapter_layers(network, name)
    if set(made) != set(wanted):
        raise RuntimeError(f"peft adapted {sorted(set(made) ^ set(wanted))[:3]} differently from what was asked for")
    for layer_name, layer in adapter_layers(network).items():
        before, off = active.get(layer_name, ([], False))
        layer._active_adapter = before + [name] * (layer_name in made)
        layer._disable_adapters = off
        if layer_name in made:
            layer.lora_A[name].float()
            layer.lora_B[name].float()
    for parameter in network.parameters():
        parameter.requires_grad_(flags.get(parameter, False))
    if hasattr(network, "_hf_peft_config_loaded"):
        # So that diffusers' own methods (set_adapters, disable_lora) work on the network inside a pipeline.
        network._hf_peft_config_loaded = True  # type: ignore[assignment]
    return made


def _discard(network: nn.Module, name: str) -> None:
    """Take an adapter out; layers that carry no other become plain linear layers again."""
    for layer_name, layer in adapter_layers(network, name).items():
        others = [a for a in layer.lora_A if a != name]
        if others:
            left = [a for a in layer.active_adapters if a != name]
            flags = {p: p.requires_grad for p in layer.parameters()}
            off = layer.disable_adapters
            layer._active_adapter = others
            layer.delete_adapter(name)
            layer._active_adapter, layer._disable_adapters = left, off
            for parameter in layer.parameters():
                parameter.requires_grad_(flags[parameter])
        else:
            parent, _, child = layer_name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    network.peft_config.pop(name)  # type: ignore[operator, union-attr]
    if not network.peft_config:
        del network.peft_config
        if hasattr(network, "_hf_peft_config_loaded"):
            network._hf_peft_config_loaded = False  # type: ignore[assignment]


def _loaded(backbone: Backbone) -> nn.ModuleDict:
    if not backbone.networks:
        raise RuntimeError(f"{backbone.family}: the network is not loaded yet; call materialize() first")
    return backbone.networks


def _find(backbone: Backbone, name: str) -> Adapter:
    known = adapters(backbone)
    if name not in known:
        raise UsageError(
            f"{backbone.family} carries no adapter called {name!r}",
            f"one of {', '.join(known)}" if known else "an adapter that was injected or loaded",
            did_you_mean(name, known),
        )
    return known[name]


def inject(backbone: Backbone, lora: LoRA, name: str = NAME) -> Adapter:
    """Put a new, trainable adapter on a backbone and freeze its base weights.

    At initialisation ``B = 0``, so the network is still exactly the base model. The adapter's weights are float32 whatever
    the base's dtype. Where the LoRA has a time range its gate is set, so that validation and samples see the adapter as
    inference will; training must then draw times inside the range.

    Args:
        backbone: With its network loaded.
        lora: What to inject.
        name: What it is called on the backbone.
    """
    networks = _loaded(backbone)
    hits = check_lora(backbone, lora)
    for network_name, modules in hits.items():
        network = networks[network_name]
        layers = _insert(network, name, dict.fromkeys(modules, (lora.rank, lora.scale_numerator)))
        for module, layer in layers.items():
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            generator = keyed_generator(lora.init_seed, "lora", network_name, module)
            bound = 1.0 / math.sqrt(down.shape[1])  # Kaiming's uniform bound for a = √5, peft's own default
            with torch.no_grad():
                down.copy_((2.0 * torch.rand(down.shape, generator=generator) - 1.0) * bound)
                up.zero_()
    for parameter_name, parameter in networks.named_parameters():
        if "lora_" not in parameter_name:
            parameter.requires_grad_(False)
    for parameter in adapter_parameters(backbone, name).values():
        parameter.requires_grad_(True)
    return _register(backbone, name, list(hits), *resolve_range(backbone, lora.t_min, lora.t_max), gate=True)


def _register(backbone: Backbone, name: str, names: Sequence[str], t_min: float, t_max: float, gate: bool) -> Adapter:
    limited = any(t_min > low or t_max < high for low, high in (_working_range(backbone, n) for n in names))
    made = gate_by_time(backbone, t_min, t_max, name) if gate and limited else None
    adapter = Adapter(name, tuple(names), t_min, t_max, made)
    adapters(backbone)[name] = adapter
    return adapter


def adapter_parameters(backbone: nn.Module, name: Optional[str] = None) -> dict[str, nn.Parameter]:
    """The weights of the adapters on a backbone (of the one called ``name``), by their full names in it."""
    layers = tuple(f"{n}." for n in adapter_layers(backbone, name))
    found = {n: p for n, p in backbone.named_parameters() if n.startswith(layers) and ".lora_" in n}
    return {n: p for n, p in found.items() if name is None or n.split(".")[-2] == name}


def remove_adapter(backbone: Backbone, name: str = NAME) -> None:
    """Take an adapter off; the base weights and other adapters stay as they are."""
    adapter = _find(backbone, name)
    if adapter.gate is not None:
        adapter.gate.remove()
    for network in adapter.networks:
        _discard(backbone.networks[network], name)
    del adapters(backbone)[name]


@torch.no_grad()
def merge_adapter(backbone: Backbone, name: str = NAME, drop_range: bool = False) -> None:
    """Fold an adapter into the base weights, ``W + (alpha/rank) B A``, and take it off.

    Args:
        backbone: With full (unsharded) weights.
        name: The adapter.
        drop_range: Merge an adapter with a time range too. Merged, it acts at all times.
    """
    adapter = _find(backbone, name)
    ranges = [_working_range(backbone, n) for n in adapter.networks]
    if any(adapter.t_min > low or adapter.t_max < high for low, high in ranges) and not drop_range:
        raise UsageError(
            f"the adapter {name!r} acts from time {adapter.t_min:g} to {adapter.t_max:g} only",
            "an adapter without a time range: merged weights act at all times",
            "save_adapter keeps the range in the file; drop_range merges and forgets it",
        )
    for network in adapter.networks:
        for layer in adapter_layers(backbone.networks[network], name).values():
            weight = layer.get_base_layer().weight
            up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
            delta = layer.scaling[name] * (up.double() @ down.double())
            weight.copy_((weight.double() + delta).to(weight.dtype))
    remove_adapter(backbone, name)


# -- files -------------------------------------------------------------------------------------------------------------


def _whole(parameter: Tensor) -> Tensor:
    """A parameter as one CPU tensor, gathered from its shards."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().cpu().contiguous()


def _layers_of(network: nn.Module, name: str) -> dict[str, LowRank]:
    return {
        module: LowRank(_whole(m.lora_A[name].weight), _whole(m.lora_B[name].weight), float(m.lora_alpha[name]))
        for module, m in adapter_layers(network, name).items()
    }


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write under a temporary name and rename: a file of that name is always whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt", **header})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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

    adapter = _find(backbone, name)
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UsageError(f"an adapter file called {target.name}", "a name that ends in .safetensors")
    if format not in ("diffusers", "comfyui"):
        raise UsageError(
            f"adapter format {format!r}", "diffusers or comfyui", did_you_mean(format, ("diffusers", "comfyui"))
        )
    prefix = backbone.network_names[0]
    written = []
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
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
            outputs = {n: m.out_features for n, m in _linears(network).items()}
            tensors = to_comfyui(backbone.family, layers, outputs)
        else:
            tensors = {}
            for module, layer in layers.items():
                tensors[f"{prefix}.{module}.lora_A.weight"] = layer.down
                tensors[f"{prefix}.{module}.lora_B.weight"] = layer.up
            config = _config({m: (layer.rank, layer.alpha) for m, layer in layers.items()})
            kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
            header["lora_adapter_metadata"] = json.dumps({f"{prefix}.{k}": getattr(config, k) for k in kept})
        several = len(adapter.networks) > 1
        file = target.with_name(f"{target.stem}_{network_name}.safetensors") if several else target
        if first:
            _write(file, tensors, header)
        written.append(file)
    return written


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
    linears, ranks = _linears(network), {}
    for module, pair in layers.items():
        if module not in linears:
            raise UsageError(
                f"{path} adapts {module}, which {backbone.family}'s network does not have",
                f"layers such as {next(iter(linears))}",
                "the adapter is of another family or another size of the model",
            )
        if set(pair) != {"A", "B"}:
            raise UsageError(
                f"{path} holds only half of the adapter of {module}", "both lora_A and lora_B", "the file is broken"
            )
        linear, down, up = linears[module], pair["A"], pair["B"]
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
    if metadata is None:
        if not converted:
            warnings.warn(
                f"{path} does not say its alpha (no lora_adapter_metadata in the header): alpha = rank is assumed, a scale of 1",
                stacklevel=3,
            )
        return {module: float(rank) for module, rank in ranks.items()}
    from peft.utils.other import get_pattern_key

    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    odd = [key for key in ("use_rslora", "use_dora", "lora_bias") if said.get(key)]
    if odd:
        raise UsageError(f"{path} was made with {odd[0]}", "a plain LoRA", "merge it with the library that made it")
    patterns = said.get("alpha_pattern") or {}
    default = said.get("lora_alpha", 8)
    return {module: float(patterns.get(get_pattern_key(list(patterns), module), default)) for module in ranks}


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
    networks = _loaded(backbone)
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
    made = _insert(networks[target], name, {m: (ranks[m], alphas[m]) for m in layers})
    for module, layer in made.items():
        for letter in "AB":
            weight = getattr(layer, f"lora_{letter}")[name].weight
            with torch.no_grad():
                weight.copy_(layers[module][letter])
            weight.requires_grad_(trainable)
    if known is not None and known.gate is not None:
        known.gate.remove()
    names = (*(known.networks if known else ()), target)
    return _register(backbone, name, names, low, high, gate)
