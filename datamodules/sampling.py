"""Which samples come when: a function of the seed and the epoch alone, that can be entered at any point.

The order of an epoch does not depend on the number of ranks, workers or samples per rank. Ranks take turns, so that the
global batch of a step is one stretch of that order however many ranks share it.
"""

from __future__ import annotations

import atexit
import math
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from muybridge.data.selection import weighted_order
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError


class ResumableSampler(DistributedSampler):
    """Indices of one rank; each iteration is the next epoch, and the first may begin inside one.

    Position ``p`` of an epoch goes to rank ``p mod ranks``, so ranks together read ``batch_size · ranks`` consecutive
    positions a step. An epoch is whole global batches: where the samples do not fill the last one, it is left out, or filled
    up with repeats that count for nothing, given as ``~index`` for :class:`~datamodules.filling.FilledSet`. (It is a
    ``DistributedSampler`` so that Lightning leaves it in its place.)

    Args:
        size: Number of samples.
        batch_size: Samples per rank and step.
        num_replicas: Number of ranks.
        rank: This one.
        shuffle: Draw a new order every epoch, rather than 0, 1, 2, ...
        seed: The order is a function of it and the epoch.
        drop_last: Leave the incomplete last global batch out (its samples come up in other epochs), rather than fill it up.
        weights: One for each sample: an epoch is then as many draws with replacement, rather than every sample once.
    """

    def __init__(
        self,
        size: int,
        batch_size: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        weights: Optional[Sequence[float]] = None,
    ) -> None:
        if size < 1 or batch_size < 1:
            raise UsageError(f"{size} samples in batches of {batch_size}", "at least 1 of both")
        self.size, self.batch_size = size, batch_size
        self.global_batch = batch_size * num_replicas
        if drop_last and size < self.global_batch:
            raise UsageError(
                f"{size} samples are less than one global batch of {batch_size} on each of {num_replicas} ranks",
                f"at least {self.global_batch} samples where the last batch is dropped",
                "set drop_last to false, or use fewer ranks or a smaller batch_size",
            )
        if weights is not None and (len(weights) != size or not shuffle):
            raise UsageError(
                f"{len(weights)} sampling weights for {size} samples"
                if shuffle
                else "sampling weights without shuffle",
                "a weight for each sample, and shuffle",
            )
        self.weights = weights
        super().__init__(
            range(size),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.num_samples = self.batches() * batch_size
        self.total_size = self.batches() * self.global_batch
        self.offset = 0
        self.following = (0, 0)
        self.begun = False
        self.on_epoch: Optional[Callable[[], None]] = None

    @property
    def fills(self) -> int:
        """Slots of a whole epoch, on all ranks together, that no sample fills."""
        return max(self.total_size - self.size, 0)

    def batches(self, offset: int = 0) -> int:
        """Steps from position ``offset`` of an epoch to its end."""
        left = max(self.size - offset, 0)
        return left // self.global_batch if self.drop_last else math.ceil(left / self.global_batch)

    def steps_before(self, offset: int) -> int:
        """How many steps of a whole epoch position ``offset`` stands for: those that are not left."""
        return self.batches() - self.batches(offset)

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch, in order."""
        if self.weights is not None:
            return weighted_order(self.weights, self.size, self.seed, epoch)
        if not self.shuffle:
            return list(range(self.size))
        return torch.randperm(self.size, generator=keyed_generator(self.seed, "order", epoch)).tolist()

    def enter(self, epoch: int, offset: int = 0) -> None:
        """Let the next iteration be this epoch, from this position on."""
        self.following = (epoch, offset)

    def set_epoch(self, epoch: int) -> None:
        """Lightning's notice that an epoch is about to run.

        Its number is not used: after some resumes Lightning runs an epoch of no batches and skips a number (a checkpoint
        written at an epoch's end, with max_steps), so epochs are counted by the iterations that really begin.
        """
        if self.on_epoch is not None:
            self.on_epoch()

    def __iter__(self) -> Iterator[int]:
        self.epoch, self.offset = self.following
        self.following = (self.epoch + 1, 0)
        self.begun = True
        order = self.order(self.epoch)
        end = self.offset + self.batches(self.offset) * self.global_batch
        places = range(self.offset + self.rank, end, self.num_replicas)
        return iter([order[p] if p < self.size else ~order[p % self.size] for p in places])

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, wherever this one begins: Lightning counts batches from it."""
        return self.num_samples


_RUNNING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Iterators over loaders that may have workers."""


@atexit.register
def _end_workers() -> None:
    """Tell workers that are left at the end of the process to leave.

    A run that is ended inside an epoch still holds its iterator. Python would send its workers one SIGTERM, which they live
    through (:func:`outlive_notice`), and wait for them for ever.
    """
    for iterator in list(_RUNNING):
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


class LateLoader(DataLoader):
    """A data loader that asks its sampler for the order when the first batch is wanted, and not before.

    Lightning makes the iterator at setup, which under FSDP2 can be before the checkpoint is read (a schedule that needs the
    run's length makes it so). Workers would by then have been sent the samples of the wrong place.
    """

    def __iter__(self) -> Any:
        # Seeds of workers come from the epoch, so that the loader takes nothing from the global generator.
        seed, epoch = getattr(self.sampler, "seed", 0), getattr(self.sampler, "following", (0, 0))[0]
        self.generator = keyed_generator(seed, "workers", epoch)
        iterator = super().__iter__()
        _RUNNING.add(iterator)
        yield from iterator

    # Lightning warns that results are unreliable when it resumes inside an epoch, unless the loader has these two. The
    # place is kept by the datamodule instead, because Lightning gives loaders theirs back only if they are made late enough.
    def state_dict(self) -> dict[str, Any]:
        """Nothing; :class:`datamodules.base.ResumableData` keeps the place."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; :class:`datamodules.base.ResumableData` keeps the place."""


def outlive_notice(worker: int) -> None:
    """``worker_init_fn`` of loaders: live through the signals that announce the end of a job.

    Schedulers may send them to every process of the job. A worker that dies of one takes the rank down before it has saved.
    SIGUSR1 is ignored, and so is the first SIGTERM; a second one, as from a loader that shuts down, ends the worker. So is
    Ctrl-C, which reaches the workers of a run that will train an update more and save.
    """

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
