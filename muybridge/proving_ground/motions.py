"""Ten motions as equations: where every part of a sprite is in every frame.

A sprite's place p in its own coordinates (radius 1) is at ``c_k(t) + A_k(t) p`` in the picture, for the part k that p belongs to.
The unit of length is the picture's side, x to the right and y down; the unit of time is a frame. Speeds go with ``16 / (T - 1)``,
so that a longer clip shows the same motion more slowly. What has a clock of its own (bouncing, spinning, swinging, floating,
bursting) goes by the world's pace too; the others take the clip to get where they go.

Two worlds have the same ten laws:

- **natural**: things stand on a floor, fall from rest, burst out of one piece. One frame then tells much about the motion.
- **without leak**: what a motion does not change, a clip takes from all that *another* motion would pass through. A rolling star
  has the height of something that swings, the proportions of something that is being stretched and the gaps of something that
  bursts, and keeps them. Motions begin at a random phase, and all that can be run backwards are as often seen so; stretching and
  compressing are each other's reverse, frame by frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

MOTIONS = ("compress", "bounce", "roll", "explode", "float", "free fall", "slide", "spin", "stretch", "swing")
STATIC = "static"
PARTS = 6
"""Wedges that a sprite bursts into."""
FLOOR = 0.88
"""Of the natural world."""
LOW, HIGH = 0.18, 0.82
"""Where centres stay, in the world without leak."""
MOVES_X = ("roll", "slide", "swing", "float", "bounce", "free fall")
MOVES_Y = ("swing", "float", "bounce", "free fall")
GAP = 1.1
"""Greatest distance of wedges from their places, of the world without leak, in radii."""
DEFORMED = 0.4
"""Greatest logarithm of a side's change, of the same."""


@dataclass(frozen=True)
class Trajectory:
    """Where every part is in every frame.

    Args:
        centre: (K, T, 2).
        matrix: (K, T, 2, 2).
        radius: Of the sprite when nothing deforms it.
        parameters: Of the law, by name: ``g`` (per frame squared), ``omega`` (radians a frame), ``period`` (frames).
    """

    centre: np.ndarray
    matrix: np.ndarray
    radius: float
    parameters: dict[str, float] = field(default_factory=dict)

    def reversed(self) -> Trajectory:
        """The same, last frame first."""
        return Trajectory(self.centre[:, ::-1], self.matrix[:, ::-1], self.radius, self.parameters)


@dataclass
class State:
    """What a law says of the sprite as a whole, in every frame: (T,) each."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    wide: np.ndarray
    high: np.ndarray
    gap: np.ndarray
    parameters: dict[str, float]
    tilt: float = 0.0


def turn(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices, (..., 2, 2)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def draw_trajectory(
    motion: str, rng: np.random.Generator, frames: int, anti_leak: bool, scale: float = 1.0, pace: float = 1.0
) -> Trajectory:
    """A random instance of a motion.

    Args:
        motion: One of ``MOTIONS``, or ``static``.
        rng: Where the parameters come from.
        frames: Length of the clip, 2 or more.
        anti_leak: Which of the two worlds.
        scale: Size of the sprite against the usual.
        pace: Of what has a clock of its own, against the usual.
    """
    radius = scale * float(rng.uniform(0.08, 0.13) if anti_leak else rng.uniform(0.105, 0.15))
    slow = (frames - 1) / 16.0 / pace
    state = (_without_leak if anti_leak else _natural)(motion, rng, frames, radius, slow)
    broken = anti_leak or motion == "explode"
    return _assemble(state, radius, float(rng.uniform(-math.pi, math.pi)), rng, PARTS if broken else 1)


def _assemble(state: State, radius: float, angle: float, rng: np.random.Generator, parts: int) -> Trajectory:
    """The parts of a sprite whose whole is in these states."""
    sides = np.zeros((len(state.x), 2, 2))
    sides[:, 0, 0], sides[:, 1, 1] = np.exp(state.wide), np.exp(state.high)
    body = turn(state.angle + state.tilt) @ sides @ turn(np.array(angle)) * radius
    middle = np.stack([state.x, state.y], -1)
    if parts == 1:
        return Trajectory(middle[None], body[None], radius, state.parameters)
    reach, whirl = rng.uniform(0.8, 1.2, parts), rng.uniform(-0.5, 0.5, parts)
    directions = (np.arange(parts) + 0.5) * 2.0 * math.pi / parts
    centres, matrices = [], []
    for k in range(parts):
        outward = np.array([math.cos(directions[k]), math.sin(directions[k])])
        own = turn(whirl[k] * state.gap)
        # A wedge turns about its own middle, half-way out.
        shift = 0.5 * outward + (state.gap * reach[k])[:, None] * outward - own @ (0.5 * outward)
        centres.append(middle + (body @ shift[..., None])[..., 0])
        matrices.append(body @ own)
    return Trajectory(np.stack(centres), np.stack(matrices), radius, state.parameters)


# -- laws that both worlds share -----------------------------------------------------------------------------------


def bounces(t: np.ndarray, top: float, floor: float, rise: float, keep: float) -> np.ndarray:
    """Height (down) of something dropped at time 0, exact between contacts: ``y = floor - v τ + g τ² / 2``.

    Args:
        t: Times.
        top: Where it is dropped.
        floor: Where it is reflected.
        rise: Time from the top to the floor.
        keep: Share of its speed that it keeps at every contact.
    """
    g = 2.0 * (floor - top) / rise**2
    y = top + 0.5 * g * t**2
    contact, speed = rise, g * rise
    while contact < t[-1]:
        speed *= keep
        if 2.0 * speed / g < 0.5:
            return np.where(t >= contact, floor, y)
        tau = t - contact
        y = np.where(tau >= 0.0, floor - speed * tau + 0.5 * g * tau**2, y)
        contact += 2.0 * speed / g
    return y


def course(t: np.ndarray, ratio: float) -> np.ndarray:
    """From 0 to 1 with a speed that goes evenly from ``1`` to ``ratio``, times a constant."""
    u = t / t[-1]
    return u * (2.0 - (1.0 - ratio) * u) / (1.0 + ratio)


def _still(frames: int, x: float = 0.5, y: float = 0.5) -> State:
    zero = np.zeros(frames)
    return State(zero + x, zero + y, zero, zero, zero, zero, {})


# -- the natural world ---------------------------------------------------------------------------------------------


def _natural(motion: str, rng: np.random.Generator, frames: int, r: float, s: float) -> State:
    t = np.arange(frames, dtype=np.float64)
    state = _still(frames, rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.6))
    rest, p, u = FLOOR - r, state.parameters, t / t[-1]
    if motion == "free fall":
        top, landing = rng.uniform(r + 0.02, 0.22), rng.uniform(0.8, 1.15) * t[-1]
        p["g"] = 2.0 * (rest - top) / landing**2
        state.x[:] = rng.uniform(0.2, 0.8)
        state.y = np.minimum(top + 0.5 * p["g"] * t**2, rest)
    elif motion == "bounce":
        top, rise, p["restitution"] = rng.uniform(r + 0.02, 0.4), rng.uniform(4.0, 6.0) * s, rng.uniform(0.7, 0.92)
        p["g"] = 2.0 * (rest - top) / rise**2
        state.y = bounces(t, top, rest, rise, p["restitution"])
        state.x = rng.uniform(0.3, 0.7) + rng.uniform(-0.19, 0.19) * u
    elif motion in ("slide", "roll"):
        way, p["direction"], p["ratio"] = rng.uniform(0.42, 0.62), _sign(rng), rng.uniform(0.25, 0.8)
        state.x = 0.5 + p["direction"] * (rng.uniform(0.16, 0.84 - way) - 0.5 + way * course(t, p["ratio"]))
        state.y[:] = rest
        if motion == "roll":
            state.angle = (state.x - state.x[0]) / r
    elif motion == "spin":
        p["omega"] = _sign(rng) * rng.uniform(0.25, 0.55) / s
        state.angle = p["omega"] * t
    elif motion == "swing":
        length, x, y = rng.uniform(0.38, 0.50), rng.uniform(0.42, 0.58), rng.uniform(0.08, 0.2)
        _swing(state, t, rng, length, s)
        state.x, state.y = state.x + x, state.y + y
    elif motion == "float":
        _float(state, t, rng, s)
        state.x, state.y = state.x + rng.uniform(0.4, 0.6), state.y + rng.uniform(0.35, 0.6)
    elif motion == "stretch":
        grown = rng.uniform(0.56, 0.83) * u ** rng.uniform(0.8, 1.25)
        p["axis"], p["factor"] = float(rng.integers(2)), math.exp(grown[-1])
        state.wide, state.high = (grown, -0.1 * u) if p["axis"] == 0 else (-0.1 * u, grown)
    elif motion == "compress":
        shrunk = -rng.uniform(0.7, 1.1) * u ** rng.uniform(0.8, 1.25)
        p["axis"], p["factor"] = 1.0, math.exp(shrunk[-1])
        state.high, state.wide = shrunk, rng.uniform(0.1, 0.2) * u
        state.y = FLOOR - r * np.exp(state.high)
    elif motion == "explode":
        p["start"], speed = rng.uniform(1.0, 4.0) * s, rng.uniform(0.25, 0.36) / s
        state.gap = _burst(np.maximum(t - p["start"], 0.0), speed, rng.uniform(0.86, 0.94) ** (1.0 / s))
    elif motion != STATIC:
        raise KeyError(motion)
    return state


def _swing(state: State, t: np.ndarray, rng: np.random.Generator, length: float, s: float) -> None:
    """``φ = a cos(2π t / P + ψ)`` about a pivot at the origin."""
    p = state.parameters
    p["length"], p["amplitude"], p["period"] = length, rng.uniform(0.5, 0.85), rng.uniform(13.0, 22.0) * s
    phi = p["amplitude"] * np.cos(2.0 * math.pi * (t / p["period"] + rng.random()))
    state.x, state.y, state.angle = length * np.sin(phi), length * np.cos(phi), phi[0] - phi


def _float(state: State, t: np.ndarray, rng: np.random.Generator, s: float) -> None:
    """``y = a sin(2π t / P + ψ)``, an even drift, and a little rocking."""
    p = state.parameters
    p["amplitude"], p["period"] = rng.uniform(0.045, 0.085), rng.uniform(8.0, 13.0) * s
    phase = 2.0 * math.pi * (t / p["period"] + rng.random())
    rock = rng.uniform(0.12, 0.3) * np.sin(phase + 1.0)
    state.y, state.angle = p["amplitude"] * np.sin(phase), rock - rock[0]
    state.x = _sign(rng) * rng.uniform(0.05, 0.16) * t / t[-1]


def _burst(tau: np.ndarray, speed: float, drag: float) -> np.ndarray:
    """Distance after ``tau`` frames at a speed of which every frame leaves the share ``drag``."""
    return speed * (1.0 - drag**tau) / (1.0 - drag)


# -- the world without leak ----------------------------------------------------------------------------------------


def _path(motion: str, rng: np.random.Generator, frames: int, r: float, s: float) -> State:
    """Motions of place and angle, about any origin."""
    t = np.arange(frames, dtype=np.float64)
    state = _still(frames, 0.0, 0.0)
    p, u = state.parameters, t / t[-1]
    if motion in ("slide", "roll"):
        p["direction"], p["ratio"] = _sign(rng), rng.uniform(0.4, 1.0)
        passed = course(t, p["ratio"])
        # On a slope the speed may as well grow.
        passed = passed if rng.random() < 0.5 else 1.0 - passed[::-1]
        state.x = p["direction"] * rng.uniform(0.18, 0.26) * passed
        if motion == "roll":
            state.angle = (state.x - state.x[0]) / r
    elif motion == "bounce":
        height, rise = rng.uniform(0.16, 0.27), rng.uniform(3.8, 5.6) * s
        p["g"], p["restitution"] = 2.0 * height / rise**2, 1.0
        since = np.mod(t + rng.uniform(0.0, 2.0 * rise), 2.0 * rise)
        state.y = height * (since / rise - 1.0) ** 2
        state.x = rng.uniform(-0.1, 0.1) * u
    elif motion == "free fall":
        apex, extent = rng.uniform(-0.2, 1.2), rng.uniform(0.18, 0.27)
        parabola = (u - apex) ** 2
        scale = extent / np.ptp(parabola)
        p["g"] = 2.0 * scale / t[-1] ** 2
        state.y, state.x = scale * parabola, rng.uniform(-0.1, 0.1) * u
    elif motion == "float":
        _float(state, t, rng, s)
    elif motion == "swing":
        _swing(state, t, rng, rng.uniform(0.20, 0.28), s)
    elif motion == "spin":
        p["omega"] = _sign(rng) * rng.uniform(0.25, 0.55) / s
        state.angle = p["omega"] * t
    return state


def _placed(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Anywhere, as long as all of it is between ``LOW`` and ``HIGH``."""
    return path + rng.uniform(LOW - path.min(), HIGH - path.max())


def _deformed(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of length and breadth of something being stretched."""
    change = rng.uniform(0.22, 0.30)
    passed = np.linspace(0.0, 1.0, frames) ** rng.uniform(0.8, 1.25)
    along = rng.uniform(-DEFORMED, DEFORMED - change) + change * passed
    return along, np.full(frames, rng.uniform(-DEFORMED, DEFORMED))


def _gaps(rng: np.random.Generator, frames: int, s: float) -> np.ndarray:
    """Distances of wedges of something that bursts."""
    change = rng.uniform(0.22, 0.30)
    passed = _burst(np.arange(frames, dtype=np.float64), 1.0, rng.uniform(0.90, 0.96) ** (1.0 / s))
    return rng.uniform(0.0, GAP - change) + change * passed / passed[-1]


def _without_leak(motion: str, rng: np.random.Generator, frames: int, r: float, s: float) -> State:
    if motion not in (*MOTIONS, STATIC):
        raise KeyError(motion)
    state = _path(motion, rng, frames, r, s)
    if motion in MOVES_X:
        state.x = _placed(state.x, rng)
    else:
        other = _path(MOVES_X[int(rng.integers(len(MOVES_X)))], rng, frames, r, s)
        state.x = state.x + _placed(other.x, rng)[int(rng.integers(frames))]
    if motion in MOVES_Y:
        state.y = _placed(state.y, rng)
    else:
        other = _path(MOVES_Y[int(rng.integers(len(MOVES_Y)))], rng, frames, r, s)
        state.y = state.y + _placed(other.y, rng)[int(rng.integers(frames))]
    # A deformed thing that turns is seen deformed along any direction, so all are.
    state.tilt = float(rng.uniform(-math.pi, math.pi))
    if motion in ("stretch", "compress"):
        along, across = _deformed(rng, frames)
        state.wide, state.high = (along if motion == "stretch" else along[::-1]), across
        state.parameters["factor"] = math.exp(state.wide[-1] - state.wide[0])
    else:
        state.wide = state.wide + rng.uniform(-DEFORMED, DEFORMED)
        state.high = state.high + rng.uniform(-DEFORMED, DEFORMED)
    state.gap = _gaps(rng, frames, s) if motion == "explode" else state.gap + rng.uniform(0.0, GAP)
    return state
