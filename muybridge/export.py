"""Back to files that others load: a diffusers pipeline directory, or an adapter."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from muybridge.backbones.base import Backbone
from muybridge.backbones.checkpoint import Checkpoint, is_variant
from muybridge.backbones.comfy import FAMILIES
from muybridge.errors import UsageError
from muybridge.few_step_scheduler import write_scheduler
from muybridge.permissions import as_usual


def fresh_directory(out: str) -> tuple[Path, Path]:
    """The final path, and a sibling to write into first; a half-written export is never mistaken for a whole one."""
    final = Path(out)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UsageError(
            f"{out} exists and is not empty", "a new or empty directory", "choose another --out, or remove it first"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return final, partial


def export_pipeline(backbone: Backbone, out: str, steps: Optional[Sequence[float]] = None) -> Path:
    """A complete pipeline directory: the trained networks, and everything else as the source checkpoint has it.

    Args:
        backbone: With full (unsharded) weights and no adapter on it.
        out: A new directory.
        steps: Times of a few-step student; its scheduler is then one that takes these, see
            :mod:`muybridge.few_step_scheduler`.
    """
    if not backbone.networks:
        raise ValueError("nothing is loaded: materialize the backbone first")
    adapted = [n for n, _ in backbone.named_parameters() if "lora_" in n]
    if adapted:
        raise UsageError(
            "an adapter is still on the network",
            "its own export, or merge_adapter first",
            "a pipeline directory holds plain weights",
        )

    if backbone.causal is not None:
        warnings.warn(
            f"{out} holds a causal student: load it here, with causal in the backbone's settings; diffusers' own pipeline knows"
            " nothing of blocks and makes poor clips with it",
            stacklevel=2,
        )

    def few_steps(partial: Path, index: dict[str, Any]) -> None:
        if steps is not None:
            trained = backbone.checkpoint.config("scheduler")
            index["scheduler"] = write_scheduler(
                partial / "scheduler", backbone.schedule, trained, steps, backbone.lays_own_levels
            )

    return replace_parts(backbone.checkpoint, dict(backbone.networks), out, few_steps)


def replace_parts(
    checkpoint: Checkpoint,
    parts: Mapping[str, Any],
    out: str,
    also: Callable[[Path, dict[str, Any]], None] = lambda partial, index: None,
) -> Path:
    """A pipeline directory with some parts anew, and everything else as the checkpoint has it.

    Args:
        checkpoint: Where everything else comes from.
        parts: Networks by component name.
        out: A new directory.
        also: Writes more into the directory, and changes its index, before it gets its name.
    """
    final, partial = fresh_directory(out)
    others = [name for name in checkpoint.components if name not in parts]
    source = checkpoint.fetch(*others)
    partial.mkdir()
    index = dict(checkpoint.index)
    for name in others:
        if (source / name).is_dir():
            shutil.copytree(source / name, partial / name, ignore=lambda _, files: [f for f in files if is_variant(f)])
    for name, network in parts.items():
        network.save_pretrained(partial / name, safe_serialization=True)
        as_usual(partial / name)
        index[name] = ["diffusers", type(network).__name__]
    also(partial, index)
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return settle(partial, final)


def settle(partial: Path, final: Path) -> Path:
    """Give what is written whole its name."""
    if final.exists():
        final.rmdir()
    os.replace(partial, final)
    return final


def export_adapter(backbone: Backbone, out: str) -> list[Path]:
    """The adapter as ``adapter.safetensors`` (diffusers naming) and, where ComfyUI has names for the family, for it too."""
    from muybridge.backbones.adapters import save_adapter

    final, partial = fresh_directory(out)
    partial.mkdir()
    save_adapter(backbone, str(partial / "adapter.safetensors"), format="diffusers")
    if backbone.family in FAMILIES:
        save_adapter(backbone, str(partial / "adapter_comfyui.safetensors"), format="comfyui")
    return sorted(settle(partial, final).iterdir())
