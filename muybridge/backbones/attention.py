"""Attention maps from recorded queries and keys.

Full maps suit the small attentions of factorised families. Of attention over a whole clip a map can take tens of gigabytes a
layer, so what is wanted of it (one place over all frames, or shares per frame) is computed without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muybridge.diffusion.predictions import upcast
from muybridge.errors import UsageError

Role = Literal["unified", "factorised", "cross", "other"]


TINY = 1e-12
"""A row whose sum is less is one of no attention at all."""


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of one attention call. Maps are at least float32 and carry gradients to what made the queries.

    ``N`` below is the batch of the call: the samples B for attention over a whole clip; B times the places for temporal
    attention of factorised families; B times the frames for their cross attention.

    Args:
        name: The module's name in its network.
        network: The network's name in the backbone; empty for a tap on a bare module.
        role: ``unified`` attends to all places of all frames (and to text, in joint families), ``factorised`` to one place
            over all frames, ``cross`` from video to text.
        query: (N, heads, queries, d).
        key: (N, heads, keys, d).
        mask: What is added to the scores, or true where a key may be attended to; broadcastable to the map.
        scale: What scores are multiplied by, ``1/√d``.
        batch: Samples B.
        grid: Tokens along (F, h, w) at this layer.
        text: Where text tokens lie in a joint sequence.
        unturned: Keys before the rotation that tells positions apart, (B, keys or F·h·w, heads · d); of unified attention, where
            the tap was asked for them.
    """

    name: str
    network: str
    role: Role
    query: Tensor
    key: Tensor
    mask: Optional[Tensor]
    scale: float
    batch: int
    grid: Optional[tuple[int, int, int]]
    text: Optional[Literal["first", "last"]]
    unturned: Optional[Tensor] = None

    # -- maps ------------------------------------------------------------------------------------------------------

    def attention_map(self) -> Tensor:
        """``softmax(q kᵀ/√d + mask)``, (N, heads, queries, keys). Rows sum to 1.

        Its size is the product of both lengths: gigabytes for unified attention over a real clip. Rows of text queries that
        only pad a batch mean nothing.
        """
        return self._rows(self.query, self.mask)

    def same_site_map(self, mean_heads: bool = False) -> Tensor:
        """How each place attends to itself in other frames, (B, h·w, heads, F, F). Rows sum to 1.

        For factorised temporal attention that is the whole map. For unified attention it is the softmax over frames of the
        scores between tokens of the same place, as if it were temporal attention: renormalised, text left out.

        Args:
            mean_heads: The mean over heads, (B, h·w, F, F). The backward pass then makes the maps of the heads again, and
                nothing but the mean is kept until it comes.
        """
        if mean_heads:
            return again(lambda: self.same_site_map().mean(2), self.query, self.key)
        frames, sites = self._sites()
        if self.role == "factorised":
            return self.attention_map().unflatten(0, (self.batch, sites))
        query, key = (upcast(self._video(x).unflatten(2, (frames, sites))) for x in (self.query, self.key))
        with full_precision(query):
            scores = torch.einsum("bhfsd,bhgsd->bshfg", query, key) * self.scale
        if self.mask is not None:
            start, stop = self._video_span()
            whole = self.mask.expand(*self.mask.shape[:-2], self.query.shape[2], self.key.shape[2])
            part = whole[..., start:stop, start:stop].unflatten(-1, (frames, sites)).unflatten(-3, (frames, sites))
            same = part.diagonal(dim1=-3, dim2=-1).movedim(-1, 1)  # (B, sites, heads, F, F)
            scores = _masked(scores, same)
        return scores.softmax(-1)

    def frame_marginal(self, chunk: int = 1024) -> Tensor:
        """How much of each token's attention falls on each frame, (B, h·w, heads, F, F).

        The entry (f, g) of place s is the attention of token (f, s) summed over all places of frame g. In joint attention
        the softmax includes the text, so rows sum to 1 less what :meth:`cross_map` gives the text. The whole map is made in
        chunks and never held at once.

        Args:
            chunk: Queries per chunk.
        """
        frames, sites = self._sites()
        if self.role == "factorised":
            return self.same_site_map()
        start, stop = self._video_span()

        def reduce(rows: Tensor) -> Tensor:
            return rows[..., start:stop].unflatten(-1, (frames, sites)).sum(-1)

        marginal = self._in_chunks(reduce, chunk, (start, stop))
        return marginal.unflatten(2, (frames, sites)).permute(0, 3, 1, 2, 4)

    def cross_map(self, among_text: bool = False, chunk: int = 1024, mean_heads: bool = False) -> Tensor:
        """How video tokens attend to text tokens, (B, heads, F·h·w, text).

        Cross attention knows only text, so rows sum to 1. In joint attention these are the video rows and text columns of
        the softmax over *all* tokens, so a row sums to the share of its attention that goes to text.

        Args:
            among_text: Divide each row by its sum: the attention within the text, comparable between both kinds of families.
            chunk: Queries per chunk.
            mean_heads: The mean over heads, (B, F·h·w, text), taken in every chunk: of a real clip's cross attention the maps
                of all heads are gigabytes.
        """

        def among(rows: Tensor) -> Tensor:
            # Of an empty prompt no text is left, and rows of nothing are 0.
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=TINY) if among_text and self.role != "cross" else rows
            return rows.mean(1, keepdim=True) if mean_heads else rows

        if self.role == "cross":
            rows = self._in_chunks(among, chunk, (0, self.query.shape[2]))
            if rows.shape[0] != self.batch:
                rows = rows.unflatten(0, (self.batch, -1)).transpose(1, 2).flatten(2, 3)
            return rows.squeeze(1) if mean_heads else rows
        if self.role != "unified" or self.text is None:
            raise UsageError(
                f"{self.name} does not attend to text",
                "cross attention, or joint attention of text and video",
                "tap kind: cross",
            )
        start, stop = self._video_span()
        text = slice(0, start) if self.text == "first" else slice(stop, None)
        rows = self._in_chunks(lambda rows: among(rows[..., text]), chunk, (start, stop))
        return rows.squeeze(1) if mean_heads else rows

    # -- parts -----------------------------------------------------------------------------------------------------

    def _sites(self) -> tuple[int, int]:
        """Frames, and places per frame."""
        if self.role not in ("unified", "factorised"):
            raise UsageError(
                f"{self.name} is no attention over frames", "temporal or unified attention", "tap kind: temporal"
            )
        return self._known_grid()[0], math.prod(self._known_grid()[1:])

    def _known_grid(self) -> tuple[int, int, int]:
        if self.grid is None:
            raise UsageError(
                f"the token grid of {self.name} is not known",
                "a tap on a backbone, whose latents say it",
                "give AttentionTap the backbone instead of the network, or a grid=(F, h, w)",
            )
        return self.grid

    def _video_span(self) -> tuple[int, int]:
        """The video tokens of a unified sequence."""
        count, total = math.prod(self._known_grid()), self.query.shape[2]
        if count > total or (count < total and self.text is None):
            raise UsageError(
                f"{self.name} has {total} tokens", f"{count} of video: F·h·w = {self.grid}", "check the grid"
            )
        return (total - count, total) if self.text == "first" else (0, count)

    def video_queries(self) -> Tensor:
        """Queries of the video's tokens alone, (B, heads, F·h·w, d); of unified attention."""
        return self._video(self.query)

    def video_keys(self) -> Tensor:
        """Keys of the video's tokens alone, (B, heads, F·h·w, d); of unified attention."""
        return self._video(self.key)

    def _video(self, x: Tensor) -> Tensor:
        start, stop = self._video_span()
        return x[:, :, start:stop]

    def _rows(self, query: Tensor, mask: Optional[Tensor]) -> Tensor:
        with full_precision(query):
            scores = upcast(query) @ upcast(self.key).transpose(-1, -2) * self.scale
        return (scores if mask is None else _masked(scores, mask)).softmax(-1)

    def unturned_keys(self) -> Tensor:
        """Keys of the video's tokens before the rotation, (B, F·h·w, heads · d); of unified attention."""
        if self.unturned is None:
            raise UsageError(
                f"the keys of {self.name} before their rotation were not recorded",
                "a tap with unturned=True, on unified attention with a layer to_k",
            )
        start, stop = self._video_span()
        # Some families join text after the keys are made.
        return self.unturned if self.unturned.shape[1] == stop - start else self.unturned[:, start:stop]

    def _in_chunks(self, reduce: Callable[[Tensor], Tensor], chunk: int, span: tuple[int, int]) -> Tensor:
        """``reduce`` of the rows of some queries, a chunk of them at a time; the backward pass makes them again."""
        start, stop = span
        parts = []
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            mask = self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask[..., first:last, :]

            def rows(query: Tensor = self.query[:, :, first:last], mask: Optional[Tensor] = mask) -> Tensor:
                return reduce(self._rows(query, mask))

            parts.append(again(rows, self.query, self.key))
        return torch.cat(parts, 2)


def again(make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
    """What ``make`` gives; the backward pass calls it once more, rather than keeping what it made on the way.

    Args:
        make: A function of ``sources``.
        sources: Where gradients go.
    """
    if not (torch.is_grad_enabled() and any(source.requires_grad for source in sources)):
        return make()
    made: Tensor = checkpoint(make, use_reentrant=False, preserve_rng_state=False)
    return made


def full_precision(like: Tensor) -> torch.autocast:
    """Mixed precision would round the scores to bfloat16, however precise the queries are."""
    return torch.autocast(like.device.type, enabled=False)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
