"""How much of the motion one single frame gives away.

A small network is trained to name the motion from one frame of a clip, and read on clips it has not seen. Chance is one over the
number of motions; what is above it is a leak, and may be read by any model as well.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from muybridge.proving_ground.tracking import saturation
from muybridge.video import Frames

Sees = Literal["silhouette", "pixels"]


class Leak(NamedTuple):
    """What a probe read.

    Args:
        accuracy: Share of unseen frames whose motion it named.
        bound: Upper end of the one-sided 95 % confidence interval (Wilson's) of that share.
        clips: How many there were.
    """

    accuracy: float
    bound: float
    clips: int


def silhouette(images: Frames) -> np.ndarray:
    """Place, extents, area, covariance and fill of the coloured thing in single frames, (N, 12)."""
    weight = np.clip((saturation(images) - 0.10) / 0.10, 0.0, 1.0)
    height, width = weight.shape[1:]
    gx, gy = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total = weight.sum((1, 2)) + 1e-6
    columns, rows = weight.sum(1), weight.sum(2)
    x, y = columns @ gx / total, rows @ gy / total
    dx, dy = gx[None] - x[:, None], gy[None] - y[:, None]
    xx, yy = (columns * dx**2).sum(1) / total, (rows * dy**2).sum(1) / total
    xy = np.einsum("nhw,nw,nh->n", weight, dx, dy) / total
    spread, area = np.log(xx + yy + 1e-6), np.log(total)
    sides: list[np.ndarray] = []
    for line in (weight.max(1) > 0.5, weight.max(2) > 0.5):
        sides += [line.argmax(1) / line.shape[1], 1.0 - line[:, ::-1].argmax(1) / line.shape[1]]
    box = np.maximum((sides[1] - sides[0]) * (sides[3] - sides[2]), 1e-3)
    fill = total / (height * width) / box
    return np.stack(
        [x, y, np.sqrt(xx), np.sqrt(yy), xy / np.sqrt(xx * yy + 1e-9), spread - area, area, fill, *sides], -1
    )


def pixels(images: Frames, side: int = 16) -> np.ndarray:
    """Saturation and grey level at ``side`` x ``side``, flat."""
    count, height, width, _ = images.shape
    values = images.astype(np.float64) / 255.0
    small = values.reshape(count, side, height // side, side, width // side, 3).mean((2, 4))
    return np.concatenate([(small.max(-1) - small.min(-1)).reshape(count, -1), small.mean(-1).reshape(count, -1)], 1)


def probe(images: Frames, labels: np.ndarray, sees: Sees = "silhouette", hidden: int = 64, seed: int = 0) -> Leak:
    """Train on the first half, read on the second.

    Args:
        images: One frame of each clip, (N, H, W, 3).
        labels: Which motion each is, (N,), from 0.
        sees: What the probe is given of a frame.
        hidden: Hidden units; 0 is logistic regression.
        seed: Of its weights and the order of its batches.
    """
    generator = torch.Generator().manual_seed(seed)
    given = torch.from_numpy(silhouette(images) if sees == "silhouette" else pixels(images)).float()
    answers, half = torch.from_numpy(np.asarray(labels)).long(), len(images) // 2
    given = (given - given[:half].mean(0)) / (given[:half].std(0) + 1e-5)
    classes = int(answers.max()) + 1
    sizes = [given.shape[1], *([hidden] if hidden else [])]
    inner: list[nn.Module] = [nn.Linear(sizes[0], hidden), nn.ReLU()] if hidden else []
    net = nn.Sequential(*inner, nn.Linear(sizes[-1], classes))
    for parameter in net.parameters():
        fan = parameter.shape[-1]
        parameter.data = (torch.rand(parameter.shape, generator=generator) * 2.0 - 1.0) / math.sqrt(fan)
    epochs, decay = (20, 1e-2) if sees == "silhouette" else (5, 1.0)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=decay)
    for _ in range(epochs):
        for batch in torch.randperm(half, generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(given[batch]), answers[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (net(given[half:]).argmax(1) == answers[half:]).double()
    share, count, z = float(right.mean()), len(right), 1.645
    root = math.sqrt(share * (1.0 - share) / count + z**2 / (4.0 * count**2))
    return Leak(share, (share + z**2 / (2.0 * count) + z * root) / (1.0 + z**2 / count), count)
