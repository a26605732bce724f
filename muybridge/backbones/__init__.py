"""Diffusers models of many families behind one face. ``docs/plug-in-a-backbone.md`` shows how to add a family."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Optional

from muybridge.backbones.base import ALL_COMPONENTS, Backbone, Component, DType
from muybridge.backbones.causal import Causal
from muybridge.backbones.checkpoint import Checkpoint
from muybridge.backbones.geometry import Geometry
from muybridge.errors import UsageError
from muybridge.registry import BACKBONES

__all__ = ["Backbone", "Causal", "Geometry", "Pretrained", "load", "pick_family", *BACKBONES]


def __getattr__(name: str) -> Any:
    if name in BACKBONES:
        return getattr(importlib.import_module(BACKBONES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pick_family(path: str) -> type[Backbone]:
    """The family whose pipelines include what lies at ``path``; families that users defined are found too."""
    pipeline = Checkpoint(path).pipeline_class
    for name in BACKBONES:
        shipped: type[Backbone] = __getattr__(name)
        if pipeline in shipped.pipelines:
            return shipped
    families = _families(Backbone)  # type: ignore[type-abstract]
    for family in families:
        if pipeline in family.pipelines:
            return family
    known = ", ".join(f"{p} ({family.family})" for family in families for p in family.pipelines)
    raise UsageError(
        f"{path} is a {pipeline}, which no backbone takes",
        known,
        "a family of your own is one file: see docs/plug-in-a-backbone.md",
    )


def _families(base: type[Backbone]) -> list[type[Backbone]]:
    found: list[type[Backbone]] = []
    for child in base.__subclasses__():
        if getattr(child, "pipelines", None):
            found.append(child)
        found.extend(_families(child))
    return found


class Pretrained(Backbone):
    """Picks the family from the checkpoint: what ``class_path`` of a config usually says.

    Args:
        path: Directory of a diffusers pipeline (with ``model_index.json``), a hub id, or a model that ships (``proving-ground``).
        dtype: Dtype of the network's weights. Train all weights in float32 with Trainer precision ``bf16-mixed``;
            bfloat16 suits a frozen base under adapters.
        components: What this job may load: ``denoiser``, ``vae``, ``text_encoder``. Training on cached latents and text
            needs ``denoiser`` alone.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        vae_dtype: Dtype of the VAE.
        vae_tiling: Encode and decode in spatial tiles, for large frames on small cards.
        max_text_length: Tokens per prompt; the family's own default where not given.
        text_dtype: Dtype of the text encoder; ``dtype`` where not given. bfloat16 halves the memory of a large T5, and
            its embeddings are cast to the network's dtype anyway; a cache of text remembers which it was made with.
        causal: Let each block of frames see only itself and the blocks before it, and make clips block by block (Wan).
    """

    def __new__(  # type: ignore[misc]
        cls,
        path: str,
        dtype: DType = "float32",
        components: Sequence[Component] = ALL_COMPONENTS,
        gradient_checkpointing: bool = False,
        vae_dtype: DType = "float32",
        vae_tiling: bool = False,
        max_text_length: Optional[int] = None,
        text_dtype: Optional[DType] = None,
        causal: Optional[Causal] = None,
    ) -> Backbone:
        """Build the family's class; Python then skips ``__init__``, since the result is no ``Pretrained``."""
        return pick_family(path)(
            path=path,
            dtype=dtype,
            components=components,
            gradient_checkpointing=gradient_checkpointing,
            vae_dtype=vae_dtype,
            vae_tiling=vae_tiling,
            max_text_length=max_text_length,
            text_dtype=text_dtype,
            causal=causal,
        )

    def __init__(
        self,
        path: str,
        dtype: DType = "float32",
        components: Sequence[Component] = ALL_COMPONENTS,
        gradient_checkpointing: bool = False,
        vae_dtype: DType = "float32",
        vae_tiling: bool = False,
        max_text_length: Optional[int] = None,
        text_dtype: Optional[DType] = None,
        causal: Optional[Causal] = None,
    ) -> None:
        raise RuntimeError("unreachable: __new__ returns another class")


# Nothing is ever an instance of it, and jsonargparse refuses the class_path of an abstract class.
Pretrained.__abstractmethods__ = frozenset()


def load(
    path: str, dtype: DType = "float32", components: Sequence[Component] = ALL_COMPONENTS, **options: Any
) -> Backbone:
    """Open a diffusers checkpoint of any known family and load its network.

    Args:
        path: Directory of a diffusers pipeline, a hub id, or a model that ships (``proving-ground``).
        dtype: Dtype of the network's weights.
        components: What may be loaded: ``denoiser`` now, ``vae`` and ``text_encoder`` at first use.
        options: Further arguments of :class:`Backbone`.
    """
    return pick_family(path)(path=path, dtype=dtype, components=components, **options).materialize()
