"""How much clips move, and how evenly, from optical flow: given with a clip, or estimated by DIS."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Optional

import torch
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.metrics.base import PerClip
from muybridge.motion.estimators import DIS
from muybridge.video import to_frames


def dis_flow(pixels: Tensor) -> Tensor:
    """Flow of each frame to the next by :class:`~muybridge.motion.DIS`, (B, F-1, 2, H, W) in pixels, x first.

    Args:
        pixels: Clips, (B, 3, F, H, W) in [-1, 1].
    """
    estimator = DIS(side=0)
    clips = [to_frames(clip) for clip in pixels]
    return torch.stack([torch.stack([estimator.flow(a, b) for a, b in pairwise(frames)]) for frames in clips])


def motion_amount(flow: Tensor, share: float = 0.05) -> Tensor:
    """Mean length of the fastest ``share`` of each frame's flow, as a share of the picture's shorter side, (B,).

    Only the fastest count, so that a small thing before a large still ground does move.

    Args:
        flow: (B, F-1, 2, H, W), in pixels.
        share: Of the pixels of a frame, more than 0 and up to 1.
    """
    if flow.ndim != 5 or flow.shape[2] != 2 or not 0.0 < share <= 1.0:
        raise UsageError(f"flow of shape {tuple(flow.shape)}, share {share}", "(B, F-1, 2, H, W), and above 0 up to 1")
    length = flow.float().norm(dim=2).flatten(2)
    fastest = length.topk(max(1, round(share * length.shape[-1])), dim=-1).values
    return fastest.mean((1, 2)) / min(flow.shape[-2:])


def motion_smoothness(flow: Tensor) -> Tensor:
    """``1 - Σ|f(t+1, p + f(t, p)) - f(t, p)| / Σ(|f(t+1, p + f(t, p))| + |f(t, p)|)``, (B,): how far velocities last.

    1 where velocities last, 0 where they turn back at every frame, and 0 where nothing moves: a frozen clip is not smooth.
    The next frame's flow is read where a pixel has gone to; pixels that leave the picture don't count.

    Args:
        flow: (B, F-1, 2, H, W), in pixels, of 3 frames or more.
    """
    if flow.ndim != 5 or flow.shape[2] != 2 or flow.shape[1] < 2:
        raise UsageError(f"flow of shape {tuple(flow.shape)}", "(B, F-1, 2, H, W) of 3 frames or more")
    batch, count, _, height, width = flow.shape
    now, after = flow[:, :-1].flatten(0, 1).float(), flow[:, 1:].flatten(0, 1).float()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    to_x, to_y = x.to(now) + now[:, 0], y.to(now) + now[:, 1]
    inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    grid = torch.stack([2.0 * to_x / max(width - 1, 1) - 1.0, 2.0 * to_y / max(height - 1, 1) - 1.0], -1)
    after = torch.nn.functional.grid_sample(after, grid, align_corners=True)
    change = ((after - now).norm(dim=1) * inside).view(batch, -1).sum(1)
    total = ((after.norm(dim=1) + now.norm(dim=1)) * inside).view(batch, -1).sum(1)
    # Below a thousandth of a pixel on average, nothing moves.
    moves = total > 1e-3 * (count - 1) * height * width
    return torch.where(moves, 1.0 - change / total.clamp(min=1e-9), torch.zeros_like(total))


class _OfFlow(PerClip):
    """A value of each clip's flow: the flow given with it, or that of DIS."""

    def value(self, flow: Tensor) -> Tensor:
        """One value a clip."""
        raise NotImplementedError

    def update(self, pixels: Tensor, flow: Optional[Tensor] = None) -> None:
        """Take some clips, (B, 3, F, H, W) in [-1, 1], and their flow where it is known, (B, F-1, 2, H, W) in pixels."""
        self.keep(self.value(dis_flow(pixels) if flow is None else flow))


class MotionAmount(_OfFlow):
    """Mean of :func:`motion_amount`.

    Args:
        share: Share of the pixels of a frame that count, the fastest.
        options: As for :class:`torchmetrics.Metric`.
    """

    plot_lower_bound = 0.0

    def __init__(self, share: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.share = share

    def value(self, flow: Tensor) -> Tensor:
        return motion_amount(flow, self.share)


class MotionSmoothness(_OfFlow):
    """Mean of :func:`motion_smoothness`; to be read beside :class:`MotionAmount`.

    Args:
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def value(self, flow: Tensor) -> Tensor:
        return motion_smoothness(flow)
