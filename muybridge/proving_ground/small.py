"""The world of the model that ships: small enough that a laptop trains a good teacher of it."""

from __future__ import annotations

import json
from dataclasses import fields

from muybridge.proving_ground.scene import World

SMALL = World(
    size=32,
    frames=9,
    anti_leak=False,
    motions=("bounce", "free fall", "slide", "spin", "stretch", "swing"),
    shapes=("disk", "square", "triangle", "star", "ring"),
    textures=("half",),
    backgrounds=("grey",),
    scale=1.25,
    pace=0.7,
)


def as_options(world: World, usual: World | None = None, before: str = "--") -> list[str]:
    """What `muybridge proving-ground` is told to draw this world; what is as usual is left out.

    Args:
        world: The one that is wanted.
        usual: The one that is drawn where nothing is said; ``World()`` where not given.
        before: Goes before the name of each option.
    """
    usual, options = usual or World(), []
    for field in fields(World):
        value = getattr(world, field.name)
        if value != getattr(usual, field.name):
            options.append(f"{before}{field.name}={json.dumps(value) if not isinstance(value, str) else value}")
    return options
