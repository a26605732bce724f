"""Captions whose words for the subject and for the motion are kept apart: ``a red star | rolls to the right``."""

from __future__ import annotations

from collections.abc import Mapping

from muybridge.errors import UsageError
from muybridge.proving_ground.appearance import COLOURS, SHAPES

BAR = " | "
WORDS = {
    "compress": "is squeezed",
    "bounce": "bounces up and down",
    "roll": "rolls",
    "explode": "bursts into pieces",
    "float": "floats gently",
    "free fall": "falls freely",
    "slide": "slides",
    "spin": "spins on the spot",
    "stretch": "is stretched",
    "swing": "swings like a pendulum",
    "static": "stays still",
}
"""What a caption says of each motion."""


def join_caption(subject: str, motion: str) -> str:
    """The caption of a subject and what it does."""
    for words in (subject, motion):
        if not words.strip() or "|" in words:
            raise UsageError(f"{words!r} is to be half of a caption", "words without a bar, at least one")
    return f"{subject.strip()}{BAR}{motion.strip()}"


def split_caption(caption: str) -> tuple[str, str]:
    """Subject and motion of a caption; the inverse of :func:`join_caption`."""
    halves = caption.split(BAR)
    if len(halves) != 2 or not all(half.strip() for half in halves):
        raise UsageError(f"the caption {caption!r}", "a subject and a motion with a bar between", "a red star | rolls")
    return halves[0].strip(), halves[1].strip()


def subject_words(shape: str, colour: str) -> str:
    """``an orange disk``."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def motion_words(motion: str, parameters: Mapping[str, float], backwards: bool = False) -> str:
    """``rolls to the right``: the motion's word, and the direction where the law has one."""
    words = WORDS[motion]
    if "direction" in parameters:
        words += " to the right" if parameters["direction"] > 0 else " to the left"
    if "omega" in parameters:
        words += " clockwise" if parameters["omega"] > 0 else " counterclockwise"
    if "axis" in parameters:
        words += " sideways" if parameters["axis"] == 0 else " vertically"
    return words + (", backwards" if backwards else "")


def motion_of(caption: str) -> str:
    """Which motion a caption asks for."""
    words = split_caption(caption)[1]
    found = [name for name, start in WORDS.items() if words.startswith(start)]
    if not found:
        raise UsageError(f"the caption {caption!r} names no motion", f"one that begins {', '.join(WORDS.values())}")
    return found[0]


def look_of(caption: str) -> tuple[str, str]:
    """Which shape and which colour a caption asks for."""
    words = split_caption(caption)[0].split()
    shapes, colours = ([name for name in names if name in words] for names in (SHAPES, COLOURS))
    if len(shapes) != 1 or len(colours) != 1:
        raise UsageError(
            f"the caption {caption!r}",
            f"one shape of {', '.join(SHAPES)} and one colour of {', '.join(COLOURS)}",
            "a red star | rolls",
        )
    return shapes[0], colours[0]
