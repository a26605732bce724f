"""Clips from a cache: no video is decoded, and neither VAE nor text encoder is loaded."""

from __future__ import annotations

from typing import Optional

from datamodules.clips import CachedClips, ClipData
from muybridge.data.cache import Cache
from muybridge.data.clips import Clip
from muybridge.data.selection import plan
from muybridge.errors import UsageError


class LatentData(ClipData):
    """Clips whose latents and text embeddings were cached before.

    Give the backbone ``components: [denoiser]`` and nothing else is loaded.

    Args:
        path: A cache, as ``muybridge cache`` writes it.
        validation: A cache of the clips for the validation loss; none where not given.
        selection: Train on these clips only: a .txt file with one id a line, or .csv or .parquet with a column ``id``.
        sampling_weights: Draw clips with replacement, each as often as a .csv or .parquet file with columns ``id`` and ``weight``
            says; the selection's own column ``weight`` where not given, and every clip once where there is none.
        repeats: How often the clips stand in one epoch.
        motion_weights: Read motion weights from the cache too.
        batch_size: Clips of a micro-batch, on every rank.
        num_workers: Processes that read, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out an epoch's last clips where they do not fill a batch on every rank, rather than fill it up.
    """

    def __init__(
        self,
        path: str,
        validation: Optional[str] = None,
        selection: Optional[str] = None,
        sampling_weights: Optional[str] = None,
        repeats: int = 1,
        motion_weights: bool = False,
        batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, shuffle=shuffle, drop_last=drop_last
        )
        self.path, self.validation, self.origin = path, validation, path
        self.selection, self.sampling_weights, self.repeats = selection, sampling_weights, repeats
        self.motion_weights = motion_weights
        self.buckets = []

    def setup(self, stage: str) -> None:
        """Open the caches."""
        if self._sets:
            return
        self.cache = Cache(self.path)
        if not self.cache.ids:
            raise UsageError(
                f"the cache {self.path} holds no clip", "at least one", "run `muybridge cache` on a source of videos"
            )
        self._plan = plan(self.cache.ids, self.selection, self.sampling_weights, self.repeats)
        self.buckets = self.cache.buckets
        self._sets["train"] = self._dataset(self.cache, self._plan.places)
        if self.validation is not None:
            other = Cache(self.validation)
            other.check_like(self.cache)
            self._sets["validation"] = self._dataset(other)

    def _dataset(self, cache: Cache, places: Optional[list[int]] = None) -> CachedClips:
        sizes, captions = cache.sizes, cache.captions
        clips = [Clip(name, cache.path, caption) for name, caption in zip(cache.ids, captions, strict=True)]
        bucket_of = [self.buckets.index(size) if size in self.buckets else None for size in sizes]
        strange = next((size for size, bucket in zip(sizes, bucket_of, strict=True) if bucket is None), None)
        if strange is not None:
            raise UsageError(
                f"the cache {cache.path} holds clips of {strange} and {self.path} holds none",
                f"clips of {', '.join(map(str, self.buckets))} (frames x height x width)",
                "cache both under one configuration",
            )
        if places is None:
            places = sorted(range(len(clips)), key=lambda i: bucket_of[i] or 0)
        return CachedClips(cache, clips, self.buckets, bucket_of, places, self.motion_weights)
