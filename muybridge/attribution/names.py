"""Which parameters are attributed to, under names that no wrapper changes."""

from __future__ import annotations

import re
from typing import Optional

from torch import nn

from muybridge.errors import UsageError

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts of a name that torch.compile, checkpoint wrappers and FSDP1 put in."""


def canonical(name: str) -> str:
    """A parameter's name without what wrappers put in, so that it is the same under any of them."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def chosen_parameters(module: nn.Module, pattern: Optional[str] = None) -> dict[str, nn.Parameter]:
    """The trained parameters of a module by canonical name, or those whose whole name matches a regex.

    Tied parameters come once, under their first name. An adapter that is switched off, as that of a distillation's critic on
    the base that it shares with the student, has no part in what the module computes, and none here.

    Args:
        module: Holds them.
        pattern: The regex.
    """
    idle = _switched_off(module)
    named = {canonical(name): p for name, p in module.named_parameters() if not name.startswith(idle)}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if pattern is None:
        if not trained:
            raise UsageError("no parameter of this model is trained", "at least one to attribute to")
        return trained
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression ({error})", "a Python regex") from error
    hits = {name: p for name, p in named.items() if compiled.fullmatch(name)}
    if not hits:
        near = [name for name in named if compiled.search(name)][:3] or list(trained)[:3]
        raise UsageError(
            f"parameters {pattern!r} matches none of {len(named)} parameters",
            f"a regex that matches whole names, such as {', '.join(near)}",
        )
    frozen = [name for name in hits if name not in trained]
    if frozen:
        raise UsageError(
            f"parameters {pattern!r} names {len(frozen)} that are frozen, such as {', '.join(frozen[:3])}",
            "parameters that the job trains",
            "widen the job's trainable regex, or narrow this one",
        )
    return hits


def _switched_off(module: nn.Module) -> tuple[str, ...]:
    """How the names of parameters of adapters begin that do nothing now."""
    from muybridge.backbones.gates import adapter_layers

    return tuple(
        f"{place}.{kind}.{name}."
        for place, layer in adapter_layers(module).items()
        for kind in layer.adapter_layer_names
        for name in getattr(layer, kind)
        if layer.disable_adapters or name not in layer.active_adapters
    )
