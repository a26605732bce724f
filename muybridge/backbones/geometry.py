"""How pixels map to latents and latents to tokens, and which sizes a family can represent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from muybridge.errors import UsageError


@dataclass(frozen=True)
class Geometry:
    """How pixels map to latents and latents to tokens.

    Args:
        channels: Latent channels.
        spatial: Pixels per latent place, along height and width.
        temporal: Pixel frames per latent frame after the first (1: every frame has its own).
        patch: Latent places per token along (F, H, W).
        frames: The only latent frame count the network takes, where there is only one (Latte).
        max_frames: The largest pixel frame count, where there is a limit (AnimateDiff).
    """

    channels: int
    spatial: int
    temporal: int = 1
    patch: tuple[int, int, int] = (1, 2, 2)
    frames: Optional[int] = None
    max_frames: Optional[int] = None

    def check_clip(self, frames: int, height: int, width: int, family: str) -> None:
        """Refuse a clip size that can't be represented exactly, with the nearest that can."""
        side = self.spatial * self.patch[1]
        problems, fits = [], []
        if (frames - 1) % self.temporal:
            low = (frames - 1) // self.temporal * self.temporal + 1
            problems.append(f"{frames} frames")
            fits.append(f"{self.temporal}n+1 frames, such as {low} or {low + self.temporal}")
        latent_frames = (frames - 1) // self.temporal + 1
        if not fits and self.frames is not None and latent_frames not in (1, self.frames):
            problems.append(f"{frames} frames")
            fits.append(f"{(self.frames - 1) * self.temporal + 1} frames, the only length it was trained for")
        if self.max_frames is not None and frames > self.max_frames:
            problems.append(f"{frames} frames")
            fits.append(f"at most {self.max_frames} frames")
        if not fits and latent_frames % self.patch[0]:
            count = -(-latent_frames // self.patch[0]) * self.patch[0]
            problems.append(f"{frames} frames ({latent_frames} latent frames)")
            fits.append(
                f"a multiple of {self.patch[0]} latent frames, such as {(count - 1) * self.temporal + 1} frames"
            )
        if height % side or width % side:
            problems.append(f"{height}x{width} pixels")
            near = [max(side, round(x / side) * side) for x in (height, width)]
            fits.append(f"sides divisible by {side}, such as {near[0]}x{near[1]}")
        if problems:
            raise UsageError(
                f"{family} can't take clips of {' and '.join(problems)}",
                "; ".join(fits),
                "set frames, height and width (of the datamodule in a config); nothing is cropped in silence",
            )

    def latent_shape(self, frames: int, height: int, width: int, family: str) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip; refuses sizes that don't fit."""
        self.check_clip(frames, height, width, family)
        return self.channels, (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def check_latents(self, latents: Tensor, family: str) -> None:
        """Refuse latents (B, C, F, H, W) that the network would crop, or has no positions for."""
        _, channels, frames, height, width = latents.shape
        if channels != self.channels:
            raise UsageError(f"latents with {channels} channels", f"{self.channels}, as {family}'s network takes")
        for size, patch, axis in zip((frames, height, width), self.patch, ("frames", "height", "width"), strict=True):
            if size % patch:
                raise UsageError(
                    f"a latent {axis} of {size}",
                    f"a multiple of {family}'s patch, {patch}: the network would crop it in silence",
                )
        if self.frames is not None and frames not in (self.frames, 1):
            raise UsageError(
                f"{frames} latent frames", f"{self.frames} (or 1): {family}'s network has positions for no other count"
            )
        if self.max_frames is not None and frames > self.max_frames:
            raise UsageError(
                f"{frames} latent frames", f"at most {self.max_frames}: {family}'s network has positions for no more"
            )
