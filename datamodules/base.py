"""Training data whose place in an epoch is part of the checkpoint."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from typing import Any, Literal, Optional

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from datamodules.collate import collate
from datamodules.evaluation import EvaluationSampler
from datamodules.filling import FilledSet
from datamodules.sampling import LateLoader, ResumableSampler, outlive_notice
from muybridge.errors import UsageError


class ResumableData(pl.LightningDataModule):
    """A datamodule that continues inside an epoch: no sample twice, none left out, whatever the ranks and workers are now.

    A subclass gives :meth:`train_dataset`. Lightning restores how many batches the interrupted run had done, but begins the
    data anew and counts in batches of that run's size; both are put right here.

    Args:
        batch_size: Clips of a micro-batch, on every rank.
        num_workers: Processes that decode, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out an epoch's last clips where they do not fill a batch on every rank, rather than fill it up with
            slots that count for nothing.
    """

    def __init__(
        self, batch_size: int = 1, num_workers: int = 2, seed: int = 0, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UsageError(
                f"batch_size is {batch_size} and num_workers is {num_workers}", "at least 1 and at least 0"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self._sampler: Optional[ResumableSampler] = None
        self._sampler_of: Optional[pl.Trainer] = None
        self._loaded: Optional[dict[str, Any]] = None
        self._made_of: dict[str, Any] = {}

    @abstractmethod
    def train_dataset(self) -> Dataset[Any]:
        """The training clips; has a length."""

    def sample_weights(self) -> Optional[Sequence[float]]:
        """One for each training clip where an epoch is drawn with replacement; ``None`` where every clip comes once."""
        return None

    def sample_names(self, dataset: Dataset[Any]) -> Optional[Iterable[str]]:
        """What the samples are, in the order of their numbers; ``None`` where they have no names."""
        return getattr(dataset, "ids", None)

    def make_sampler(self, dataset: Dataset[Any], **ranks: int) -> ResumableSampler:
        """Which of them come when; a subclass may have its own order."""
        return ResumableSampler(
            len(dataset),  # type: ignore[arg-type]
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            drop_last=self.drop_last,
            weights=self.sample_weights(),
            **ranks,
        )

    # Not a method, or every worker that is not forked would be sent the datamodule and its trainer.
    collate: Callable[[Sequence[Any]], Any] = staticmethod(collate)
    """Single clips to one batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        """The training clips, from where the run is."""
        dataset = self.train_dataset()
        trainer = self.trainer
        sampler = self.make_sampler(dataset, **self._ranks())
        if self._sampler is not None and self._sampler_of is trainer:
            # Lightning asks again within a run (reload_dataloaders_every_n_epochs, a second fit).
            sampler.enter(*self._sampler.following)
        self._sampler, self._sampler_of = sampler, trainer
        names = self.sample_names(dataset)
        self._made_of = {"samples": len(dataset), "digest": digest(names) if names is not None else None}  # type: ignore[arg-type]
        if self._loaded is not None:
            self._enter()
        sampler.on_epoch = self._on_epoch
        if 2 * sampler.fills > sampler.total_size:
            rank_zero_warn(
                f"of the {sampler.total_size} slots of an epoch {sampler.fills} have no sample and train nothing: batch_size "
                f"times ranks is {sampler.global_batch}. Lower it, or let samples stand several times in an epoch (repeats)"
            )
        return LateLoader(
            FilledSet(dataset, expected=sampler.fills > 0),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            worker_init_fn=outlive_notice,
            persistent_workers=self.num_workers > 0,
        )

    def _ranks(self) -> dict[str, int]:
        """Number of ranks that share the samples, and this one's."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(kwargs or {"num_replicas": 1, "rank": 0})

    # -- the rest --------------------------------------------------------------------------------------------------

    def evaluation_loader(
        self,
        dataset: Dataset[Any],
        groups: Optional[Sequence[Sequence[int]]] = None,
        num_workers: int = 0,
        together: bool = False,
    ) -> DataLoader[Any]:
        """Samples in their order, each once, for validation, test and predict; batches of every rank are equally many.

        Args:
            dataset: Batches of one; has a length.
            groups: Samples that may share a batch; all of them where not given.
            num_workers: Processes that read, on every rank.
            together: Give every rank all of them.
        """
        ranks = {"num_replicas": 1, "rank": 0} if together else self._ranks()
        whole = [range(len(dataset))]  # type: ignore[arg-type]
        sampler = EvaluationSampler(groups if groups is not None else whole, self.batch_size, **ranks)
        return DataLoader(
            FilledSet(dataset),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=self.collate,
            worker_init_fn=outlive_notice,
        )

    def in_order(
        self, part: Literal["train", "validation"], without: Container[str] = (), together: bool = False
    ) -> Collection[Any]:
        """Batches of the clips, each once and in order, for what is done to every clip.

        Args:
            part: Which clips.
            without: Ids that may be left out.
            together: Give every rank all of them, rather than each its share.
        """
        if part == "train":
            return self.evaluation_loader(self.train_dataset(), None, self.num_workers, together)  # type: ignore[return-value]
        loader: Any = self.val_dataloader()
        if not loader:
            return []
        # Its own sampler may deal every rank all clips, and leave it to Lightning to change that.
        data = loader.dataset.data if isinstance(loader.dataset, FilledSet) else loader.dataset
        return self.evaluation_loader(data, None, loader.num_workers, together)  # type: ignore[return-value]

    # -- the place -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: the epoch, how many of its samples were trained on, and whether that was all."""
        sampler, trainer = self._sampler, self.trainer
        if sampler is None or trainer is None:
            return {}
        if not sampler.begun:
            epoch, offset = sampler.following
            return {"epoch": epoch, "samples_seen": offset, "epoch_done": False, **self._made_of}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        steps = progress.current.processed - sampler.steps_before(sampler.offset)
        return {
            "epoch": sampler.epoch,
            "samples_seen": sampler.offset + steps * sampler.global_batch,
            "epoch_done": bool(progress.is_last_batch and progress.current.processed == progress.current.ready),
            **self._made_of,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where the run was, if it is to be gone on with."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = dict(state_dict)
        if self._sampler is not None and self._sampler_of is self.trainer:
            self._enter()

    def _enter(self) -> None:
        assert self._sampler is not None
        assert self._loaded is not None
        done = self._loaded["epoch_done"]
        if self._loaded["samples_seen"] and not done:
            self._compare(self._loaded)
        place = (self._loaded["epoch"] + 1, 0) if done else (self._loaded["epoch"], self._loaded["samples_seen"])
        self._sampler.enter(*place)

    def _compare(self, loaded: dict[str, Any]) -> None:
        """Warn where the place was counted in other samples; checkpoints of older versions do not say in which."""
        # Taken out, since the place may be entered twice and is warned of once.
        before = {name: loaded.pop(name) for name in self._made_of if loaded.get(name) is not None}
        if any(self._made_of[name] not in (None, value) for name, value in before.items()):
            rank_zero_warn(
                f"this run stopped inside an epoch of {before['samples']} samples and goes on with {self._made_of['samples']}"
                " that are not the same, or not in the same order: in what is left of this epoch some may come again and others"
                " be missed; the next epoch has all of them"
            )

    def _on_epoch(self) -> None:
        """Bring Lightning's count of batches in line with the place; once, after a resume, before its first epoch."""
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        assert self.trainer is not None
        assert self._sampler is not None
        loop = self.trainer.fit_loop.epoch_loop
        if not loop.restarting:
            # With max_epochs, Lightning counts an epoch it was stopped in as done and begins the next.
            self._sampler.enter(loaded["epoch"] + (loaded["epoch_done"] or loaded["samples_seen"] > 0))
            return
        steps = (
            self.trainer.num_training_batches
            if loaded["epoch_done"]
            else self._sampler.steps_before(loaded["samples_seen"])
        )
        current: Any = loop.batch_progress.current
        # A checkpoint written at the end of a batch counts it as processed, not yet as completed.
        pending = current.processed - current.completed
        current.ready = current.started = current.processed = int(steps)
        current.completed = int(steps) - pending


def digest(names: Iterable[str]) -> str:
    """A short text that is another one where any name or their order is."""
    state = hashlib.sha256()
    for name in names:
        state.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return state.hexdigest()[:32]
