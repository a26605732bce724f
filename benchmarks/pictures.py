"""The README's picture: one clip of each of the proving ground's motions, nine frames each.

    python benchmarks/pictures.py

Writes docs/images/clips.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from muybridge.proving_ground import MOTIONS, World, draw_scene, render
from muybridge.video import contact_sheet, write_image

OUT = Path(__file__).parent.parent / "docs/images/clips.png"


def main() -> None:
    world = World(size=64, frames=17, anti_leak=False)
    clips = [render(draw_scene(world, 3, i, motion=motion)) for i, motion in enumerate(MOTIONS)]
    half = len(clips) // 2
    write_image(OUT, np.concatenate([contact_sheet(clips[:half], 9), contact_sheet(clips[half:], 9)], axis=1))
    print(OUT)


if __name__ == "__main__":
    main()
