"""LoRA layers in and out of a backbone, for every family, through peft alone."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from muybridge.backbones.base import Backbone, Projection
from muybridge.backbones.gates import Gate, adapter_layers, gate_by_time, resolve_range
from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError, did_you_mean

NAME = "muybridge"
"""What an adapter is called where nobody says otherwise."""


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


def linears(network: nn.Module) -> dict[str, Any]:
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


def is_limited(backbone: Backbone, networks: Sequence[str], t_min: float, t_max: float) -> bool:
    """Whether a range leaves out times at which one of the networks works."""
    return any(t_min > low or t_max < high for low, high in (_working_range(backbone, n) for n in networks))


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
        if t_min < high and t_max > low:
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
        # What is adapted already is no plain linear layer any more; the layer it was lies inside it.
        return [n.removesuffix(".base_layer") for n in backbone.matching(rf"(?:{pattern})(?:\.base_layer)?", name)]
    return backbone.matching(pattern, name)


def peft_config(layers: Mapping[str, tuple[int, float]]) -> Any:
    """The peft configuration for layers of the given (rank, alpha)."""
    from peft import LoraConfig

    rank = Counter(r for r, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # A string is matched whole, a list by its ends: those would also hit blocks nested elsewhere.
        target_modules="|".join(re.escape(n) for n in layers),
        rank_pattern={f"^{re.escape(n)}": r for n, (r, _) in layers.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, (_, a) in layers.items() if a != alpha},
    )


def insert(network: nn.Module, name: str, wanted: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
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
    refuse_sharded(network, "adapters put on it")
    # peft freezes the base, and makes whatever it injected last the only active and the only trainable adapter.
    flags = {p: p.requires_grad for p in network.parameters()}
    active = {n: (list(m.active_adapters), m.disable_adapters) for n, m in adapter_layers(network).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(peft_config(wanted), network, adapter_name=name)
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
            # Switched off first: peft would make another one active in its place.
            layer._active_adapter = [a for a in layer.active_adapters if a != name]
            layer.delete_adapter(name)
        else:
            parent, _, child = layer_name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    network.peft_config.pop(name)  # type: ignore[operator, union-attr]
    if not network.peft_config:
        del network.peft_config
        if hasattr(network, "_hf_peft_config_loaded"):
            network._hf_peft_config_loaded = False  # type: ignore[assignment]


def refuse_sharded(network: nn.Module, what: str) -> None:
    """Weights added to a sharded network would be plain tensors that no other rank's gradients reach."""
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        raise UsageError("the network is sharded already", f"{what} before it is", "a job does this in its prepare()")


def loaded_networks(backbone: Backbone) -> nn.ModuleDict:
    """The networks of a backbone whose weights are there."""
    if not backbone.networks:
        raise RuntimeError(f"{backbone.family}: the network is not loaded yet; call materialize() first")
    return backbone.networks


def find_adapter(backbone: Backbone, name: str) -> Adapter:
    """The adapter of that name, or an error that says which there are."""
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
    networks = loaded_networks(backbone)
    hits = check_lora(backbone, lora)
    for network_name, modules in hits.items():
        network = networks[network_name]
        layers = insert(network, name, dict.fromkeys(modules, (lora.rank, lora.scale_numerator)))
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
    return register(backbone, name, list(hits), *resolve_range(backbone, lora.t_min, lora.t_max), gate=True)


def register(backbone: Backbone, name: str, names: Sequence[str], t_min: float, t_max: float, gate: bool) -> Adapter:
    """Note an adapter whose layers are in place, and gate it where its range leaves out times its networks work at."""
    limited = is_limited(backbone, names, t_min, t_max)
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
    adapter = find_adapter(backbone, name)
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
    adapter = find_adapter(backbone, name)
    if is_limited(backbone, adapter.networks, adapter.t_min, adapter.t_max) and not drop_range:
        raise UsageError(
            f"the adapter {name!r} acts from time {adapter.t_min:g} to {adapter.t_max:g} only",
            "an adapter without a time range: merged weights act at all times",
            "save_adapter keeps the range in the file; drop_range merges and forgets it",
        )
    for network in adapter.networks:
        refuse_sharded(backbone.networks[network], "adapters merged")
    for network in adapter.networks:
        for layer in adapter_layers(backbone.networks[network], name).values():
            weight = layer.get_base_layer().weight
            up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
            delta = layer.scaling[name] * (up.double() @ down.double())
            weight.copy_((weight.double() + delta).to(weight.dtype))
    remove_adapter(backbone, name)
