"""A small world where the truth about motion is known: clips, their flow, tracks and laws, all from a seed."""

from muybridge.proving_ground.appearance import COLOURS, GROUNDS, SHAPES, TEXTURES, Appearance
from muybridge.proving_ground.captions import join_caption, look_of, motion_of, split_caption
from muybridge.proving_ground.files import read_truth, write_clips
from muybridge.proving_ground.motions import MOTIONS, STATIC
from muybridge.proving_ground.render import Truth, render, render_with_truth
from muybridge.proving_ground.scene import Scene, World, draw_scene

__all__ = [
    "COLOURS",
    "GROUNDS",
    "MOTIONS",
    "SHAPES",
    "STATIC",
    "TEXTURES",
    "Appearance",
    "Scene",
    "Truth",
    "World",
    "draw_scene",
    "join_caption",
    "look_of",
    "motion_of",
    "read_truth",
    "render",
    "render_with_truth",
    "split_caption",
    "write_clips",
]
