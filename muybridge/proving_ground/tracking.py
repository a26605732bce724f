"""A sprite's kinematics read off the pixels of a clip: what is coloured is the sprite, what is grey is not.

All lengths are in units of the picture's side, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from muybridge.video import Frames


@dataclass(frozen=True)
class Track:
    """One clip's sprite, (T,) each.

    Args:
        x: Its centre.
        y: Its centre, downwards.
        area: Share of the picture that it covers.
        moments: Its covariance, (T, 2, 2).
        angle: Direction of its brighter side in radians, unwrapped.
        pixel: Length of a pixel.
    """

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    moments: np.ndarray
    angle: np.ndarray
    pixel: float

    @property
    def present(self) -> bool:
        """Whether there is a sprite in all frames."""
        return bool((self.area > 0.002).all())


def saturation(frames: Frames) -> np.ndarray:
    """How coloured each pixel is: the greatest less the least of its channels, 0 to 1, (T, H, W); smoothed over 3 x 3."""
    values = frames.astype(np.float64) / 255.0
    raw = values.max(-1) - values.min(-1)
    height, width = raw.shape[1:]
    padded = np.pad(raw, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.stack(shifted).mean(0)


def track(frames: Frames) -> Track:
    """Follow the coloured thing in a clip, (T, H, W, 3), uint8.

    The key adapts to a clip's own colour noise: it begins five standard deviations (by the median) above its median.
    """
    key = saturation(frames)
    middle = np.median(key)
    low = max(0.10, middle + 5.0 * 1.48 * float(np.median(np.abs(key - middle))))
    weight = np.clip((key - low) / 0.10, 0.0, 1.0)
    height, width = key.shape[1:]
    side = max(height, width)
    gx, gy = (np.arange(width) + 0.5) / side, (np.arange(height) + 0.5) / side
    total = weight.sum((1, 2)) + 1e-9
    columns, rows = weight.sum(1), weight.sum(2)
    x, y = columns @ gx / total, rows @ gy / total
    dx, dy = gx[None] - x[:, None], gy[None] - y[:, None]
    xx, yy = (columns * dx**2).sum(1) / total, (rows * dy**2).sum(1) / total
    xy = np.einsum("thw,tw,th->t", weight, dx, dy) / total
    light = frames.max(-1) / 255.0
    mean = (weight * light).sum((1, 2)) / total
    uneven = weight * (light - mean[:, None, None])
    angle = np.arctan2(np.einsum("thw,th->t", uneven, dy), np.einsum("thw,tw->t", uneven, dx))
    moments = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)
    return Track(x, y, total / (height * width), moments, np.unwrap(angle), 1.0 / side)
