"""Clips of a small world where the truth about motion is known."""

from __future__ import annotations

from typing import Optional


def proving_ground(
    *,
    clips: int = 2000,
    out: str = "runs/proving-ground",
    size: int = 64,
    frames: int = 17,
    longest: int = 0,
    anti_leak: bool = True,
    camera: float = 0.0,
    distractors: int = 0,
    static: float = 0.0,
    backwards: float = 0.0,
    motions: Optional[list[str]] = None,
    shapes: Optional[list[str]] = None,
    colours: Optional[list[str]] = None,
    textures: Optional[list[str]] = None,
    backgrounds: Optional[list[str]] = None,
    scale: float = 1.0,
    pace: float = 1.0,
    validation: float = 0.1,
    truth: bool = False,
    fps: float = 8.0,
    seed: int = 0,
    model: Optional[str] = None,
) -> None:
    """Write clips of ten motions whose law is known: mp4 files, tables with captions, and where asked for flow and tracks.

    Args:
        clips: How many; a folder that holds some is continued.
        out: The folder.
        size: Height and width in pixels.
        frames: Frames of a clip.
        longest: With this, clips have from ``frames`` to so many frames.
        anti_leak: No single frame tells the motion; false gives the natural world of floors and falls from rest.
        camera: Share of clips whose camera moves.
        distractors: Grey things that drift behind the sprite, in every clip.
        static: Share of clips in which nothing moves.
        backwards: Share of clips that are shown last frame first.
        motions: Which of the ten there are; none given is all, likewise with the next four.
        shapes: Of the sprite.
        colours: Of the sprite.
        textures: Of the sprite.
        backgrounds: Behind it.
        scale: Size of sprites against the usual, 0.5 to 1.3.
        pace: Speed of what bounces, spins, swings, floats or bursts, against the usual, 0.6 to 1.5.
        validation: Share of clips whose pair of shape and colour no training clip has.
        truth: Write flow, visibility, masks and tracks beside each clip.
        fps: Frames per second of the files.
        seed: Of all that is drawn.
        model: Write the untrained pipeline to this directory, and no clips.
    """
    if model is not None:
        from muybridge.export import fresh_directory, settle
        from muybridge.permissions import as_usual
        from muybridge.proving_ground.pipeline import untrained

        final, partial = fresh_directory(model)
        untrained(seed).save_pretrained(str(partial), safe_serialization=True)
        as_usual(partial)
        print(f"untrained pipeline: {settle(partial, final)}")
        return
    from muybridge.progress import Progress
    from muybridge.proving_ground.files import write_clips
    from muybridge.proving_ground.scene import World

    world = World.of(
        size=size,
        frames=frames,
        longest=longest,
        anti_leak=anti_leak,
        camera=camera,
        distractors=distractors,
        static=static,
        backwards=backwards,
        motions=motions,
        shapes=shapes,
        colours=colours,
        textures=textures,
        backgrounds=backgrounds,
        scale=scale,
        pace=pace,
    )
    with Progress("clips", clips, every=10.0) as progress:
        drawn = write_clips(out, world, clips, seed, validation, fps, truth, progress.advance)
    kept = sum(scene.appearance.held_out for scene in drawn)
    print(f"clips: {len(drawn)} in {out}, {kept} of them for validation; {out}/train.parquet lists the others")
