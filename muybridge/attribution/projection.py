r"""Linear maps from all numbers of a gradient to a few, whose inner products are kept (Johnson–Lindenstrauss).

What a coordinate becomes depends on the projection's version and seed, the parameter's canonical name and the coordinate's
place in the flattened, unsharded parameter, and on nothing else: random numbers come from a hash of these, the same on every
device. So a vector is the same for any number of ranks, any sharding, batch and order, and a parameter more or less leaves
what the others contribute as it was. All sums are float32, which is what "the same" goes down to.

Fastfood as used here (eq. 3, ``S H G Π H B / (ξ √D')``), of which only as many rows are kept as there are outputs: ``S`` is 1 (it
serves kernels, not lengths), and the first K = 2^k rows of the last ``H`` are a sum over entries that agree in their low k bits,
followed by a K × K orthogonal matrix that no inner product sees. What is left is: signs B, a Hadamard transform of length b over
√b, Gaussian weights G, and a sum into K buckets. (Π would permute what is mixed already, before weights that are independent;
blocks go to random slots instead.) Blocks of b coordinates are independent, which costs nothing in accuracy: the error of a
cosine c is (1 - c²) √(1/D' + 2/D), D being the number of coordinates.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from muybridge.errors import UsageError

VERSION = 1
"""Of the numbers below; vectors of different versions don't mix."""
CHUNK = 2**22
"""Coordinates treated at once, so that the memory beside a gradient is bounded."""
CACHED = 2**18
"""Numbers that stay in a processor core's cache."""
FEW = 16
"""Blocks, for which it is not worth while to make room for a second round of buckets."""


# -- random numbers of places --------------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLD, _A, _B = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def hashed(key: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` int64 numbers, each a hash (SplitMix64) of the key and of its place from ``first`` on."""
    x = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    x = x.mul_(_GOLD).add_(_signed(key))
    x = (x ^ _shifted(x, 30)).mul_(_A)
    x = (x ^ _shifted(x, 27)).mul_(_B)
    return x ^ _shifted(x, 31)


def key_of(*parts: object) -> int:
    """A number of 64 bits from some plain values."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _signs(bits: Tensor, which: int) -> Tensor:
    return ((bits >> which) & 1).float().mul_(2.0).sub_(1.0)


_QUANTILES: dict[torch.device, Tensor] = {}


def _gaussian(bits: Tensor) -> Tensor:
    """Standard normal numbers from 16 bits each, by a table of quantiles: the same on every device, which ``log`` is not."""
    device = bits.device
    if device not in _QUANTILES:
        table = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
        _QUANTILES[device] = (table / table.square().mean().sqrt()).float().to(device)
    return _QUANTILES[device][bits & 0xFFFF]


# -- the face ------------------------------------------------------------------------------------------------------------------


class Projection(ABC):
    """A linear map of gradients, given piece by piece.

    Args:
        dim: Numbers of a vector.
        seed: Of the map.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int = 4096, seed: int = 0) -> None:
        if dim < 1:
            raise UsageError(f"projection dim is {dim}", "1 or more, such as 512 or 4096")
        self.dim, self.seed = dim, seed

    def prepare(self, sizes: Mapping[str, int]) -> None:  # noqa: B027 - most have nothing to prepare
        """Told once which parameters there are, with how many numbers; only :class:`NoProjection` needs it."""

    @abstractmethod
    def add(self, out: Tensor, name: str, gradient: Tensor, start: int = 0) -> None:
        """Add ``P g`` of a stretch of a parameter's flattened gradient.

        Args:
            out: (B, dim), float32.
            name: Canonical name of the parameter.
            gradient: (B, n).
            start: Place of its first coordinate in the whole parameter.
        """

    def zeros(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Where to add to."""
        return torch.zeros(count, self.dim, device=device)

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The vector of whole gradients, (dim,).

        Args:
            gradients: By canonical name; of any shape.
        """
        self.prepare({name: gradient.numel() for name, gradient in gradients.items()})
        first = next(iter(gradients.values()))
        out = self.zeros(1, first.device)
        for name, gradient in gradients.items():
            self.add(out, name, gradient.reshape(1, -1))
        return out[0]

    def key(self) -> dict[str, Any]:
        """All that vectors depend on, as plain values."""
        return {"projection": self.kind, "version": VERSION, "dim": self.dim, "seed": self.seed}


class _Blocks(Projection):
    """Blocks of ``block`` coordinates, each transformed, weighted and added into the buckets from an offset of its own.

    Args:
        dim: Numbers of a vector.
        seed: Of the map.
        block: Coordinates of a block.
        memory: Bytes of random numbers that are kept for the next clip rather than made anew.
    """

    def __init__(self, dim: int, seed: int, block: int, memory: int = 2**28) -> None:
        super().__init__(dim, seed)
        self.block, self.memory = block, memory
        self._kept: dict[tuple[str, int, int, str], tuple[Tensor, ...]] = {}
        self._size = 0

    @abstractmethod
    def random(self, bits: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        """What the blocks need, from the hashes of coordinates (blocks, block) and of the blocks."""

    @abstractmethod
    def fold(self, out: Tensor, x: Tensor, random: tuple[Tensor, ...]) -> None:
        """Add what becomes of (B, blocks, block) numbers."""

    def _random(self, name: str, first: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
        """Of ``count`` blocks from block ``first`` on; kept as long as there is room."""
        place = (name, first, count, str(device))
        if place in self._kept:
            return self._kept[place]
        keys = (key_of(self.kind, VERSION, self.seed, name, what) for what in ("coordinates", "blocks"))
        bits = hashed(next(keys), first * self.block, count * self.block, device).view(count, self.block)
        made = self.random(bits, _shifted(hashed(next(keys), first, count, device), 1))
        size = sum(t.nbytes for t in made)
        if self._size + size <= self.memory:
            self._kept[place] = made
            self._size += size
        return made

    def add(self, out: Tensor, name: str, gradient: Tensor, start: int = 0) -> None:
        block, step = self.block, max(1, CHUNK // self.block) * self.block
        done, total = 0, gradient.shape[1]
        while done < total:
            # Up to the end of a chunk of the whole parameter: shards then cut it at the same places.
            place = start + done
            upto = min(total, (place // step + 1) * step - start)
            piece = gradient[:, done:upto].float()
            first, before = divmod(place, block)
            count = -(-(before + piece.shape[1]) // block)
            if before or piece.shape[1] != count * block:
                piece = torch.nn.functional.pad(piece, (before, count * block - before - piece.shape[1]))
            self.fold(out, piece.reshape(len(piece), count, block), self._random(name, first, count, gradient.device))
            done = upto

    def key(self) -> dict[str, Any]:
        return {**super().key(), "block": self.block}


def hadamard(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The Walsh–Hadamard matrix of order n = 2^l, entries ±1."""
    made = torch.ones(1, 1, device=device)
    while len(made) < n:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


class _Mixed(_Blocks):
    """Blocks that are mixed by signs and a Hadamard transform, weighted, and added into the buckets.

    Longer blocks than vectors are folded; shorter ones go to one of the ``dim / block`` slots.
    """

    def __init__(self, dim: int, seed: int, block: int) -> None:
        for name, value in (("block", block), ("dim", dim)):
            if value < 2 or value & (value - 1):
                raise UsageError(f"{self.kind} projection {name} is {value}", "a power of two, such as 1024")
        super().__init__(dim, seed, block)
        self._matrices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def weigh(self, bits: Tensor) -> Tensor:
        """Weights after the transform, by the hashes of the coordinates."""

    def random(self, bits: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return _signs(bits, 62), self.weigh(bits), offsets % max(1, self.dim // self.block)

    def _halves(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``H_b = H_{b1} ⊗ H_{b2}`` as two small matrices with 1/√b in them, so that the transform is two products."""
        if device not in self._matrices:
            bits = self.block.bit_length() - 1
            sides = (2 ** (bits // 2), 2 ** (bits - bits // 2))
            left, right = (hadamard(n, device) / math.sqrt(n) for n in sides)
            self._matrices[device] = left, right
        return self._matrices[device]

    def mix(self, x: Tensor) -> Tensor:
        """``H x / √b`` over the last axis."""
        left, right = self._halves(x.device)
        mixed = x.reshape(-1, len(right)) @ right
        return torch.matmul(left, mixed.view(-1, len(left), len(right))).view(x.shape)

    def fold(self, out: Tensor, x: Tensor, random: tuple[Tensor, ...]) -> None:
        signs, weights, slots = random
        count = x.shape[1]
        # A processor's cache holds so many blocks through all that is done to them; a GPU takes them all at once.
        step = max(1, CACHED // (len(x) * self.block)) if x.device.type == "cpu" else count
        for first in range(0, count, step):
            some = slice(first, first + step)
            mixed = self.mix(x[:, some] * signs[some]).mul_(weights[some])
            if self.dim <= self.block:
                out += mixed.view(len(out), -1, self.dim).sum(1)
            else:
                out.view(len(out), -1, self.block).index_add_(1, slots[some], mixed)


class FastfoodProjection(_Mixed):
    """Fastfood in blocks: signs, Hadamard, Gaussian weights, sum into buckets. See the top of this file.

    Args:
        dim: Numbers of a vector; 512 is the published setting, 4096 costs the same time and keeps far more of the ranking.
        seed: Of the map.
        block: Coordinates of a block, a power of two. Accuracy does not depend on it from 512 on.
    """

    kind = "fastfood"

    def __init__(self, dim: int = 4096, seed: int = 0, block: int = 1024) -> None:
        super().__init__(dim, seed, block)

    def weigh(self, bits: Tensor) -> Tensor:
        return _gaussian(bits)


class SRHTProjection(_Mixed):
    """Signs, Hadamard, signs again, sum into buckets: as Fastfood with slightly less variance.

    Args:
        dim: Numbers of a vector.
        seed: Of the map.
        block: Coordinates of a block, a power of two.
    """

    kind = "srht"

    def __init__(self, dim: int = 4096, seed: int = 0, block: int = 1024) -> None:
        super().__init__(dim, seed, block)

    def weigh(self, bits: Tensor) -> Tensor:
        return _signs(bits, 61)


class CountSketchProjection(_Blocks):
    """A sign for every coordinate, and sums into buckets; no two coordinates of a block share one. The cheapest.

    Args:
        dim: Numbers of a vector.
        seed: Of the map.
    """

    kind = "countsketch"

    def __init__(self, dim: int = 4096, seed: int = 0) -> None:
        super().__init__(dim, seed, block=dim)

    def random(self, bits: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        offsets = offsets % self.dim
        buckets = (torch.arange(self.dim, device=bits.device) + offsets[:, None]) % self.dim
        return _signs(bits, 62), buckets, offsets

    def fold(self, out: Tensor, x: Tensor, random: tuple[Tensor, ...]) -> None:
        signs, buckets, offsets = random
        if out.device.type != "cpu" or out.numel() < 2**13:
            for row, values in zip(out, x, strict=True):
                row.scatter_add_(0, buckets.flatten(), (values * signs).flatten())
            return
        # A stretch at a time of many rows: no copy of the gradient is made, and nothing is scattered. Of many blocks, what would
        # go round from the last bucket to the first is kept behind the last one until the end.
        pieces = zip(offsets.tolist(), x.unbind(1), signs.unbind(0), strict=True)
        if len(offsets) <= FEW:
            for offset, values, sign in pieces:
                rest = self.dim - offset
                out[:, offset:].addcmul_(values[:, :rest], sign[:rest])
                out[:, :offset].addcmul_(values[:, rest:], sign[rest:])
            return
        twice = out.new_zeros(len(out), 2 * self.dim)
        for offset, values, sign in pieces:
            twice.narrow(1, offset, self.dim).addcmul_(values, sign)
        out += twice[:, : self.dim]
        out += twice[:, self.dim :]


class DenseProjection(Projection):
    """A matrix of independent signs over √dim, made anew for every gradient: what others are measured by. Slow.

    Args:
        dim: Numbers of a vector.
        seed: Of the map.
    """

    kind = "dense"

    def add(self, out: Tensor, name: str, gradient: Tensor, start: int = 0) -> None:
        key, step = key_of(self.kind, VERSION, self.seed, name), max(1, CHUNK // self.dim)
        for done in range(0, gradient.shape[1], step):
            piece = gradient[:, done : done + step].float()
            bits = hashed(key, (start + done) * self.dim, piece.shape[1] * self.dim, gradient.device)
            out += piece @ _signs(bits, 62).view(piece.shape[1], self.dim) / math.sqrt(self.dim)


class NoProjection(Projection):
    """The gradient itself, parameters one after the other. For small models."""

    kind = "none"

    def __init__(self) -> None:
        super().__init__(1, 0)
        self._first: dict[str, int] = {}

    def prepare(self, sizes: Mapping[str, int]) -> None:
        total = 0
        self._first = {}
        for name, size in sizes.items():
            self._first[name] = total
            total += size
        self.dim = total

    def add(self, out: Tensor, name: str, gradient: Tensor, start: int = 0) -> None:
        at = self._first[name] + start
        out[:, at : at + gradient.shape[1]] += gradient
