"""Opening a model for verbs that have no Trainer."""

from __future__ import annotations

from typing import Optional

import torch

from muybridge.backbones import Backbone, load
from muybridge.backbones.base import DType
from muybridge.errors import UsageError


def pick_device(device: Optional[str] = None) -> torch.device:
    """The device that is asked for; the first GPU where there is one, where none is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"the device {device!r} can't be used ({str(error).splitlines()[0]})", "cpu, cuda or cuda:1", "leave it out"
        ) from error
    return found


def open_model(path: str, dtype: DType = "float32", device: Optional[str] = None) -> Backbone:
    """A backbone with its network loaded, frozen, on its device."""
    where = pick_device(device)
    return load(path, dtype=dtype).requires_grad_(False).to(where)
