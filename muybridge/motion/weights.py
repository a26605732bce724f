"""Motion magnitude as weights on the latent grid (eq. 7 and 8 of motion attribution)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from muybridge.errors import UsageError
from muybridge.motion.estimators import Displacement

VERSION = 1


@dataclass(frozen=True)
class MotionWeights:
    """How a displacement becomes weights.

    Args:
        floor: A clip whose largest displacement is below so many pixels has no motion: its weights are ``zeta`` everywhere,
            rather than its noise stretched to 1.
        zeta: Added to every weight, so that no place counts for nothing.
        antialias: Let each place of the latent grid see all pixels it covers, rather than the four about its middle.
        only_visible: Count hidden pixels as not moving, where the estimator tells them.
    """

    floor: float = 0.5
    zeta: float = 1e-6
    antialias: bool = True
    only_visible: bool = False

    def __post_init__(self) -> None:
        if self.floor < 0 or self.zeta < 0:
            raise UsageError(
                f"motion weights with floor {self.floor} and zeta {self.zeta}", "a floor and a zeta of 0 or more"
            )

    def key(self) -> dict[str, Any]:
        """All settings, as plain values."""
        return {"version": VERSION, **asdict(self)}


def magnitude(found: Displacement, only_visible: bool = False) -> Tensor:
    """``M_f(h, w) = ||D_f(h, w)||``, (F, H, W)."""
    length = found.vectors.float().norm(dim=1)
    return length * found.visibility if only_visible else length


def motion_weights(found: Displacement, latent: Sequence[int], how: MotionWeights = MotionWeights()) -> Tensor:
    """Weights on the latent grid, (1, F, H, W): magnitude, min–max over the clip, plus ζ, bilinear, mean over frames.

    The first latent frame covers the first pixel frame, each further one equally many of the others.

    Args:
        found: The displacement of the clip's pixels.
        latent: Frames, height and width of its latents.
        how: The options.
    """
    frames, height, width = latent
    length = magnitude(found, how.only_visible)
    count = len(length)
    group = 1 if frames in (1, count) else (count - 1) // (frames - 1)
    if (frames - 1) * group + 1 != count:
        raise UsageError(
            f"{count} pixel frames and {frames} latent frames", "a first frame, and equally many for each further one"
        )
    largest, smallest = float(length.max()), float(length.min())
    if largest < how.floor or largest == smallest == 0.0:
        return torch.full((1, frames, height, width), how.zeta)
    # A clip that moves everywhere alike is all motion, not none.
    spread = largest - smallest
    scaled = (length - smallest) / spread if spread > 1e-6 * largest else torch.ones_like(length)
    grid = torch.nn.functional.interpolate(
        scaled[:, None] + how.zeta, (height, width), mode="bilinear", align_corners=False, antialias=how.antialias
    )[:, 0]
    rest = grid[1:].unflatten(0, (frames - 1, group)).mean(1) if frames > 1 else grid[:0]
    return torch.cat([grid[:1], rest])[None]
