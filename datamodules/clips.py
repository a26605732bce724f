"""Clips in an epoch's order, in buckets where they have several shapes: what videos and caches have in common."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from datamodules.prompts import PromptDataset
from datamodules.sampling import ResumableSampler
from muybridge.batch import Batch
from muybridge.data.buckets import Bucket, BucketBatches, rows, show
from muybridge.data.cache import Cache
from muybridge.data.clips import Clip
from muybridge.data.selection import Plan
from muybridge.errors import UsageError

Place = tuple[int, int]
"""Epoch and sample."""


class ClipDataset(Dataset[Batch]):
    """Clips as batches of one. A sample is known by its number, or by the epoch and its number.

    Args:
        clips: Their records.
        buckets: Shapes.
        bucket_of: Which shape each clip has; ``None`` for one that is left out.
        places: Which clip each sample is, where it is not each once.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        bucket_of: Sequence[Optional[int]],
        places: Optional[Sequence[int]] = None,
    ) -> None:
        self.clips, self.buckets, self.bucket_of = list(clips), list(buckets), list(bucket_of)
        self.places = list(places) if places is not None else list(range(len(self.clips)))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def samples(self) -> list[Clip]:
        """The clip of every sample."""
        return [self.clips[place] for place in self.places]


class CachedClips(ClipDataset):
    """Clips from a cache. One that could not be read when the cache was made is absent, as it is when read from video.

    Args:
        cache: The cache.
        clips: Their records.
        buckets: Shapes, in pixels.
        bucket_of: Which shape each clip has; ``None`` for one that is left out.
        places: Which clip each sample is, where it is not each once.
        weights: Give motion weights too.
    """

    def __init__(
        self,
        cache: Cache,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        bucket_of: Sequence[Optional[int]],
        places: Optional[Sequence[int]] = None,
        weights: bool = False,
    ) -> None:
        super().__init__(clips, buckets, bucket_of, places)
        self.cache, self.weights = cache, weights
        self.text, self.bad = "text" in cache.columns, cache.bad
        missing = [c.id for c in self.samples if c.id not in self.bad and c.id not in cache.weights] if weights else []
        if missing:
            raise UsageError(
                f"the cache {cache.path} has no motion weights for {len(missing)} of {len(self)} clips, "
                f"such as {', '.join(missing[:3])}",
                "motion weights for every clip",
                "run `muybridge cache` again with --motion DIS, or set motion_weights to false",
            )

    def _clip(self, key: int | Place) -> Clip:
        return self.clips[self.places[key[1] if isinstance(key, tuple) else key]]

    def __getitem__(self, key: int | Place) -> Batch:
        clip = self._clip(key)
        if clip.id not in self.bad:
            return self.cache.clips([clip.id], self.weights, self.text)
        bucket = self.buckets[self.bucket_of[self.places[key[1] if isinstance(key, tuple) else key]] or 0]
        latents = torch.zeros(1, *self.cache.latent_shape(bucket.frames, bucket.height, bucket.width))
        return Batch(
            ids=[clip.id],
            latents=latents,
            prompts=[clip.caption or ""],
            conditioning=self.cache.text(clip.caption or "") if self.text else None,
            weights=torch.ones(1, 1, *latents.shape[2:]) if self.weights else None,
            present=torch.tensor([False]),
            remarks=[self.bad[clip.id]],
        )

    def __getitems__(self, keys: Sequence[int | Place]) -> list[Batch]:
        """Several at once, in one batch: they are then copied out of the files only once."""
        ids = [self._clip(key).id for key in keys]
        if any(name in self.bad for name in ids):
            return [self[key] for key in keys]
        return [self.cache.clips(ids, self.weights, self.text)]


class ClipSampler(ResumableSampler):
    """The order of clips; gives the epoch with every index, since random windows differ between epochs.

    Args:
        samples: Number of samples.
        batches: The order where global batches are of one bucket each.
        options: As for :class:`~datamodules.sampling.ResumableSampler`.
    """

    def __init__(self, samples: int, batches: Optional[BucketBatches] = None, **options: Any) -> None:
        self.plan = batches
        if batches is not None:
            # Whole global batches, so nothing is left to fill up or to drop here.
            samples = len(batches)
        super().__init__(samples, **options)

    @property
    def fills(self) -> int:
        """Slots of a whole epoch that no sample fills; with buckets they are in the order already."""
        return super().fills if self.plan is None else self.plan.fills

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch, in order."""
        return super().order(epoch) if self.plan is None else self.plan.order(epoch)

    def __iter__(self) -> Any:
        indices = super().__iter__()
        epoch = self.epoch
        return ((epoch, index) for index in indices)


class ClipData(ResumableData):
    """A datamodule of clips. A subclass fills ``buckets``, ``origin``, ``_plan`` and ``_sets``.

    Args:
        options: As for :class:`~datamodules.base.ResumableData`.
    """

    buckets: list[Bucket]
    origin: str
    """Where the clips come from, to say it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache: Optional[Cache] = None
        self._sets: dict[str, ClipDataset] = {}
        self._plan = Plan([])
        self._enlarged: list[bool] = []
        self._told = False

    @property
    def clip_sizes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width of every bucket: checked against the model before its weights load."""
        return [(b.frames, b.height, b.width) for b in self.buckets]

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """The first of them."""
        return self.clip_sizes[0]

    # -- training --------------------------------------------------------------------------------------------------

    def train_dataset(self) -> ClipDataset:
        return self._sets["train"]

    def sample_weights(self) -> Optional[Sequence[float]]:
        return self._plan.weights

    def sample_names(self, dataset: Dataset[Any]) -> Iterable[str]:
        """Ids; with several buckets, the order depends on which of them each clip is in."""
        assert isinstance(dataset, ClipDataset)
        if len(self.buckets) == 1:
            return (clip.id for clip in dataset.samples)
        shapes = [None if b is None else self.buckets[b] for b in dataset.bucket_of]
        return (f"{dataset.clips[place].id} {shapes[place]}" for place in dataset.places)

    def make_sampler(self, dataset: Dataset[Any], **ranks: int) -> ClipSampler:
        """The order of the clips: with several buckets, one whose global batches are of one bucket each."""
        assert isinstance(dataset, ClipDataset)
        options: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": self.shuffle, "seed": self.seed, **ranks}
        if len(self.buckets) == 1:
            self._tell(f"{len(dataset)} clips of {self.buckets[0]} (frames x height x width) from {self.origin}")
            return ClipSampler(len(dataset), weights=self.sample_weights(), drop_last=self.drop_last, **options)
        bucket_of = [dataset.bucket_of[place] for place in dataset.places]
        global_batch = self.batch_size * ranks.get("num_replicas", 1)
        batches = BucketBatches(
            bucket_of, global_batch, "drop" if self.drop_last else "pad", self.seed, self.shuffle, self.sample_weights()
        )
        enlarged = [bool(self._enlarged) and self._enlarged[place] for place in dataset.places]
        left_out = [clip.problem or "" for clip, b in zip(dataset.samples, bucket_of, strict=True) if b is None]
        self._tell(show(rows(self.buckets, bucket_of, batches, enlarged), left_out))
        return ClipSampler(len(dataset), batches, **options)

    def _tell(self, what: str) -> None:
        if not self._told:
            rank_zero_info(what)
            self._told = True

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch; with buckets, what it was counted in."""
        state = super().state_dict()
        if state and len(self.buckets) > 1 and self._sampler is not None:
            state["global_batch"] = self._sampler.global_batch
        return state

    def _enter(self) -> None:
        assert self._loaded is not None
        assert self._sampler is not None
        before, now = self._loaded.get("global_batch"), self._sampler.global_batch
        if before not in (None, now) and self._loaded["samples_seen"] and not self._loaded["epoch_done"]:
            raise UsageError(
                f"this run stopped inside an epoch of buckets in global batches of {before} clips, and is to go on in {now}",
                f"batch_size times ranks of {before}: what a bucket's batches are made of depends on it",
                "set batch_size so, or resume from a checkpoint of an epoch's end",
            )
        super()._enter()

    # -- the rest --------------------------------------------------------------------------------------------------

    def _plain_loader(self, name: str) -> DataLoader[Batch]:
        data = self._sets[name]
        members: list[list[int]] = [[] for _ in self.buckets]
        for sample, place in enumerate(data.places):
            bucket = data.bucket_of[place]
            if bucket is not None:
                members[bucket].append(sample)
        return self.evaluation_loader(data, members, self.num_workers)

    def in_order(
        self, part: Literal["train", "validation"], without: Container[str] = (), together: bool = False
    ) -> Collection[Any]:
        if part not in self._sets:
            return []
        data = self._sets[part]
        members: list[list[int]] = [[] for _ in self.buckets]
        first = {place: sample for sample, place in reversed(list(enumerate(data.places)))}
        for place, sample in sorted(first.items(), key=lambda pair: pair[1]):
            bucket = data.bucket_of[place]
            if bucket is not None and data.clips[place].id not in without:
                members[bucket].append(sample)
        if not any(members):
            return []
        return self.evaluation_loader(data, members, self.num_workers, together)  # type: ignore[return-value]

    def val_dataloader(self) -> Any:
        """The validation clips in their order; nothing where there are none."""
        return self._plain_loader("validation") if "validation" in self._sets else []

    def test_dataloader(self) -> Any:
        """As for validation, or the training clips where there is no validation source."""
        return self._plain_loader("validation" if "validation" in self._sets else "train")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The captions of the validation clips, or of the training clips, as prompts."""
        data = self._sets.get("validation", self._sets["train"])
        clips = [data.clips[place] for place in dict.fromkeys(data.places)]
        captions = [clip.caption or "" for clip in clips]
        return self.evaluation_loader(PromptDataset([clip.id for clip in clips], captions))
