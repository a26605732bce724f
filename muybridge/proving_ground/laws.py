"""Which law a clip obeys: each law's equation is fitted to what was tracked, and what is left over decides.

A law has a *residual*, in multiples of what the tracker gets wrong by itself, and an *amount*, in multiples of the least motion
that counts as it. Its score is ``exp(-residual² / 2) * min(amount, 1)``: 1 is a clip that does nothing but what the law says, 0
one that does something else, or does not do it. Residuals are

    place     root mean square distance from the fitted path, over 0.6 pixels + 0.004
    size      standard deviation of log area, over 0.10
    outline   standard deviation of the covariance's two log axes, over 0.16; its direction only where the law turns it
    angle     root mean square distance from the fitted angle, over 0.35 radians
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from muybridge.proving_ground.motions import MOTIONS, STATIC
from muybridge.proving_ground.tracking import Track, track
from muybridge.video import Frames

LAWS = (*MOTIONS, STATIC)


@dataclass(frozen=True)
class Fit:
    """One law's fit to one clip.

    Args:
        residual: What the law leaves over, in multiples of what a tracker gets wrong; 0 is perfect.
        amount: How much there is of what it says, in multiples of the least that counts.
        parameters: Those of the law that were fitted.
    """

    residual: float
    amount: float
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """``exp(-residual² / 2) * min(amount, 1)``, 0 to 1."""
        return math.exp(-0.5 * self.residual**2) * float(np.clip(self.amount, 0.0, 1.0))


ABSENT = Fit(math.inf, 0.0)
"""Of a clip in which nothing coloured is to be seen throughout."""


def fit_laws(seen: Track) -> dict[str, Fit]:
    """The fit of every law to a tracked clip of 5 frames or more."""
    if not seen.present:
        return dict.fromkeys(LAWS, ABSENT)
    return {name: law(_Motion(seen)) for name, law in _LAWS.items()}


def judge(frames: Frames) -> dict[str, Fit]:
    """The same, from the frames of a clip, (T, H, W, 3), uint8."""
    return fit_laws(track(frames))


class _Motion:
    """What the laws read: a track in convenient coordinates, and its misfits in multiples of the tracker's own."""

    def __init__(self, seen: Track) -> None:
        self.x, self.y, self.angle = seen.x, seen.y, seen.angle
        self.t = np.arange(len(seen.x), dtype=np.float64)
        self.u = self.t / self.t[-1]
        self.one = np.ones_like(self.t)
        self.pixel = seen.pixel
        self.tolerance = 0.6 * seen.pixel + 0.004
        self.area = np.log(np.maximum(seen.area, 1e-5))
        values, vectors = np.linalg.eigh(seen.moments)
        self.minor, self.major = 0.5 * np.log(np.maximum(values, 1e-8)).T
        self.radius = float(np.sqrt(np.median(values.sum(-1))))
        self.spread = 0.5 * np.log(np.maximum(values.sum(-1), 1e-8))
        # Seen along the axes that its outline has where it is longest against its breadth.
        clear = vectors[int(np.argmax(self.major - self.minor)), :, 1]
        across = np.array([-clear[1], clear[0]])
        self.along = 0.5 * np.log(np.maximum(np.einsum("tij,i,j->t", seen.moments, clear, clear), 1e-8))
        self.across = 0.5 * np.log(np.maximum(np.einsum("tij,i,j->t", seen.moments, across, across), 1e-8))

    def left(self, values: np.ndarray, *basis: np.ndarray) -> tuple[float, np.ndarray]:
        """Root mean square of what a linear fit leaves, and its coefficients."""
        columns = np.stack(basis, -1)
        found, *_ = np.linalg.lstsq(columns, values, rcond=None)
        return float(np.sqrt(np.mean((values - columns @ found) ** 2))), found

    def path(self, x: float, y: float) -> float:
        """Residual of place, from what the fits of the two coordinates leave."""
        return math.hypot(x, y) / self.tolerance

    def still(self) -> float:
        return self.path(float(np.std(self.x)), float(np.std(self.y)))

    def size(self) -> float:
        """Residual of a sprite that keeps its area and its outline, but for a turn."""
        outline = math.hypot(float(np.std(self.major)), float(np.std(self.minor)))
        return math.hypot(float(np.std(self.area)) / 0.10, outline / 0.16)

    def turns(self, *basis: np.ndarray) -> float:
        """Residual of the angle about a linear fit; none basis but the constant is no turn."""
        return self.left(self.angle, *(basis or (self.one,)))[0] / 0.35


def _together(*residuals: float) -> float:
    return math.sqrt(sum(r**2 for r in residuals))


def _static(m: _Motion) -> Fit:
    return Fit(_together(1.5 * m.still(), m.size() * 2.0, m.turns()), 1.0)


def _spin(m: _Motion) -> Fit:
    left, (_, omega) = m.left(m.angle, m.one, m.t)
    return Fit(_together(m.still(), m.size(), left / 0.35), abs(omega) * m.t[-1] / 2.0, {"omega": float(omega)})


def _line(m: _Motion) -> tuple[float, float]:
    """Residual and way of something that goes sideways, its speed changing evenly."""
    y, _ = m.left(m.y, m.one)
    x, _ = m.left(m.x, m.one, m.u, m.u**2)
    back = np.minimum(np.diff(m.x) * np.sign(m.x[-1] - m.x[0]), 0.0)
    return math.hypot(m.path(x, y), float(-back.sum()) / m.tolerance), float(abs(m.x[-1] - m.x[0]))


def _slide(m: _Motion) -> Fit:
    residual, way = _line(m)
    return Fit(_together(residual, m.size(), m.turns()), way / 0.12, {"direction": float(np.sign(m.x[-1] - m.x[0]))})


def _roll(m: _Motion) -> Fit:
    residual, way = _line(m)
    left, (_, rate) = m.left(m.angle, m.one, m.x)
    # Turning by one radian for every radius it goes; the covariance knows the radius to a factor of about two.
    return Fit(
        _together(residual, m.size(), left / 0.35),
        min(way / 0.12, rate * m.radius / 0.25),
        {"direction": float(np.sign(m.x[-1] - m.x[0]))},
    )


def _free_fall(m: _Motion) -> Fit:
    """``y = y0 + v t + g t² / 2`` until, at the latest at the end, it lands and stays."""
    x, _ = m.left(m.x, m.one, m.t)
    best = Fit(math.inf, 0.0)
    for landing in np.arange(0.7, 1.001, 0.02) * m.t[-1]:
        fall = np.minimum(m.t, landing)
        y, (_, _, half) = m.left(m.y, m.one, fall, 0.5 * fall**2)
        if landing < m.t[-1] and half * landing < 0.0:
            continue
        residual = _together(m.path(x, y), m.size(), m.turns())
        if residual < best.residual:
            # What gravity alone bends the path by.
            bend = half * landing**2 / 8.0
            best = Fit(residual, min(bend / 0.03, float(np.ptp(m.y)) / 0.12), {"g": float(half)})
    return best


def _bounce(m: _Motion) -> Fit:
    """Constant gravity between contacts with one floor, at every contact the speed times a constant, reversed."""
    x, _ = m.left(m.x, m.one, m.t)
    height = float(np.ptp(m.y))
    shapes, rises, keeps = _all_hops(len(m.t))
    # A straight line through each shape, all at once: what it leaves, and how steep it is.
    about, y = shapes - shapes.mean(1, keepdims=True), m.y - m.y.mean()
    spread = np.mean(about**2, 1)
    sizes = about @ y / len(y) / spread
    left = np.where(sizes > 0.0, np.sqrt(np.maximum(np.mean(y**2) - sizes**2 * spread, 0.0)), math.inf)
    which = int(left.argmin())
    best, found = float(left[which]), (0.0, 1.0)
    if math.isfinite(best):
        found = (float(2.0 * sizes[which] / rises[which] ** 2), float(keeps[which]))
    flips = np.diff(m.y)
    contact = float(np.max(np.minimum(flips[:-1], -flips[1:]), initial=0.0))
    amount = min(contact / (0.8 * m.pixel), height / 0.1)
    return Fit(_together(m.path(x, best), m.size(), m.turns()), amount, {"g": found[0], "restitution": found[1]})


@functools.lru_cache(maxsize=64)
def _all_hops(frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every bounce that is tried on clips of so many frames, (N, frames), with its time of rise and the speed it keeps."""
    t, found, known = np.arange(frames, dtype=np.float64), [], []
    for rise in np.arange(3.4, 10.01, 0.15) * (t[-1] / 16.0):
        for keep in (1.0, 0.92, 0.84, 0.76, 0.68):
            # What keeps its speed may begin anywhere between two tops.
            for phase in np.arange(20) / 20.0 if keep == 1.0 else (0.0,):
                found.append(_hops(t + 2.0 * rise * phase, rise, keep))
                known.append((rise, keep))
    rises, keeps = np.array(known).T
    return np.stack(found), rises, keeps


def _hops(t: np.ndarray, rise: float, keep: float) -> np.ndarray:
    """0 at the top from which it is dropped at time 0, 1 at the floor."""
    y, contact, speed = (t / rise) ** 2, rise, 2.0 / rise
    for _ in range(64):
        if contact >= t[-1]:
            break
        speed *= keep
        tau = t - contact
        y = np.where(tau >= 0.0, 1.0 - speed * tau + (tau / rise) ** 2, y)
        contact += speed * rise**2
    return y


def _wave(m: _Motion, values: np.ndarray, shortest: float, longest: float) -> tuple[float, float, float]:
    """What the best sinusoid leaves, its amplitude and its period in frames."""
    scale = m.t[-1] / 16.0
    best = (math.inf, 0.0, 1.0)
    for period in np.arange(shortest, longest + 0.01, 0.5) * scale:
        phase = 2.0 * math.pi * m.t / period
        left, (_, c, s) = m.left(values, m.one, np.cos(phase), np.sin(phase))
        if left < best[0]:
            best = (left, math.hypot(c, s), float(period))
    return best


def _float(m: _Motion) -> Fit:
    x, _ = m.left(m.x, m.one, m.t)
    y, amplitude, period = _wave(m, m.y, 7.0, 22.0)
    too_far = max(amplitude - 0.10, 0.0) / 0.02
    rocks = max(float(np.ptp(m.angle)) - 0.9, 0.0) / 0.3
    return Fit(
        _together(m.path(x, y), m.size(), too_far, rocks),
        amplitude / 0.025,
        {"amplitude": amplitude, "period": period},
    )


def _swing(m: _Motion) -> Fit:
    """``φ = a cos(2π t / P + ψ)`` on a circle whose centre is above."""
    sums, _, _, _ = np.linalg.lstsq(np.stack([2.0 * m.x, 2.0 * m.y, m.one], -1), m.x**2 + m.y**2, rcond=None)
    length = math.sqrt(max(sums[2] + sums[0] ** 2 + sums[1] ** 2, 1e-9))
    phi = np.arctan2(m.x - sums[0], m.y - sums[1])
    off = float(np.std(np.hypot(m.x - sums[0], m.y - sums[1])))
    left, amplitude, period = _wave(m, phi, 9.0, 37.0)
    above = float(sums[1] < m.y.min())
    sagitta = length * (1.0 - math.cos(0.5 * float(np.ptp(phi))))
    amount = above * min(float(np.ptp(m.x)) / 0.10, sagitta / (1.0 * m.pixel), length / 0.12)
    found = {"length": length, "amplitude": amplitude, "period": period}
    return Fit(_together(m.path(off, left * length), m.size(), max(length - 0.65, 0.0) / 0.1), amount, found)


def _proportion(m: _Motion, sign: float) -> Fit:
    """One side changes steadily, the area with it, the other side next to not."""
    area, (_, grown) = m.left(m.area, m.one, m.u)
    along, across = sign * (m.along[-1] - m.along[0]), sign * (m.across[-1] - m.across[0])
    long, other = (m.along, m.across) if along > across else (m.across, m.along)
    change = max(along, across)
    steady = np.minimum(sign * np.diff(long), 0.0)
    left, _ = m.left(long, m.one, m.u, m.u**2)
    moved = float(np.std(m.x))
    # Standing on a floor, the centre goes with the height.
    sinks = m.left(m.y, m.one, np.exp(other if along <= across else long))[0]
    sinks = min(sinks, m.left(m.y, m.one, np.exp(m.along))[0], m.left(m.y, m.one, np.exp(m.across))[0])
    residual = _together(
        m.path(moved, sinks),
        max(float(np.ptp(other)) - 0.25, 0.0) / 0.1,
        float(-steady.sum()) / 0.08,
        left / 0.06,
        area / 0.10,
        m.turns(),
    )
    return Fit(residual, min(change / 0.16, sign * grown / 0.12), {"factor": math.exp(sign * change)})


def _stretch(m: _Motion) -> Fit:
    return _proportion(m, 1.0)


def _compress(m: _Motion) -> Fit:
    return _proportion(m, -1.0)


def _explode(m: _Motion) -> Fit:
    """Spread grows steadily while what is covered stays; all that flies apart has one middle that stays."""
    grown = float(m.spread[-1] - m.spread[0])
    steady = -float(np.minimum(np.diff(m.spread), 0.0).sum())
    both = min(m.major[-1] - m.major[0], m.minor[-1] - m.minor[0])
    # Fragments may leave the picture, and thin ones fade in the tracker.
    change = float(m.area[-1] - m.area[0])
    area = max(change - 0.10, -change - 0.25, 0.0)
    residual = _together(0.4 * m.still(), steady / 0.06, area / 0.05)
    return Fit(residual, min(grown / 0.10, float(both) / 0.06))


_LAWS: dict[str, Any] = {
    "compress": _compress,
    "bounce": _bounce,
    "roll": _roll,
    "explode": _explode,
    "float": _float,
    "free fall": _free_fall,
    "slide": _slide,
    "spin": _spin,
    "stretch": _stretch,
    "swing": _swing,
    STATIC: _static,
}
