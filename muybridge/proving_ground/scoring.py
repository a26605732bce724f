"""The judge's table: everything that is known of how well clips show what they were asked to, one function for all reports.

A line of the table is a clip; the summary has each figure's mean and its 95 % interval:

    motion        the reader reads the motion that was asked for
    law           the law of that motion fits best of all
    law_score     how well it fits, 0 to 1
    shape, colour the reader reads the ones that were asked for
    all           motion, shape and colour
    static        nothing moves, where a motion was asked for
    absent        nothing coloured is to be seen throughout
    amount        of motion (see ``MotionAmount``)
    smoothness    of motion (see ``MotionSmoothness``)
    leak_shape, leak_colour       the reference's is shown where another was asked for
    excess_shape, excess_colour   how much of that is above chance (see ``Leakage``)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np
import torch

from muybridge.errors import UsageError
from muybridge.metrics.base import Estimate, mean, share
from muybridge.metrics.flow import dis_flow, motion_amount, motion_smoothness
from muybridge.metrics.reading import asked, leak
from muybridge.proving_ground.laws import LAWS, judge
from muybridge.proving_ground.motions import STATIC
from muybridge.proving_ground.reader import Reader
from muybridge.proving_ground.render import render
from muybridge.proving_ground.scene import World, draw_scene
from muybridge.video import Frames, to_pixels

SHARES = ("motion", "law", "shape", "colour", "all", "static", "absent", "leak_shape", "leak_colour")
MEANS = ("law_score", "amount", "smoothness", "excess_shape", "excess_colour")


@dataclass(frozen=True)
class Row:
    """One clip. What could not be told is None, and counts in no mean.

    Args:
        caption: What was asked for.
        asked_motion: The same, apart.
        asked_shape: Likewise.
        asked_colour: Likewise.
        read_motion: What the reader reads.
        read_shape: None where nothing is to be seen.
        read_colour: Likewise.
        read_law: The law that fits best; None where none does.
        certainty: The reader's, of the motion.
        law_score: Of the law that was asked for.
        amount: Of motion.
        smoothness: Of motion.
        reference: Caption of the clip that the model was customized by.
        leak_shape: Whether its shape is shown though another was asked for.
        leak_colour: Likewise its colour.
        excess_shape: The same above chance.
        excess_colour: Likewise.
    """

    caption: str
    asked_motion: str
    asked_shape: str
    asked_colour: str
    read_motion: str
    read_shape: Optional[str]
    read_colour: Optional[str]
    read_law: Optional[str]
    certainty: float
    law_score: float
    amount: float
    smoothness: float
    reference: Optional[str] = None
    leak_shape: Optional[float] = None
    leak_colour: Optional[float] = None
    excess_shape: Optional[float] = None
    excess_colour: Optional[float] = None

    @property
    def motion(self) -> bool:
        """Whether the motion is read right."""
        return self.read_motion == self.asked_motion

    @property
    def law(self) -> bool:
        """Whether the law that was asked for fits best."""
        return self.read_law == self.asked_motion

    @property
    def shape(self) -> bool:
        """Whether the shape is read right."""
        return self.read_shape == self.asked_shape

    @property
    def colour(self) -> bool:
        """Whether the colour is read right."""
        return self.read_colour == self.asked_colour

    @property
    def all(self) -> bool:
        """Whether motion, shape and colour are."""
        return self.motion and self.shape and self.colour

    @property
    def static(self) -> Optional[bool]:
        """Whether nothing moves; None where nothing should."""
        return None if self.asked_motion == STATIC else self.read_motion == STATIC

    @property
    def absent(self) -> bool:
        """Whether nothing coloured is to be seen throughout."""
        return self.read_shape is None


@dataclass(frozen=True)
class Scores:
    """The table of some clips.

    Args:
        rows: One a clip.
        features: What the motions were read from, (N, 64).
    """

    rows: tuple[Row, ...]
    features: np.ndarray

    @property
    def summary(self) -> dict[str, Estimate]:
        """Mean and interval of every figure that some clip has: Wilson's of shares, the bootstrap's of other means."""
        found = {}
        for name in (*SHARES, *MEANS):
            values = [float(value) for row in self.rows if (value := getattr(row, name)) is not None]
            if values:
                found[name] = share(round(sum(values)), len(values)) if name in SHARES else mean(torch.tensor(values))
        return found

    def by_motion(self, figure: str = "motion") -> dict[str, Estimate]:
        """Share of the clips that were asked to show each motion."""
        if figure not in SHARES:
            raise UsageError(f"no share {figure!r}", f"one of {', '.join(SHARES)}")
        found = {}
        for name in sorted({row.asked_motion for row in self.rows}):
            some = [v for row in self.rows if row.asked_motion == name and (v := getattr(row, figure)) is not None]
            if some:
                found[name] = share(round(sum(some)), len(some))
        return found

    def distance(self, other: Scores) -> float:
        """:func:`frechet` between what the motions of these clips and of others were read from.

        It is positive between two drawings of one world too, the more so the fewer clips: read it beside that.
        """
        return frechet(self.features, other.features)

    def table(self) -> list[dict[str, Any]]:
        """The rows, for a file."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        lines = (
            f"{name:14} {e.value:6.3f}  [{e.low:.3f}, {e.high:.3f}]  {e.clips}" for name, e in self.summary.items()
        )
        return "\n".join(lines)


def read_clips(
    clips: Iterable[Frames],
    captions: Sequence[str],
    references: Optional[Sequence[str]] = None,
    reader: Optional[Reader] = None,
    tell: Callable[[], None] = lambda: None,
) -> Scores:
    """Read clips and score them against their captions; 20 to 40 clips a second.

    Args:
        clips: Each (T, H, W, 3), uint8, of 5 frames or more.
        captions: What each was asked to show.
        references: Captions of the clips that the model was customized by, one for each clip, where leakage is to be told.
        reader: Another reader than the one that ships.
        tell: Called after each clip.
    """
    reader = reader or Reader.shipped()
    rows, features = [], []
    waiting = list(captions) if not isinstance(captions, str) else []
    before = list(references) if references is not None else [None] * len(waiting)
    clips = list(clips)
    if not clips or len(waiting) != len(clips) or len(before) != len(clips):
        raise UsageError(
            f"{len(clips)} clips, {len(waiting)} captions and {len(before)} references",
            "one or more, and one for each clip",
        )
    for frames, caption, reference in zip(clips, waiting, before, strict=True):
        want = asked(caption)
        read = reader.read([frames])[0]
        fits = {name: fit.score for name, fit in judge(frames).items()}
        best = max(LAWS, key=lambda name: fits[name])
        flow = dis_flow(to_pixels(frames)[None])
        leaks: dict[str, float] = {}
        for what in ("shape", "colour") if reference is not None else ():
            one = leak(what, caption, str(reference), getattr(read, what))
            leaks |= {} if one is None else {f"leak_{what}": one.shown, f"excess_{what}": one.excess}
        rows.append(
            Row(
                caption=caption,
                asked_motion=want["motion"],
                asked_shape=want["shape"],
                asked_colour=want["colour"],
                read_motion=read.motion,
                read_shape=read.shape,
                read_colour=read.colour,
                read_law=best if fits[best] > 0.0 else None,
                certainty=read.certainty,
                law_score=fits[want["motion"]],
                amount=float(motion_amount(flow)),
                smoothness=float(motion_smoothness(flow)),
                reference=reference,
                **leaks,
            )
        )
        features.append(read.features)
        tell()
    return Scores(tuple(rows), np.stack(features))


def real_scores(
    world: World, count: int, seed: int = 1, held_out: bool = True, tell: Callable[[], None] = lambda: None
) -> Scores:
    """The table of clips as drawn: what no model's can be expected to exceed.

    Args:
        world: What clips there are.
        count: How many.
        seed: Of the clips.
        held_out: Whether their looks are the ones that are kept for validation.
        tell: Called after each clip.
    """
    scenes = [draw_scene(world, seed, index, held_out) for index in range(count)]
    return read_clips([render(scene) for scene in scenes], [scene.caption for scene in scenes], tell=tell)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """``|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)`` of features (N, D) and (M, D): Fréchet's distance of two normal laws.

    The trace of the root is the sum of the singular values of ``A Bᵀ``, where ``AᵀA`` and ``BᵀB`` are the covariances; A and B
    are triangular, so that none of this is larger than D x D.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UsageError(f"features of shape {a.shape} and {b.shape}", "(N, D) and (M, D), two or more of each")
    one, other = (_triangle(x) for x in (a, b))
    root = np.linalg.norm(one @ other.T, "nuc")
    apart = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    return max(0.0, apart + float((one**2).sum() + (other**2).sum() - 2.0 * root))


def _triangle(x: np.ndarray) -> np.ndarray:
    """R with ``RᵀR`` the covariance of features (N, D)."""
    return np.asarray(np.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r"))
