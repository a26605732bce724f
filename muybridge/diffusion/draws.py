"""Random draws that are a function of what they are for, and of nothing else.

A noise that depends on a stream's position changes with the batch size, the rank count and a resume. Keyed by (seed,
step, sample id) it does not, so one process, two ranks and a resumed run see the same numbers. The generator is the
CPU's: a CUDA generator gives different numbers on different cards.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator seeded by a hash of ``(seed, *key)``."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(shape: tuple[int, ...], seed: int, *key: str | int) -> Tensor:
    """Standard normal noise of ``shape`` (no batch axis), float32 on the CPU."""
    return torch.randn(shape, generator=keyed_generator(seed, *key))


def shared_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """One draw for all clips of a shape, (C, F, H, W): what makes their gradients comparable (eq. 2 of motion attribution)."""
    return keyed_noise(tuple(shape), seed, "shared", *shape)
