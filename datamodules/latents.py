"""Clips from a cache: no video is decoded, and neither VAE nor text encoder is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from datamodules.collate import collate
from datamodules.prompts import PromptDataset
from muybridge.batch import Batch
from muybridge.data.cache import Cache
from muybridge.data.selection import Plan, plan
from muybridge.errors import UsageError


class CachedDataset(Dataset[Batch]):
    """Clips of a cache as batches of one.

    Args:
        cache: The cache.
        ids: The clips, in order.
        weights: Give motion weights too.
    """

    def __init__(self, cache: Cache, ids: Sequence[str], weights: bool = False) -> None:
        self.cache, self.ids, self.weights = cache, list(ids), weights
        self.text = "text" in cache.columns
        if weights:
            missing = [i for i in self.ids if i not in cache.weights]
            if missing:
                raise UsageError(
                    f"the cache {cache.path} has no motion weights for {len(missing)} of {len(self.ids)} clips, "
                    f"such as {', '.join(missing[:3])}",
                    "motion weights for every clip",
                    "add them, or set motion_weights to false",
                )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        return self.cache.clips([self.ids[index]], self.weights, self.text)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Several at once, in one batch: they are then copied out of the files only once."""
        return [self.cache.clips([self.ids[i] for i in indices], self.weights, self.text)]


class LatentData(ResumableData):
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
        self.path, self.validation = path, validation
        self.selection, self.sampling_weights, self.repeats = selection, sampling_weights, repeats
        self.motion_weights = motion_weights
        self.cache: Optional[Cache] = None
        self._plan = Plan([])
        self._sets: dict[str, CachedDataset] = {}

    def setup(self, stage: str) -> None:
        """Open the caches."""
        if self.cache is not None:
            return
        self.cache = Cache(self.path)
        ids = self.cache.ids
        if not ids:
            raise UsageError(
                f"the cache {self.path} holds no clip", "at least one", "run `muybridge cache` on a source of videos"
            )
        self._plan = plan(ids, self.selection, self.sampling_weights, self.repeats)
        self._sets["train"] = CachedDataset(
            self.cache, [ids[place] for place in self._plan.places], self.motion_weights
        )
        if self.validation is not None:
            other = Cache(self.validation)
            self._sets["validation"] = CachedDataset(other, other.ids, self.motion_weights)

    def train_dataset(self) -> Dataset[Batch]:
        return self._sets["train"]

    def sample_weights(self) -> Optional[Sequence[float]]:
        return self._plan.weights

    def _plain_loader(self, name: str) -> DataLoader[Batch]:
        return DataLoader(
            self._sets[name], batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate
        )

    def val_dataloader(self) -> Any:
        """The validation clips in their order; nothing where there are none."""
        return self._plain_loader("validation") if "validation" in self._sets else []

    def test_dataloader(self) -> Any:
        """As for validation, or the training clips where there is no cache for validation."""
        return self._plain_loader("validation" if "validation" in self._sets else "train")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The captions of the validation clips, or of the training clips, as prompts."""
        clips = self._sets.get("validation", self._sets["train"])
        captions = [clips.cache.latents.info(name, "caption")[0] for name in clips.ids]
        return DataLoader(PromptDataset(clips.ids, captions), batch_size=self.batch_size, collate_fn=collate)
