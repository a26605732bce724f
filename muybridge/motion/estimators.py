"""From frames to displacement, visibility and confidence: one face for optical flow and for dense trackers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from muybridge.errors import UsageError

Frames = np.ndarray
"""(F, H, W, 3), uint8, RGB."""
Reference = Literal["previous", "first"]
VERSION = 1
"""Of what estimators give; in the key of every cache of motion weights."""


@dataclass(frozen=True)
class Displacement:
    """How far every pixel of a clip has come, in pixels.

    Args:
        vectors: (F, 2, H, W), x first. From the frame before to this one, on this frame's grid (``reference`` is ``previous``;
            the first frame, which has none before it, has the way to the second), or from the first frame to this one, on
            the first frame's grid (``first``).
        visibility: (F, H, W), 0 to 1: whether the pixel is seen at both ends of the way.
        confidence: (F, H, W), 0 to 1.
        reference: What the displacement is from.
    """

    vectors: Tensor
    visibility: Tensor
    confidence: Tensor
    reference: Reference

    @classmethod
    def none(cls, frames: int, height: int, width: int, reference: Reference) -> Displacement:
        """Of a clip in which nothing moves."""
        ones = torch.ones(frames, height, width)
        return cls(torch.zeros(frames, 2, height, width), ones, ones, reference)


class MotionEstimator(ABC):
    """From frames to :class:`Displacement`. A subclass gives :meth:`estimate` for clips of two frames or more.

    Args:
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
    """

    reference: ClassVar[Reference]

    def __init__(self, camera: Literal["keep", "remove"] = "keep") -> None:
        if camera not in ("keep", "remove"):
            raise UsageError(f"camera is {camera!r}", "keep or remove")
        self.camera = camera

    @abstractmethod
    def estimate(self, frames: Frames) -> Displacement:
        """The displacement of a clip of at least two frames."""

    def __call__(self, frames: Frames) -> Displacement:
        """The displacement of any clip; a single frame has none.

        Args:
            frames: (F, H, W, 3), uint8, RGB.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise ValueError(f"frames of shape {frames.shape} and {frames.dtype}: expected (F, H, W, 3) of uint8")
        if len(frames) == 1:
            return Displacement.none(1, frames.shape[1], frames.shape[2], self.reference)
        found = self.estimate(frames)
        if not bool(torch.isfinite(found.vectors).all()):
            raise UsageError(
                f"{type(self).__name__} gave displacements that are not finite", "finite ones", "check its weights"
            )
        return compensate_camera(found) if self.camera == "remove" else found

    def key(self) -> dict[str, Any]:
        """All that the displacement depends on beside the frames, as plain values."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n not in ("self", "device")]
        return {"estimator": type(self).__name__, "version": VERSION, **{n: getattr(self, n) for n in names}}


class FlowEstimator(MotionEstimator):
    """Frame-to-frame optical flow. A subclass gives :meth:`flow` of one pair.

    Args:
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
        occlusion: Estimate the flow both ways, and take pixels that don't come back for hidden. Costs twice the time; otherwise
            all count as seen.
    """

    reference = "previous"

    def __init__(self, camera: Literal["keep", "remove"] = "keep", occlusion: bool = False) -> None:
        super().__init__(camera)
        self.occlusion = occlusion

    @abstractmethod
    def flow(self, first: np.ndarray, second: np.ndarray) -> Tensor:
        """Where every pixel of the first frame goes until the second, (2, H, W) in pixels, x first.

        Args:
            first: (H, W, 3), uint8, RGB.
            second: Likewise.
        """

    def estimate(self, frames: Frames) -> Displacement:
        back = [self.flow(frames[i], frames[i - 1]) for i in range(1, len(frames))]
        there = self.flow(frames[0], frames[1])
        vectors = torch.stack([there, *(-flow for flow in back)])
        seen = torch.ones(len(frames), *frames.shape[1:3])
        if not self.occlusion:
            return Displacement(vectors, seen, seen.clone(), "previous")
        away = [there, *(self.flow(frames[i - 1], frames[i]) for i in range(2, len(frames)))]
        errors = [_round_trip(there, back[0])] + [_round_trip(b, a) for b, a in zip(back, away, strict=True)]
        error = torch.stack(errors)
        # The usual test of forward against backward flow (Sundaram et al. 2010), with its two numbers.
        size = vectors.square().sum(1)
        return Displacement(vectors, (error <= 0.01 * size + 0.5).float(), torch.exp(-error), "previous")


def _round_trip(there: Tensor, back: Tensor) -> Tensor:
    """Squared distance of each pixel from where it began, once it has gone there and back; large where it leaves the picture."""
    _, height, width = there.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    to_x, to_y = x + there[0], y + there[1]
    grid = torch.stack([2.0 * to_x / max(width - 1, 1) - 1.0, 2.0 * to_y / max(height - 1, 1) - 1.0], -1)
    returned = torch.nn.functional.grid_sample(back[None], grid[None], align_corners=True)[0]
    error = (there + returned).square().sum(0)
    outside = (to_x < 0) | (to_x > width - 1) | (to_y < 0) | (to_y > height - 1)
    return torch.where(outside, torch.full_like(error, 1e6), error)


class DIS(FlowEstimator):
    """OpenCV's dense inverse search: the default, since it needs no weights.

    Args:
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
        occlusion: Estimate the flow both ways, and take pixels that don't come back for hidden.
        preset: How thorough: ``ultrafast``, ``fast`` or ``medium``.
        side: Pictures whose shorter side is below so many pixels are enlarged to it first: its smallest patch is 16 pixels of the
            picture, and on things of that size it is off by half. 0 takes every picture as it is.
    """

    def __init__(
        self,
        camera: Literal["keep", "remove"] = "keep",
        occlusion: bool = False,
        preset: Literal["ultrafast", "fast", "medium"] = "medium",
        side: int = 256,
    ) -> None:
        super().__init__(camera, occlusion)
        if preset not in ("ultrafast", "fast", "medium"):
            raise UsageError(f"DIS preset is {preset!r}", "ultrafast, fast or medium")
        if side < 0:
            raise UsageError(f"DIS side is {side}", "0 or a number of pixels")
        self.preset, self.side = preset, side

    def flow(self, first: np.ndarray, second: np.ndarray) -> Tensor:
        """By an estimator made anew: one that has seen a small picture keeps its finest scale for all later ones."""
        import cv2

        make: Any = getattr(cv2, "DISOpticalFlow_create")  # noqa: B009 (OpenCV's stubs leave it out)
        preset = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}")
        grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
        height, width = grey[0].shape
        factor = max(1.0, self.side / min(height, width))
        size = (round(width * factor), round(height * factor))
        if factor > 1.0:
            grey = [cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC) for picture in grey]
        flow = make(preset).calc(*grey, None)
        if factor > 1.0:
            flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA)
            flow *= np.array([width / size[0], height / size[1]], np.float32)
        return torch.from_numpy(flow).permute(2, 0, 1).contiguous()


def compensate_camera(found: Displacement, threshold: float = 1.0) -> Displacement:
    """What is left of a displacement without the affine motion that most pixels of a frame follow (fitted by RANSAC).

    Args:
        found: A displacement.
        threshold: Pixels within which a place follows the motion.
    """
    import cv2

    _, _, height, width = found.vectors.shape
    step = max(1, min(height, width) // 48)
    y, x = np.mgrid[0:height:step, 0:width:step]
    start = np.stack([x, y], -1).reshape(-1, 2).astype(np.float64)
    all_y, all_x = np.mgrid[0:height, 0:width].astype(np.float64)
    left = []
    for vectors in found.vectors.double().numpy():
        way = vectors[:, ::step, ::step].reshape(2, -1).T
        # OpenCV begins its random choices anew in every call, so the fit is the same every time.
        matrix, _ = cv2.estimateAffine2D(start, start + way, method=cv2.RANSAC, ransacReprojThreshold=threshold)
        if matrix is None:
            raise UsageError(
                "no affine camera motion can be fitted to a frame", "a picture that is more than a few pixels wide"
            )
        camera = np.stack(
            [
                matrix[0, 0] * all_x + matrix[0, 1] * all_y + matrix[0, 2] - all_x,
                matrix[1, 0] * all_x + matrix[1, 1] * all_y + matrix[1, 2] - all_y,
            ]
        )
        left.append(torch.from_numpy(vectors - camera).float())
    return replace(found, vectors=torch.stack(left))
