"""What a network is conditioned on, the same dataclass for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text as a network takes it, batch first.

    Args:
        text: Token embeddings, (B, L, D).
        mask: True where a token is real, (B, L); ``None`` for families whose network takes no mask.
        pooled: One vector per prompt, (B, D); ``None`` for families without one.
    """

    text: Tensor
    mask: Optional[Tensor] = None
    pooled: Optional[Tensor] = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def _map(self, function: object) -> Conditioning:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if v is not None})  # type: ignore[operator]

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(v.nbytes for f in fields(self) if (v := getattr(self, f.name)) is not None)

    def to(self, *args: object, **kwargs: object) -> Conditioning:
        """A copy moved like ``Tensor.to``; a dtype touches floating tensors only, so a mask stays boolean."""
        device_only = {k: v for k, v in kwargs.items() if k != "dtype"}

        def move(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return x.to(*args, **kwargs)  # type: ignore[call-overload]
            rest = [a for a in args if not isinstance(a, torch.dtype)]
            return x.to(*rest, **device_only) if rest or device_only else x  # type: ignore[call-overload]

        return self._map(move)

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> Conditioning:
        """The conditioning of some of the samples; always keeps the batch axis."""
        chosen: slice | Tensor | list[int] = [index] if isinstance(index, int) else index
        return self._map(lambda x: x[chosen])

    def expand(self, count: int) -> Conditioning:
        """One prompt for ``count`` samples."""
        if len(self) == count:
            return self
        if len(self) != 1:
            raise ValueError(f"cannot spread {len(self)} prompts over {count} samples: expected 1 or {count}")
        return self._map(lambda x: x.expand(count, *x.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Several conditionings as one batch; shorter texts are padded at the end and masked where there is a mask."""
        length = max(part.text.shape[1] for part in parts)

        def join(name: str) -> Optional[Tensor]:
            values = [getattr(part, name) for part in parts]
            if all(v is None for v in values):
                return None
            if any(v is None for v in values):
                raise ValueError(
                    f"some of {len(values)} conditionings have a {name} and some have none: expected one kind"
                )
            if name != "pooled":
                values = [
                    torch.cat([v, v.new_zeros(v.shape[0], length - v.shape[1], *v.shape[2:])], 1)
                    if v.shape[1] < length
                    else v
                    for v in values
                ]
            return torch.cat(values)

        text, mask = join("text"), join("mask")
        assert text is not None
        if mask is None and any(part.text.shape[1] != length for part in parts):
            raise ValueError(
                f"texts of {sorted({part.text.shape[1] for part in parts})} tokens without masks: expected one length, "
                "since the network would attend to the padding"
            )
        return Conditioning(text, mask, join("pooled"))

    @staticmethod
    def where(choose: Tensor, yes: Conditioning, no: Conditioning) -> Conditioning:
        """Per sample, ``yes`` where ``choose`` (B,) is true and ``no`` elsewhere (caption dropout)."""
        both = Conditioning.cat([yes, no.expand(len(yes))])
        index = torch.arange(len(yes), device=choose.device)
        return both[torch.where(choose, index, index + len(yes)).to(both.text.device)]
