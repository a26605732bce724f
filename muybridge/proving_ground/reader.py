"""What a clip shows, read from its pixels alone: which motion, which shape, which colour.

- **Motion**: the coloured thing is tracked; its place, extents and angle over time, brought to 17 moments whatever the clip's
  length and freed from where it is, go through a small network. It sees no pixel, so that no look can tell a motion.
- **Shape**: pictures of it, brought to one size and proportion, go through a small network that sees no hue.
- **Colour**: all that is coloured is added up, and lies nearest to one direction of the palette.

The networks are trained on clips of the world as drawn and as damaged by blur, noise and compression, and shipped with the
package beside a card that says how they were made and how well they read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from muybridge.errors import UsageError
from muybridge.permissions import as_usual
from muybridge.proving_ground.appearance import COLOURS, SHAPES
from muybridge.proving_ground.motions import MOTIONS, STATIC
from muybridge.proving_ground.tracking import Track, saturation, track
from muybridge.video import Frames
from muybridge.whole import whole

OTHER = "other"
"""Read of what moves like none of the ten, and of clips without anything to see."""
READS = (*MOTIONS, STATIC, OTHER)
"""What a motion is read as."""
MOMENTS = 17
"""Points in time of a descriptor, the first frame and the last among them."""
CHANNELS = 11
VIEWS, SIDE, REACH = 8, 24, 3.0
"""Pictures of the sprite in a clip, their side in pixels, and how far they reach, in standard deviations of the sprite."""
WEIGHTS = Path(__file__).with_name("reader.safetensors")
CARD = Path(__file__).with_name("reader.json")


@dataclass(frozen=True)
class Reading:
    """What was read of one clip.

    Args:
        motion: One of ``READS``.
        shape: One of ``SHAPES``; None where nothing coloured is to be seen throughout.
        colour: One of ``COLOURS``, or None likewise.
        features: What the motion was read from, (64,).
        certainty: Probability of the motion that was read.
    """

    motion: str
    shape: Optional[str]
    colour: Optional[str]
    features: np.ndarray
    certainty: float


# -- what the networks are given -----------------------------------------------------------------------------------


def kinematics(seen: Track) -> np.ndarray:
    """A clip's motion without its look, (CHANNELS, MOMENTS), float32.

    Time goes from the first frame to the last, so that a clip shown at half speed has the same. Places, logarithms of extents
    and angles are about their means; the angle is also in units of the way that something of this size rolls by it. The last
    channel is the size itself.
    """
    values = np.linalg.eigvalsh(seen.moments)
    minor, major = 0.5 * np.log(np.maximum(values, 1e-6)).T
    radius = 1.4 * float(np.sqrt(np.median(np.maximum(values.sum(-1), 1e-6))))
    raw = np.stack([seen.x, seen.y, np.log(np.maximum(seen.area, 1e-4)), minor, major, seen.angle])
    at, moments = np.linspace(0.0, 1.0, raw.shape[1]), np.linspace(0.0, 1.0, MOMENTS)
    even = np.stack([np.interp(moments, at, line) for line in raw])
    even -= even.mean(1, keepdims=True)
    x, y, area, minor, major, angle = even
    rolled = np.clip(angle, -9.0, 9.0)
    found = [
        8.0 * x,
        8.0 * y,
        50.0 * np.gradient(x),
        50.0 * np.gradient(y),
        4.0 * area,
        4.0 * minor,
        4.0 * major,
        rolled / 1.5,
        3.0 * np.gradient(rolled),
        8.0 * rolled * radius,
        np.full(MOMENTS, 10.0 * (radius - 0.12)),
    ]
    return np.clip(np.stack(found), -6.0, 6.0).astype(np.float32)


def mirrored(kinematic: Tensor) -> Tensor:
    """The kinematics of clips seen in a mirror: x and the angle change sign."""
    sign = torch.ones(CHANNELS)
    sign[[0, 2, 7, 8, 9]] = -1.0
    return kinematic * sign[:, None]


def pictures(frames: Frames, seen: Track, views: int = VIEWS) -> np.ndarray:
    """The sprite in some frames, (views, SIDE, SIDE, 3), uint8, where its spread is one in all directions.

    All shapes have a spread that is, undeformed, the same in all directions; undoing what makes it not undoes the deformation.
    """
    import cv2

    side = max(frames.shape[1:3])
    found = np.empty((views, SIDE, SIDE, 3), np.uint8)
    for slot, t in enumerate(np.round(np.linspace(0, len(frames) - 1, views)).astype(int)):
        values, vectors = np.linalg.eigh(seen.moments[t])
        # What is thinner than a third of its length is a fault of tracking.
        least = max((0.7 * seen.pixel) ** 2, values[1] / 9.0)
        root = vectors @ np.diag(np.sqrt(np.maximum(values, least))) @ vectors.T
        step = root * (2.0 * REACH / SIDE) * side
        corner = np.array([seen.x[t], seen.y[t]]) * side - 0.5 - step @ np.full(2, (SIDE - 1) / 2)
        matrix = np.concatenate([step, corner[:, None]], 1)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        found[slot] = cv2.warpAffine(frames[t], matrix, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return found


def without_hue(images: Tensor) -> Tensor:
    """Greatest channel, saturation, and their ratio of pictures (..., H, W, 3), uint8: (..., 3, H, W)."""
    values = images.float() / 255.0
    light, dark = values.amax(-1), values.amin(-1)
    return torch.stack([2.0 * light - 1.0, 2.0 * (light - dark) - 0.5, 2.0 * (light - dark) / (light + 0.1) - 0.5], -3)


def _chroma(colour: np.ndarray) -> np.ndarray:
    """Colours (..., 3) without their grey, as (..., 2)."""
    red, green, blue = np.moveaxis(np.asarray(colour, np.float64), -1, 0)
    return np.stack([(2.0 * red - green - blue) / 6.0**0.5, (green - blue) / 2.0**0.5], -1)


def colour_of(frames: Frames) -> str:
    """The colour of the palette whose hue is nearest to that of all that is coloured, added up.

    A blur and noise leave the sum as it is, and a grey ground adds nothing to it.
    """
    weight = np.clip((saturation(frames) - 0.10) / 0.10, 0.0, 1.0)
    total = _chroma(np.einsum("thw,thwc->c", weight, frames / 255.0))
    palette = _chroma(np.array(list(COLOURS.values())))
    near = palette @ total / np.linalg.norm(palette, axis=-1)
    return tuple(COLOURS)[int(near.argmax())]


# -- the networks --------------------------------------------------------------------------------------------------


class MotionNet(nn.Module):
    """Kinematics to the motion's logits and the features before them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(CHANNELS, 48, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(48, 48, 5, padding=2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(48 * 9, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, len(READS))

    def forward(self, kinematic: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, len(READS)) and features (B, 64) of kinematics (B, CHANNELS, MOMENTS)."""
        features = self.body(kinematic)
        return self.head(features), features


class ShapeNet(nn.Module):
    """Pictures of a sprite to the shape's logits, the mean over a clip's pictures."""

    def __init__(self) -> None:
        super().__init__()

        def layer(given: int, made: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]

        self.body = nn.Sequential(
            *layer(3, 16, 1),
            *layer(16, 32, 2),
            *layer(32, 48, 2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(48 * (SIDE // 4) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, len(SHAPES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, len(SHAPES)) of pictures (B, V, SIDE, SIDE, 3), uint8."""
        batch, views = images.shape[:2]
        return self.body(without_hue(images).flatten(0, 1)).view(batch, views, -1).mean(1)


class Reader(nn.Module):
    """Both networks. ``Reader.shipped()`` is the one that all scores are read by."""

    def __init__(self) -> None:
        super().__init__()
        self.motion, self.shape = MotionNet(), ShapeNet()

    @staticmethod
    @functools.cache
    def shipped() -> Reader:
        """The reader of the package, the same object at every call."""
        return Reader.load(WEIGHTS)

    @staticmethod
    def load(path: str | Path) -> Reader:
        """A reader that :meth:`save` wrote."""
        from safetensors.torch import load_file

        file = Path(path)
        if not file.is_file():
            raise UsageError(
                f"{file} does not exist", "a reader's weights", "muybridge proving-ground-reader makes them"
            )
        made = Reader()
        made.load_state_dict(load_file(file))
        return made.eval()

    def save(self, path: str | Path) -> Path:
        """Write the weights."""
        from safetensors.torch import save_file

        with whole(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
            as_usual(temporary)
        return Path(path)

    @torch.no_grad()
    def read(self, clips: Sequence[Frames]) -> list[Reading]:
        """Read some clips, each (T, H, W, 3), uint8, of 5 frames or more."""
        if self.training:
            raise RuntimeError("a reader reads in eval mode; call .eval() first")
        found = []
        device = next(self.parameters()).device
        for frames in clips:
            _check(frames)
            seen = track(frames)
            logits, features = self.motion(torch.from_numpy(kinematics(seen))[None].to(device))
            likely = logits.softmax(-1)[0]
            best = int(likely.argmax())
            feature = features[0].cpu().numpy()
            if not seen.present:
                found.append(Reading(OTHER, None, None, feature, 1.0))
                continue
            shape = int(self.shape(torch.from_numpy(pictures(frames, seen))[None].to(device)).argmax())
            found.append(Reading(READS[best], SHAPES[shape], colour_of(frames), feature, float(likely[best])))
        return found


def _check(frames: Any) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UsageError(
            f"a clip {getattr(frames, 'shape', type(frames).__name__)} of {getattr(frames, 'dtype', 'no type')}",
            "an array (T, H, W, 3) of uint8",
            "muybridge.video.to_frames makes one of pixels in [-1, 1]",
        )
    if len(frames) < 5:
        raise UsageError(f"a clip of {len(frames)} frames", "5 or more, to tell motions apart")


def card() -> dict[str, Any]:
    """How the shipped reader was made, and its scores."""
    return dict(json.loads(CARD.read_text(encoding="utf-8")))
