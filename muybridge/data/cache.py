"""Latents and text embeddings made once: a folder that stands in for VAE, text encoder and videos in training.

A cache holds columns, each a folder of shards (:mod:`muybridge.data.shards`) with a manifest that says what its rows depend on::

    cache/
      latents/  manifest.json  000000.safetensors  000000.parquet  ...   one row a clip
      text/     ...                                                      one row a distinct caption, and the empty one
      weights/  ...                                                      motion weights, where something added them

Columns know nothing of one another, so another kind is added to a cache without touching what is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import pyarrow as pa
import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.begun import begun, check_same
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.data.content import content_key, latents_key, size_of_key, text_encoder_key, text_key
from muybridge.data.shards import ShardReader, ShardWriter, find_broken, remove, sweep
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError
from muybridge.whole import write_text

FORMAT = 1
"""Of the whole layout; a cache of another number is refused."""
UNCONDITIONAL = "unconditional"
"""Reserved name, in the text column, of what :meth:`Backbone.unconditional` gives; ``unconditional:`` and a text's key for
negative prompts."""

COLUMNS: dict[str, pa.Schema] = {
    "latents": pa.schema(
        [
            ("position", pa.int64()),
            ("caption", pa.string()),
            ("caption_hash", pa.string()),
            ("frames", pa.int32()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("fps", pa.float64()),
            ("source", pa.string()),
            ("error", pa.string()),
        ]
    ),
    "text": pa.schema([("text", pa.string()), ("length", pa.int32())]),
    "weights": pa.schema([("source", pa.string()), ("largest", pa.float64()), ("mean", pa.float64())]),
}
"""What a cache can hold, and the index columns of each kind. ``position`` is the clip's place in its source; ``source`` the
:func:`source_key` of what was encoded; ``error`` why there are no latents of it; ``largest`` and ``mean`` how far the pixels of a
clip move, in pixels."""

Section = Literal["encoder", "preprocessing"]
Key = Mapping[str, Any]


def source_key(content: str, clip: Clip) -> str:
    """The content key of a clip's file, and the part of the picture that is used, where it is not all of it.

    With the preprocessing and the span, which is in the id, it is everything that a clip's pixels depend on.
    """
    return content if clip.crop is None else f"{content}-crop:{','.join(map(str, clip.crop))}"


def _crop_of(source: str) -> str:
    """What a source key says of the part of the picture."""
    return source.partition("-crop:")[2]


def unconditional_name(negative_prompt: str = "") -> str:
    """Name of the unconditional branch in the text column."""
    return f"{UNCONDITIONAL}:{text_key(negative_prompt)}" if negative_prompt else UNCONDITIONAL


# -- manifests -----------------------------------------------------------------------------------------------------------------


def check_key(cache: Path, made: Key, wanted: Key) -> None:
    """Refuse a cache made under other settings."""
    check_same(f"the cache {cache} was", made, wanted, "make another cache: muybridge cache --out ANOTHER")


def read_manifest(column: Path) -> dict[str, Any]:
    """A column's manifest."""
    file = column / "manifest.json"
    if not file.is_file():
        raise UsageError(f"{column} has no manifest.json", "a folder that `muybridge cache` wrote", "check the path")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{file} can't be read ({error})", "the manifest as it was written", "make the cache again"
        ) from error
    if manifest.get("format") != FORMAT:
        raise UsageError(
            f"{column} is a cache of format {manifest.get('format')}", f"format {FORMAT}", "make the cache again"
        )
    return manifest


def open_column(
    cache: str | Path,
    name: str,
    encoder: Key,
    preprocessing: Optional[Key] = None,
    storage: Optional[Key] = None,
    **options: Any,
) -> ShardWriter:
    """A writer into a column of a cache, new or begun by an earlier run under the same settings.

    What broke since is dropped, to be made again. Several ranks may call it at once.

    Args:
        cache: Folder of the cache.
        name: One of the keys of ``COLUMNS``.
        encoder: What made the rows.
        preprocessing: What was done to a clip before.
        storage: How the rows are kept.
        options: Further arguments of :class:`~muybridge.data.shards.ShardWriter`.
    """
    folder = Path(cache) / name
    content = {"encoder": encoder, "preprocessing": preprocessing or {}, "storage": storage or {}}
    if begun(folder / "manifest.json", "cache"):
        manifest = read_manifest(folder)
        for section, wanted in content.items():
            check_key(Path(cache), manifest[section], wanted)
    else:
        text = json.dumps({"format": FORMAT, "column": name, **content}, indent=2)
        write_text(folder / "manifest.json", text + "\n")
    sweep(folder)
    remove(folder, find_broken(folder))
    return ShardWriter(folder, COLUMNS[name], **options)


# -- reading -------------------------------------------------------------------------------------------------------------------


class Cache:
    """A cache on disk, opened for reading. Worker processes may share it.

    Args:
        path: Folder that ``muybridge cache`` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError(
                f"cache {path} does not exist",
                "a folder that `muybridge cache` wrote",
                f"relative paths are looked up from {Path.cwd()}",
            )
        self.columns = [name for name in COLUMNS if (self.path / name).is_dir()]
        if not self.columns:
            raise UsageError(
                f"{path} is no cache", f"a folder with {' or '.join(COLUMNS)} in it", "muybridge cache writes one"
            )
        self.manifests = {name: read_manifest(self.path / name) for name in self.columns}

    def _column(self, name: str) -> ShardReader:
        if name not in self.columns:
            raise UsageError(
                f"the cache {self.path} holds {', '.join(self.columns)}",
                f"{name} as well",
                "run `muybridge cache` on it again to add them",
            )
        return ShardReader(self.path / name)

    @cached_property
    def latents(self) -> ShardReader:
        """Latents by clip id."""
        return self._column("latents")

    @cached_property
    def texts(self) -> ShardReader:
        """Text embeddings by key of the text."""
        return self._column("text")

    @cached_property
    def weights(self) -> ShardReader:
        """Motion weights by clip id."""
        return self._column("weights")

    @cached_property
    def bad(self) -> dict[str, str]:
        """Clips of the source that could not be read, and why."""
        table = self.latents.table
        if not len(table):
            return {}
        rows = zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True)
        return {name: error for name, error in rows if error is not None}

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """The clips that are there, in the order of their source."""
        table = self.latents.table
        if not len(table):
            return []
        names = ["position", "id", "caption", "frames", "height", "width", "error"]
        rows = [row for row in table.select(names).to_pylist() if row["error"] is None]
        return sorted(rows, key=lambda row: (row["position"], row["id"]))

    @property
    def ids(self) -> list[str]:
        """Ids of the clips that are there, in the order of their source."""
        return [row["id"] for row in self._rows]

    @property
    def captions(self) -> list[str]:
        """Their captions."""
        return [row["caption"] for row in self._rows]

    @property
    def sizes(self) -> list[Bucket]:
        """Frames, height and width of each, in pixels."""
        return [Bucket(row["frames"], row["height"], row["width"]) for row in self._rows]

    @property
    def buckets(self) -> list[Bucket]:
        """All sizes that the cache was made for, in the order of the configuration."""
        listed = [Bucket.parse(text) for text in self.preprocessing.get("clips", ())]
        return list(dict.fromkeys([*listed, *sorted(set(self.sizes))]))

    @cached_property
    def _latent_shapes(self) -> dict[Bucket, tuple[int, ...]]:
        table = self.latents.table
        names = ["frames", "height", "width", "shape", "error"]
        rows = [row for row in table.select(names).to_pylist() if row["error"] is None]
        return {Bucket(row["frames"], row["height"], row["width"]): tuple(row["shape"]) for row in rows}

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of clips of a size."""
        size = Bucket(frames, height, width)
        if size not in self._latent_shapes:
            raise UsageError(f"the cache {self.path} holds no clip of {size}", "at least one that could be read")
        return self._latent_shapes[size]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the clips were cut and framed."""
        return dict(self.manifests["latents"]["preprocessing"]) if "latents" in self.manifests else {}

    # -- is it the one that is wanted? -----------------------------------------------------------------------------

    def check_preprocessing(self, wanted: Key) -> None:
        """Refuse latents of clips that were cut or framed otherwise."""
        check_key(self.path, self.preprocessing, wanted)

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse latents and text embeddings that another model made, or this one under other settings."""
        if "latents" in self.columns:
            check_key(self.path, self.manifests["latents"]["encoder"], latents_key(backbone))
        if "text" in self.columns:
            check_key(self.path, self.manifests["text"]["encoder"], text_encoder_key(backbone))

    def check_like(self, other: Cache) -> None:
        """Refuse rows that other encoders made than those of another cache."""
        for name in set(self.columns) & set(other.columns) & {"latents", "text"}:
            check_key(self.path, self.manifests[name]["encoder"], other.manifests[name]["encoder"])

    def check_clips(self, clips: Sequence[Clip]) -> None:
        """Refuse a cache that lacks clips of a source, or holds them as their files or captions were before."""
        absent = [c.id for c in clips if c.id not in self.latents]
        if absent:
            raise UsageError(
                f"the cache {self.path} lacks {len(absent)} of {len(clips)} clips, such as {', '.join(absent[:3])}",
                "every clip of the source",
                "run `muybridge cache` again: it encodes what is missing",
            )
        sizes: dict[Path, int] = {}
        stale = []
        for clip in clips:
            source, caption, error = self.latents.info(clip.id, "source", "caption", "error")
            if error is not None:
                continue
            if clip.path not in sizes:
                sizes[clip.path] = clip.path.stat().st_size if clip.path.is_file() else -1
            if sizes[clip.path] not in (-1, size_of_key(source)):
                stale.append(f"{clip.id} (its file)")
            elif _crop_of(source) != _crop_of(source_key("", clip)):
                stale.append(f"{clip.id} (its crop)")
            elif (clip.caption or "") != caption:
                stale.append(f"{clip.id} (its caption)")
        if stale:
            raise UsageError(
                f"{len(stale)} of {len(clips)} clips changed since {self.path} was made, such as {', '.join(stale[:3])}",
                "clips as they were encoded",
                "run `muybridge cache` again: it encodes what changed",
            )

    def check_texts(self, texts: Sequence[str]) -> None:
        """Refuse a cache that lacks the embeddings of some texts."""
        absent = [t for t in texts if not self.has_text(t)]
        if absent:
            raise UsageError(
                f"the cache {self.path} lacks {len(absent)} of {len(texts)} texts, such as {absent[0]!r}",
                "an embedding of every prompt",
                "run `muybridge cache` again with these prompts: it encodes what is missing",
            )

    # -- rows ------------------------------------------------------------------------------------------------------

    def has_text(self, text: str) -> bool:
        """Whether a text's embedding is there."""
        return text_key(text) in self.texts

    def text(self, text: str) -> Conditioning:
        """The embedding of one text, exactly as the text encoder gave it."""
        return self._conditioning(text_key(text), text)

    def unconditional(self, negative_prompt: str = "") -> Conditioning:
        """The conditioning of the unconditional branch."""
        return self._conditioning(unconditional_name(negative_prompt), negative_prompt)

    @property
    def negative_prompts(self) -> list[str]:
        """Texts whose unconditional branch is there; the empty one among them."""
        names, texts = self.texts.table["id"].to_pylist(), self.texts.table["text"].to_pylist()
        return [text for name, text in zip(names, texts, strict=True) if name.partition(":")[0] == UNCONDITIONAL]

    def _conditioning(self, name: str, text: str) -> Conditioning:
        if name not in self.texts:
            raise UsageError(
                f"the cache {self.path} holds no embedding of {text!r}",
                "a text that was cached",
                "run `muybridge cache` again with it among the captions or in --prompts",
            )
        return restore_texts([self.texts.read(name)], [self.texts.info(name, "length")[0]])

    def clips(self, ids: Sequence[str], weights: bool = False, text: bool = True) -> Batch:
        """Some clips as a batch, copied out of the files once.

        Args:
            ids: The clips; of one shape.
            weights: Give their motion weights too.
            text: Give their text embeddings too.
        """
        captions, rates = zip(*(self.latents.info(i, "caption", "fps") for i in ids), strict=True)
        return Batch(
            ids=list(ids),
            latents=_stack([self.latents.read(i)["latents"] for i in ids], ids),
            prompts=list(captions),
            conditioning=self._conditionings([text_key(caption) for caption in captions]) if text else None,
            weights=_stack([self.weights.read(i)["weights"] for i in ids], ids) if weights else None,
            fps=rates[0] if max(rates) - min(rates) <= 0.01 * rates[0] else None,
        )

    def _conditionings(self, names: Sequence[str]) -> Conditioning:
        return restore_texts([self.texts.read(n) for n in names], [self.texts.info(n, "length")[0] for n in names])

    def motion(self, measure: Literal["largest", "mean"] = "mean") -> dict[str, float]:
        """How far the pixels of each clip move, in pixels, by id."""
        table = self.weights.table
        return dict(zip(table["id"].to_pylist(), table[measure].to_pylist(), strict=True))

    def verify(self) -> dict[str, str]:
        """Read every byte of every column; what is not as it was written, and why."""
        found = {}
        for name in self.columns:
            found.update({f"{name}/{row}": why for row, why in ShardReader(self.path / name).verify().items()})
        return found


# -- text as rows --------------------------------------------------------------------------------------------------------------


def store_text(conditioning: Conditioning) -> tuple[dict[str, Tensor], int]:
    """The tensors of one text, and its padded length.

    Most encoders pad with zeros: they are left off on disk (a caption of 80 tokens then takes 0.6 MB instead of 4) and put
    back by :func:`restore_text`. What is not exactly zero is kept.
    """
    text = conditioning.text[0]
    used = int(text.flatten(1).ne(0).any(1).nonzero().max()) + 1 if bool(text.ne(0).any()) else 0
    tensors = {"text": text[:used]}
    if conditioning.mask is not None:
        tensors["mask"] = conditioning.mask[0]
    if conditioning.pooled is not None:
        tensors["pooled"] = conditioning.pooled[0]
    return tensors, text.shape[0]


def restore_texts(rows: Sequence[Mapping[str, Tensor]], lengths: Sequence[int]) -> Conditioning:
    """The inverse of :func:`store_text`, of several texts as one batch."""
    first = rows[0]["text"]
    text = first.new_zeros(len(rows), max(lengths), *first.shape[1:])
    for place, row in enumerate(rows):
        text[place, : len(row["text"])] = row["text"]
    kept = {
        name: _padded([row[name] for row in rows], name == "mask") for name in ("mask", "pooled") if name in rows[0]
    }
    return Conditioning(text, **kept)


def _padded(values: Sequence[Tensor], pad: bool) -> Tensor:
    length = max(len(v) for v in values)
    if not pad or all(len(v) == length for v in values):
        return torch.stack(list(values))
    return torch.stack([torch.cat([v, v.new_zeros(length - len(v))]) for v in values])


def _stack(values: Sequence[Tensor], ids: Sequence[str]) -> Tensor:
    """Tensors of one shape as a batch in float32, whatever they are kept in."""
    if len({v.shape for v in values}) > 1:
        shapes = {tuple(v.shape): name for v, name in zip(values, ids, strict=True)}
        said = ", ".join(f"{list(shape)} ({name})" for shape, name in shapes.items())
        raise UsageError(f"clips of {len(shapes)} shapes in one batch: {said}", "one shape a batch")
    return torch.stack(list(values)).float()


# -- writing -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """One rank's part of the work: names are dealt out by their hash, so ranks need not talk.

    Args:
        rank: This rank.
        world: Number of ranks.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}", "a rank from 0 to below the number of ranks")

    def __contains__(self, name: str) -> bool:
        return int(text_key(name), 16) % self.world == self.rank


def todo_texts(cache: str | Path, texts: Sequence[str], share: Share = Share()) -> list[str]:
    """Distinct texts of this rank that a text column does not hold yet."""
    column = ShardReader(Path(cache) / "text")
    return [t for t in dict.fromkeys(texts) if t in share and text_key(t) not in column]


def todo_clips(cache: str | Path, clips: Sequence[Clip], share: Share = Share()) -> tuple[list[int], list[int]]:
    """Places of this rank's clips that are to be encoded, and of those of which only the caption changed.

    To be encoded are clips that the latents column lacks, or holds as they were before their file or their crop changed. Clips
    that could not be read are tried again. A clip whose file is not there at the moment stays as it is.
    """
    column = ShardReader(Path(cache) / "latents")
    keys: dict[Path, Optional[str]] = {}
    encode, rename = [], []
    for place, clip in enumerate(clips):
        if clip.id not in share:
            continue
        source, caption, error = (
            column.info(clip.id, "source", "caption", "error") if clip.id in column else (None,) * 3
        )
        if source is None or error is not None:
            encode.append(place)
            continue
        if clip.path not in keys:
            keys[clip.path] = content_key(clip.path) if clip.path.is_file() else None
        content = keys[clip.path]
        if content is not None and source_key(content, clip) != source:
            encode.append(place)
        elif caption != (clip.caption or ""):
            rename.append(place)
    return encode, rename


def todo_weights(cache: str | Path, clips: Sequence[Clip], share: Share = Share()) -> list[int]:
    """Places of this rank's clips that have latents, and no motion weights or those of their file as it was before."""
    latents, weights = ShardReader(Path(cache) / "latents"), ShardReader(Path(cache) / "weights")
    todo = []
    for place, clip in enumerate(clips):
        if clip.id not in share or clip.id not in latents:
            continue
        source, error = latents.info(clip.id, "source", "error")
        if error is None and (clip.id not in weights or weights.info(clip.id, "source")[0] != source):
            todo.append(place)
    return todo


def add_renamed(writer: ShardWriter, column: ShardReader, clip: Clip, position: int) -> None:
    """Give a clip of the latents column its new caption; nothing is encoded."""
    kept = ("frames", "height", "width", "fps", "source", "error")
    info = dict(zip(kept, column.info(clip.id, *kept), strict=True))
    caption = clip.caption or ""
    hashed = text_key(caption)
    writer.add(clip.id, column.read(clip.id), position=position, caption=caption, caption_hash=hashed, **info)


def add_text(writer: ShardWriter, backbone: Backbone, text: str) -> None:
    """Encode one text into the text column."""
    tensors, length = store_text(backbone.encode_text([text]))
    writer.add(text_key(text), tensors, text=text, length=length)


def add_unconditional(writer: ShardWriter, backbone: Backbone, negative_prompt: str = "") -> None:
    """Encode an unconditional branch into the text column, under its reserved name."""
    tensors, length = store_text(backbone.unconditional(negative_prompt))
    writer.add(unconditional_name(negative_prompt), tensors, text=negative_prompt, length=length)


def add_clip(
    writer: ShardWriter, backbone: Backbone, clip: Clip, position: int, batch: Batch, dtype: torch.dtype = torch.float32
) -> None:
    """Encode one clip into the latents column.

    Args:
        writer: Of the column.
        backbone: With its VAE.
        clip: The clip's record.
        position: Its place in the source.
        batch: Its pixels, as a batch of one.
        dtype: What the latents are kept in.
    """
    if batch.pixels is None:
        raise ValueError("a batch without pixels can't be encoded")
    frames, height, width = batch.pixels.shape[2:]
    caption = clip.caption or ""
    writer.add(
        clip.id,
        {"latents": backbone.encode(batch.pixels.to(backbone.device))[0].to(dtype)},
        position=position,
        caption=caption,
        caption_hash=text_key(caption),
        frames=frames,
        height=height,
        width=width,
        fps=batch.fps,
        source=source_key(content_key(clip.path), clip),
        error=None,
    )


def add_bad_clip(writer: ShardWriter, clip: Clip, position: int, why: str) -> None:
    """Note in the latents column that a clip can't be read."""
    writer.add(clip.id, {}, position=position, caption=clip.caption, error=why)
