"""Adapters on a backbone: inject, switch, gate, save, load, merge. One import for all of it.

``lora.py`` puts layers in and out, ``gates.py`` switches them, ``adapter_files.py`` writes and reads files.
"""

from muybridge.backbones.adapter_files import Format, load_adapter, save_adapter
from muybridge.backbones.gates import Gate, disabled, gate_by_time, only, resolve_range, switch_to
from muybridge.backbones.lora import (
    Adapter,
    LoRA,
    adapter_parameters,
    adapters,
    check_lora,
    inject,
    merge_adapter,
    remove_adapter,
)

__all__ = [
    "Adapter",
    "Format",
    "Gate",
    "LoRA",
    "adapter_parameters",
    "adapters",
    "check_lora",
    "disabled",
    "gate_by_time",
    "inject",
    "load_adapter",
    "merge_adapter",
    "only",
    "remove_adapter",
    "resolve_range",
    "save_adapter",
    "switch_to",
]
