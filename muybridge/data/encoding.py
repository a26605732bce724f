"""From clips and texts to a cache: one rank's share of the work, begun wherever an earlier run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

import torch

from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.data.cache import (
    Cache,
    Share,
    add_bad_clip,
    add_clip,
    add_renamed,
    add_text,
    add_unconditional,
    open_column,
    todo_clips,
    todo_texts,
    todo_weights,
    unconditional_name,
)
from muybridge.data.clips import Clip
from muybridge.data.content import latents_key, text_encoder_key
from muybridge.data.shards import SHARD_BYTES
from muybridge.errors import UsageError
from muybridge.motion import MotionEstimator, MotionWeights, magnitude, motion_weights
from muybridge.video import to_frames


class ClipSource(Protocol):
    """What clips are encoded from: a dataset of batches of one, with its list."""

    @property
    def clips(self) -> Sequence[Clip]:
        """The clips, in the order of the dataset."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """All settings that the pixels of a clip depend on."""

    def __getitem__(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Material:
    """What a datamodule's run would have to encode.

    Args:
        clips: The training clips, where there are any.
        validation: The validation clips, where there are any.
        texts: Texts that belong to no clip.
    """

    clips: Optional[ClipSource] = None
    validation: Optional[ClipSource] = None
    texts: Sequence[str] = ()


class Counter(Protocol):
    """Told of everything that is done; see ``muybridge.progress``."""

    def advance(self, count: int = 1) -> None:
        """So many more are done."""


@dataclass
class Tally:
    """What one rank did.

    Args:
        clips: Clips encoded.
        renamed: Clips that got a new caption.
        bad: Why clips could not be read, by id.
    """

    clips: int = 0
    renamed: int = 0
    bad: dict[str, str] = field(default_factory=dict)


Reader = Callable[[ClipSource, list[int]], Iterable[Batch]]
Watch = Callable[[str, int], AbstractContextManager[Counter]]


def encode_texts(
    out: str | Path,
    backbone: Backbone,
    texts: Sequence[str],
    negative_prompts: Sequence[str],
    share: Share,
    watch: Watch,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Encode the texts of this rank that a cache lacks; returns how many.

    Args:
        out: The cache.
        backbone: With its text encoder.
        texts: All texts, of all ranks.
        negative_prompts: Unconditional branches beside the empty one.
        share: This rank's.
        watch: Makes a counter from a label and a number.
        shard_bytes: Size of a shard.
    """
    with open_column(out, "text", text_encoder_key(backbone), shard_bytes=shard_bytes) as writer:
        todo = todo_texts(out, texts, share)
        cache = Cache(out)
        empty = [n for n in dict.fromkeys(["", *negative_prompts]) if unconditional_name(n) in share]
        empty = [n for n in empty if unconditional_name(n) not in cache.texts]
        with watch("texts", len(todo) + len(empty)) as counter:
            for negative_prompt in empty:
                add_unconditional(writer, backbone, negative_prompt)
                counter.advance()
            for text in todo:
                add_text(writer, backbone, text)
                counter.advance()
    return len(todo) + len(empty)


def encode_clips(
    out: str | Path,
    backbone: Backbone,
    source: ClipSource,
    share: Share,
    read: Reader,
    watch: Watch,
    dtype: torch.dtype = torch.float32,
    on_bad: Optional[Callable[[Clip, str], None]] = None,
    shard_bytes: int = SHARD_BYTES,
) -> Tally:
    """Encode the clips of this rank that a cache lacks.

    Args:
        out: The cache.
        backbone: With its VAE.
        source: All clips, of all ranks.
        share: This rank's.
        read: Gives the batches at some places of the source, in order.
        watch: Makes a counter from a label and a number.
        dtype: What the latents are kept in.
        on_bad: Called with a clip that could not be read, and why; may raise.
        shard_bytes: Size of a shard.
    """
    tally = Tally()
    storage = {"dtype": str(dtype).removeprefix("torch.")}
    with open_column(
        out, "latents", latents_key(backbone), source.preprocessing, storage, shard_bytes=shard_bytes
    ) as writer:
        todo, renamed = todo_clips(out, source.clips, share)
        column = Cache(out).latents
        for place in renamed:
            add_renamed(writer, column, source.clips[place], place)
        tally.renamed = len(renamed)
        with watch("clips", len(todo)) as counter:
            for place, batch in zip(todo, read(source, todo), strict=True):
                clip = source.clips[place]
                if batch.ids != [clip.id]:
                    raise RuntimeError(
                        f"place {place} of the source is {clip.id} in its list and {batch.ids} when read"
                    )
                if batch.present is None or bool(batch.present.all()):
                    add_clip(writer, backbone, clip, place, batch, dtype)
                    tally.clips += 1
                else:
                    why = batch.remarks[0] if batch.remarks else "unreadable"
                    add_bad_clip(writer, clip, place, why)
                    tally.bad[clip.id] = why
                    if on_bad is not None:
                        on_bad(clip, why)
                counter.advance()
    return tally


def weigh_clips(
    out: str | Path,
    backbone: Backbone,
    source: ClipSource,
    estimator: MotionEstimator,
    how: MotionWeights,
    share: Share,
    read: Reader,
    watch: Watch,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Estimate the motion of this rank's clips that a cache has latents of and no weights; returns how many.

    Args:
        out: The cache.
        backbone: Knows the latent grid.
        source: All clips, of all ranks.
        estimator: Of displacement.
        how: What it becomes.
        share: This rank's.
        read: Gives the batches at some places of the source, in order.
        watch: Makes a counter from a label and a number.
        shard_bytes: Size of a shard.
    """
    key = {**estimator.key(), "weights": how.key()}
    with open_column(out, "weights", key, source.preprocessing, shard_bytes=shard_bytes) as writer:
        todo = todo_weights(out, source.clips, share)
        latents = Cache(out).latents
        with watch("motion", len(todo)) as counter:
            for place, batch in zip(todo, read(source, todo), strict=True):
                clip = source.clips[place]
                if batch.pixels is None or not (batch.present is None or bool(batch.present.all())):
                    why = batch.remarks[0] if batch.remarks else "unreadable"
                    raise UsageError(
                        f"{clip.id} was encoded and can't be read now: {why}", "the files that the latents were made of"
                    )
                found = estimator(to_frames(batch.pixels[0]))
                grid = backbone.latent_shape(*batch.pixels.shape[2:])[1:]
                length = magnitude(found)
                writer.add(
                    clip.id,
                    {"weights": motion_weights(found, grid, how)},
                    source=latents.info(clip.id, "source")[0],
                    largest=float(length.max()),
                    mean=float(length.mean()),
                )
                counter.advance()
    return len(todo)
