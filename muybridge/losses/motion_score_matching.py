"""Motion score matching: the same pull on what changes from frame to frame."""

from __future__ import annotations

from typing import Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.diffusion.steps import ScoreStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss
from muybridge.losses.distribution_matching import enough_frames, frame_difference, mean_size, pull, shared_time


class MotionScoreMatching(Loss):
    """``λ · ½ mean (Δx - sg(Δx - G_m/w_m))²`` with ``G_m = Δx̂_fake - Δx̂_real``, ``Δ`` the difference along the frames.

    To be listed beside ``DistributionMatching``. The motion score is the frame difference of the score; at one score time for
    all frames that of the clean estimate is proportional to it. With the shared normaliser the two losses together are the
    gradient of ``DistributionMatching`` multiplied by ``I + λ c ΔᵀΔ``, ``c = F/(F - 1)``: what is constant over the frames stays
    as it is, and the fastest change weighs up to ``1 + 4 λ c``.

    Args:
        weight: ``λ``; 0 is distribution matching alone.
        normalizer: ``shared`` divides by ``w = mean |x - x̂_real|``, as ``DistributionMatching`` does. ``own`` divides by
            ``w_m = mean |Δ(x - x̂_real)|``, which is smaller the less is left of the motion to learn.
        skip_first_frame: Leave out the step from the first latent frame to the second. Wan's first latent frame covers one frame
            of pixels and the others four, so that step spans another time.
        feature: ``f`` of eq. 13, ``f(x²…xᶠ) - f(x¹…xᶠ⁻¹)`` in place of ``Δx``: a module from (B, C, F - 1, H, W) latents to
            anything batch first. It is frozen, and sees clips rather than scores of clips.
        shared_noise: Ask the job to noise all frames of a clip with one draw, as the derivation assumes.
        floor: The normaliser is at least this.
    """

    def __init__(
        self,
        weight: float = 1.0,
        normalizer: Literal["shared", "own"] = "shared",
        skip_first_frame: bool = False,
        feature: Optional[nn.Module] = None,
        shared_noise: bool = False,
        floor: float = 1e-5,
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise UsageError(
                f"MotionScoreMatching weight (λ) is {weight}",
                "a number of 0 or more",
                "below 0 it would push the student away from the teacher's motion",
            )
        if normalizer not in ("shared", "own"):
            raise UsageError(f"MotionScoreMatching normalizer is {normalizer!r}", "shared or own")
        if not floor > 0:
            raise UsageError(f"MotionScoreMatching floor is {floor}", "a small number above 0")
        self.weight, self.normalizer, self.skip_first_frame = weight, normalizer, skip_first_frame
        self.shared_noise, self.floor = shared_noise, floor
        self.feature = feature.requires_grad_(False).eval() if feature is not None else None

    def motion(self, x: Tensor) -> Tensor:
        """``Δx``, or that of a feature of the frames; without the first frame where that is skipped."""
        x = x[:, :, 1:] if self.skip_first_frame else x
        return frame_difference(x) if self.feature is None else self._seen(x[:, :, 1:]) - self._seen(x[:, :, :-1])

    def _seen(self, x: Tensor) -> Tensor:
        """``f(x)`` in the feature's own precision, which autocast would lower: what is left of two like it is small."""
        assert self.feature is not None
        own = next((p.dtype for p in self.feature.parameters() if p.is_floating_point()), x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self.feature(x.to(own)).to(x.dtype)

    def forward(self, step: ScoreStep) -> Tensor:
        shared_time(step, type(self).__name__)
        enough_frames(step, type(self).__name__, skipped=int(self.skip_first_frame))
        # Differences of nearly equal frames cancel: upcast first.
        x, real, fake = step.sample.double(), step.real_x0.double(), step.fake_x0.double()
        if self.weight == 0.0:
            return 0.0 * x.flatten(1).sum(1)
        moved = self.motion(x)
        with torch.no_grad():
            moved_real = self.motion(real)
            gradient = self.motion(fake) - moved_real
            if self.normalizer == "own":
                gradient = gradient / mean_size(moved.detach() - moved_real, self.floor)
            else:
                shared = mean_size(x - real, self.floor)
                gradient = gradient / shared.view(-1, *[1] * (gradient.ndim - 1))
        return self.weight * pull(moved, gradient)
