"""Clips of several shapes and lengths, each batch of one: which clip goes where, how many are left out, and in what order.

A clip goes to the bucket that loses least of its picture (cropping loses what sticks out, shrinking loses detail, enlarging
makes up what is not there), and of several that are as good to the longest that it fills.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import torch

from muybridge.data.account import kind
from muybridge.data.decoding import Size
from muybridge.data.framing import Framing, Region, place
from muybridge.data.selection import weighted_order
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError

Leftover = Literal["pad", "drop"]


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape of clips.

    Args:
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise UsageError(f"clips of {self}", "1 or more of each")

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @staticmethod
    def parse(text: str) -> Bucket:
        """The inverse of ``str``."""
        return Bucket(*(int(side) for side in text.split("x")))


def kept(size: Size, source: Size, framing: Framing = "crop", region: Optional[Region] = None) -> float:
    """How much of a picture is left: the share of it that is seen, times how far its sides are shrunk or enlarged.

    Args:
        size: Height and width of the clip.
        source: Height and width of the video.
        framing: How the one is brought to the other.
        region: The part of the picture that may be used.
    """
    placement = place(source, size, framing, region)
    left, right, top, bottom = region or (0, source[1], 0, source[0])
    area = placement.scaled[0] / source[0] * placement.scaled[1] / source[1]
    seen = placement.kept / (area * (right - left) * (bottom - top))
    return min(seen, 1.0) * min(math.sqrt(area), 1 / math.sqrt(area))


def assign(
    buckets: Sequence[Bucket], frames: int, source: Size, framing: Framing = "crop", region: Optional[Region] = None
) -> Optional[int]:
    """The bucket of a video; ``None`` where all are too long for it.

    Args:
        buckets: Those there are.
        frames: How many frames the video has at the clip's rate.
        source: Its size.
        framing: How it is brought to the bucket's size.
        region: The part of the picture that may be used.
    """
    fitting = [number for number, bucket in enumerate(buckets) if bucket.frames <= frames]
    if not fitting:
        return None
    # Rounding of sizes to whole pixels must not decide.
    return max(fitting, key=lambda n: (round(kept(buckets[n].size, source, framing, region), 3), buckets[n].frames))


class BucketBatches:
    """The order of an epoch in which every global batch is of one bucket.

    Args:
        bucket_of: The bucket of every sample; ``None`` for those that are left out.
        global_batch: Samples of a step, on all ranks together.
        leftover: Where a bucket does not fill its last batch: ``pad`` fills it up with repeats that count for nothing, given as
            ``~sample``; ``drop`` leaves those samples out of this epoch.
        seed: The order is a function of it and the epoch.
        shuffle: Draw a new order every epoch; samples and batches stay as they are listed where not.
        weights: One for each sample: every bucket's share of an epoch is then its share of the weight, drawn with replacement.
    """

    def __init__(
        self,
        bucket_of: Sequence[Optional[int]],
        global_batch: int,
        leftover: Leftover = "pad",
        seed: int = 0,
        shuffle: bool = True,
        weights: Optional[Sequence[float]] = None,
    ) -> None:
        self.global_batch, self.leftover, self.seed, self.shuffle = global_batch, leftover, seed, shuffle
        self.members: dict[int, list[int]] = {}
        for sample, bucket in enumerate(bucket_of):
            if bucket is not None:
                self.members.setdefault(bucket, []).append(sample)
        self.weights: dict[int, list[float]] = {}
        self.counts = {bucket: len(samples) for bucket, samples in self.members.items()}
        if weights is not None:
            self.weights = {b: [float(weights[s]) for s in samples] for b, samples in self.members.items()}
            total, held = sum(map(sum, self.weights.values())), sum(self.counts.values())
            self.counts = {b: round(held * sum(w) / total) if total else 0 for b, w in self.weights.items()}
        if not len(self):
            raise UsageError(
                f"no bucket holds the {global_batch} clips of a step",
                "at least one bucket that fills a batch on every rank, where leftovers are dropped",
                "set drop_last to false, use a smaller batch_size, or fewer buckets",
            )

    def batches(self, bucket: int) -> int:
        """Global batches of a bucket in every epoch."""
        count = self.counts.get(bucket, 0) / self.global_batch
        return math.floor(count) if self.leftover == "drop" else math.ceil(count)

    @property
    def fills(self) -> int:
        """Slots of every epoch that no sample fills. Drawn with replacement, there are samples for all."""
        if self.leftover == "drop" or self.weights:
            return 0
        return len(self) - sum(self.counts.values())

    def __len__(self) -> int:
        """Slots in the order of every epoch."""
        return self.global_batch * sum(self.batches(bucket) for bucket in self.members)

    def order(self, epoch: int) -> list[int]:
        """All samples of an epoch, and what fills up; each stretch of ``global_batch`` is of one bucket."""
        parts: list[list[int]] = []
        for bucket in sorted(self.members):
            samples = self.members[bucket]
            if bucket in self.weights and self.batches(bucket):
                count = self.batches(bucket) * self.global_batch
                drawn = weighted_order(self.weights[bucket], count, self.seed, epoch)
                samples = [samples[i] for i in drawn]
            elif self.shuffle:
                generator = keyed_generator(self.seed, "bucket", epoch, bucket)
                samples = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
            for batch in range(self.batches(bucket)):
                begin = batch * self.global_batch
                places = range(begin, begin + self.global_batch)
                parts.append([samples[i] if i < len(samples) else ~samples[i % len(samples)] for i in places])
        if self.shuffle:
            generator = keyed_generator(self.seed, "batches", epoch)
            parts = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
        return [sample for part in parts for sample in part]


# -- the account ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is said of one bucket.

    Args:
        bucket: Its shape.
        clips: How many clips it holds.
        batches: Its global batches in an epoch.
        empty: Slots of its last batch that no clip fills.
        dropped: Clips that an epoch leaves out, each epoch others.
        enlarged: Clips whose pictures are smaller than the bucket.
    """

    bucket: Bucket
    clips: int
    batches: int
    empty: int
    dropped: int
    enlarged: int


def rows(
    buckets: Sequence[Bucket], bucket_of: Sequence[Optional[int]], batches: BucketBatches, enlarged: Sequence[bool]
) -> list[Row]:
    """The account of buckets, empty ones too."""
    found = []
    for number, bucket in enumerate(buckets):
        clips = len(batches.members.get(number, ()))
        steps = batches.batches(number)
        # Drawn with replacement, clips repeat and stay out by chance, not to fill batches.
        spare = 0 if batches.weights else steps * batches.global_batch - clips
        larger = sum(b == number and e for b, e in zip(bucket_of, enlarged, strict=True))
        found.append(Row(bucket, clips, steps, max(spare, 0), max(-spare, 0), larger))
    return found


def show(table: Sequence[Row], left_out: Sequence[str]) -> str:
    """The account as text.

    Args:
        table: The buckets.
        left_out: Reason for every clip that is in none.
    """
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    out = Table(title="clips by bucket (frames x height x width)", title_justify="left")
    out.add_column("bucket")
    for name in ("clips", "batches an epoch", "empty slots", "left over", "enlarged"):
        out.add_column(name, justify="right")
    for row in table:
        out.add_row(str(row.bucket), *(str(n) for n in (row.clips, row.batches, row.empty, row.dropped, row.enlarged)))
    text = StringIO()
    Console(file=text, width=100).print(out)
    reasons = Counter(kind(reason) for reason in left_out)
    for reason, count in reasons.most_common():
        text.write(f"left out: {count}, {reason}\n")
    if not left_out:
        text.write("left out: none\n")
    return text.getvalue()
