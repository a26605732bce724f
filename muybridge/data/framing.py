"""How a picture is brought to a clip's size: scaled to cover it and cropped, or scaled to fit into it and padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np

from muybridge.data.decoding import Size, resize
from muybridge.video import Frames

Framing = Literal["crop", "letterbox"]
Region = tuple[int, int, int, int]
"""Left, right, top, bottom in pixels of the source."""


@dataclass(frozen=True)
class Placement:
    """Where a scaled picture goes. Nothing is stretched: both sides are scaled alike, up to whole pixels.

    Args:
        scaled: Size that the whole source picture is scaled to.
        source: Left, right, top and bottom of what is taken of it.
        target: Top left corner (row, column) of where that goes.
        size: Size of the result; black where nothing goes.
    """

    scaled: Size
    source: Region
    target: tuple[int, int]
    size: Size

    @property
    def kept(self) -> int:
        """Pixels of the result that hold picture."""
        left, right, top, bottom = self.source
        return (right - left) * (bottom - top)


def place(source: Size, size: Size, framing: Framing = "crop", region: Optional[Region] = None) -> Placement:
    """The placement of a source picture in a clip.

    Args:
        source: Height and width of the source.
        size: Height and width of the clip.
        framing: ``crop`` loses what sticks out at two sides, ``letterbox`` adds black bars.
        region: The part of the source that may be used.
    """
    height, width = size
    left, right, top, bottom = region or (0, source[1], 0, source[0])
    rows, columns = bottom - top, right - left
    scale = (max if framing == "crop" else min)(height / rows, width / columns)

    def pixels(side: int, limit: int, step: int = 1) -> int:
        rounded = round(side * scale)
        if rounded != limit:
            rounded = step * round(side * scale / step)
        return max(rounded, limit) if framing == "crop" else max(min(rounded, limit), 1)

    # The part is rounded to whole pixels first, then the picture around it, so that crop always covers the clip. Decoders take a
    # quarter longer to scale to an odd width.
    inner = (pixels(rows, height), pixels(columns, width, 2))
    scaled = (max(round(source[0] * inner[0] / rows), inner[0]), max(round(source[1] * inner[1] / columns), inner[1]))
    y = min(round(top * inner[0] / rows), scaled[0] - inner[0])
    x = min(round(left * inner[1] / columns), scaled[1] - inner[1])
    taken = (min(inner[0], height), min(inner[1], width))
    y, x = y + (inner[0] - taken[0]) // 2, x + (inner[1] - taken[1]) // 2
    return Placement(
        scaled=scaled,
        source=(x, x + taken[1], y, y + taken[0]),
        target=((height - taken[0]) // 2, (width - taken[1]) // 2),
        size=(height, width),
    )


def decode_size(source: Size, placement: Placement) -> Size:
    """The size to let the decoder scale to: the placement's where it shrinks, so that large pictures are never held whole."""
    shrinks = placement.scaled[0] <= source[0] and placement.scaled[1] <= source[1]
    return placement.scaled if shrinks else source


def apply(frames: Frames, placement: Placement) -> Frames:
    """Frames of any size to a clip's frames."""
    frames = resize(frames, placement.scaled)
    left, right, top, bottom = placement.source
    taken = frames[:, top:bottom, left:right]
    if taken.shape[1:3] == placement.size:
        return np.ascontiguousarray(taken)
    out = np.zeros((len(frames), *placement.size, 3), np.uint8)
    y, x = placement.target
    out[:, y : y + taken.shape[1], x : x + taken.shape[2]] = taken
    return out
