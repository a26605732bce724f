"""What clips show against what was asked for, and how much of a reference's look shows where another was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Optional

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from muybridge.errors import UsageError
from muybridge.metrics.base import PerClip
from muybridge.proving_ground.appearance import COLOURS, SHAPES
from muybridge.proving_ground.captions import look_of, motion_of
from muybridge.proving_ground.reader import READS, Reader, Reading
from muybridge.video import to_frames

What = Literal["motion", "shape", "colour"]
KNOWN: dict[str, tuple[str, ...]] = {"motion": READS, "shape": SHAPES, "colour": tuple(COLOURS)}


def asked(caption: str) -> dict[str, str]:
    """Motion, shape and colour that a caption asks for."""
    shape, colour = look_of(caption)
    return {"motion": motion_of(caption), "shape": shape, "colour": colour}


def read_pixels(pixels: Tensor, reader: Optional[Reader] = None) -> list[Reading]:
    """Read clips (B, 3, F, H, W) in [-1, 1] by the shipped reader, or by another."""
    return (reader or Reader.shipped()).read([to_frames(clip) for clip in pixels])


class ReaderAccuracy(PerClip):
    """Share of clips that are read as showing what their captions ask for.

    ``confusion`` counts what was asked for (rows, in the order of ``KNOWN[what]``) and what was read; its last column is of
    clips in which nothing is to be seen.

    Args:
        what: ``motion``, ``shape`` or ``colour``.
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    confusion: Tensor

    def __init__(self, what: What = "motion", **options: Any) -> None:
        super().__init__(**options)
        if what not in KNOWN:
            raise UsageError(f"no reading of {what!r}", f"one of {', '.join(KNOWN)}")
        self.what, self.names = what, KNOWN[what]
        count = len(self.names)
        self.add_state("confusion", torch.zeros(count, count + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pixels: Tensor, captions: Sequence[str]) -> None:
        """Take some clips, (B, 3, F, H, W) in [-1, 1], and what each was asked to show."""
        _one_each(pixels, captions=captions)
        hits = []
        for read, caption in zip(read_pixels(pixels), captions, strict=True):
            want, found = asked(caption)[self.what], getattr(read, self.what)
            hits.append(float(want == found))
            column = len(self.names) if found is None else self.names.index(found)
            self.confusion[self.names.index(want), column] += 1
        self.keep(torch.tensor(hits))


class Leak(NamedTuple):
    """Whether a clip shows the reference's look.

    Args:
        shown: 1 where it does.
        excess: ``shown`` less the rate of each other wrong look: 0 on average where faults have nothing to do with the reference.
    """

    shown: float
    excess: float


def leak(what: str, caption: str, reference: str, read: Optional[str]) -> Optional[Leak]:
    """Leakage of one clip; None where the caption asks for what the reference has, so that none can be told.

    A clip whose look is wrong in any of ``K - 2`` other ways takes ``1 / (K - 2)`` from the excess: a reader or a model that only
    guesses shows the reference's look in ``1 / K`` of the clips, and any one other as often.

    Args:
        what: ``shape`` or ``colour``.
        caption: What was asked for.
        reference: Caption of the clip that the model was customized by.
        read: What the clip shows; None where nothing is to be seen.
    """
    want, had, names = asked(caption)[what], asked(reference)[what], KNOWN[what]
    if want == had:
        return None
    if read == had:
        return Leak(1.0, 1.0)
    return Leak(0.0, 0.0 if read in (want, None) else -1.0 / (len(names) - 2))


class Leakage(PerClip):
    """P(the reference's shape or colour is shown | another was asked for), 0 to 1; lower is better.

    Clips that were asked to show what the reference has are not counted. :attr:`excess` is how much of it is above what comes
    about by chance.

    Args:
        what: ``shape`` or ``colour``.
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    beyond: list[Tensor]

    def __init__(self, what: Literal["shape", "colour"] = "shape", **options: Any) -> None:
        super().__init__(**options)
        if what not in ("shape", "colour"):
            raise UsageError(f"no leakage of {what!r}", "shape or colour")
        self.what = what
        self.add_state("beyond", default=[], dist_reduce_fx="cat")

    def update(self, pixels: Tensor, captions: Sequence[str], references: Sequence[str]) -> None:
        """Take some clips, what each was asked to show, and the caption of the clip that each model was customized by."""
        _one_each(pixels, captions=captions, references=references)
        found = []
        for read, caption, reference in zip(read_pixels(pixels), captions, references, strict=True):
            one = leak(self.what, caption, reference, getattr(read, self.what))
            found += [one] if one is not None else []
        self.keep(torch.tensor([one.shown for one in found]))
        self.beyond.append(torch.tensor([one.excess for one in found], device=self.device))

    @property
    def excess(self) -> Tensor:
        """Leakage less the mean rate of each look that was neither asked for nor the reference's."""
        return dim_zero_cat(self.beyond).mean() if len(self.beyond) else torch.tensor(float("nan"))


def _one_each(pixels: Tensor, **lists: Sequence[str]) -> None:
    for name, given in lists.items():
        if isinstance(given, str) or len(given) != len(pixels):
            raise UsageError(f"{len(pixels)} clips and {name} {given!r}", "a list with one for each clip")
