"""From a clip to the noise that it would come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Optional

if TYPE_CHECKING:
    from muybridge.data.clips import Clip


def invert(
    *,
    model: str,
    videos: str,
    out: str = "runs/inverted",
    caption: Optional[str] = None,
    prompt: Literal["caption", "empty"] = "caption",
    steps: int = 50,
    order: Literal["euler", "midpoint"] = "euler",
    refinements: Optional[int] = None,
    guidance: float = 1.0,
    frames: Optional[int] = None,
    height: Optional[int] = None,
    width: Optional[int] = None,
    fps: Optional[float] = None,
    keep_bar: bool = False,
    check: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Optional[str] = None,
) -> None:
    """Write the noise that a model's own deterministic sampler would make each clip of, with what made it.

    Args:
        model: Directory of a diffusers pipeline, or a hub id.
        videos: A video, a folder of videos with .txt captions beside them, or a table.
        out: Folder for one .safetensors file per clip; clips that are there already are kept.
        caption: The caption, where ``videos`` is one video: ``a man | runs to the left``.
        prompt: Invert under each clip's own caption, or under the empty prompt as several published methods do.
        steps: Places on the way from clip to noise.
        order: ``euler`` (DDIM for variance-preserving families), or ``midpoint`` with two network calls a step, which pays
            where the model predicts a velocity and may lose where it predicts noise.
        refinements: Fixed-point iterations of each Euler step, one network call each; 2 where not given.
        guidance: Standard guidance; other values than 1 make inversion unstable.
        frames: Frames of a clip; the family's usual number where not given.
        height: Height in pixels; likewise.
        width: Width in pixels; likewise.
        fps: Frames per second; each video's own where not given.
        keep_bar: Give the text encoder captions with their bar, for models that were trained so.
        check: Sample back from the noise and report how far the result is from the clip.
        dtype: Of the network.
        device: Such as ``cuda:1``; the first GPU where there is one, where not given.
    """
    from pathlib import Path

    from muybridge.backbones import pick_family
    from muybridge.cli.devices import open_model
    from muybridge.customization.inverted import How, Inverted, about, invert_clip, refuse_other, write_inverted
    from muybridge.customization.references import clip_size, list_references, read_reference, spoken
    from muybridge.diffusion.inversion import calls, check_method, ladder, usual_refinements
    from muybridge.progress import Progress

    how = How(steps, order, usual_refinements(order) if refinements is None else refinements, guidance)
    described = pick_family(model)(path=model)
    ladder(described.schedule, steps)
    check_method(described.schedule, order, how.refinements)
    size = clip_size(described, frames, height, width)
    clips = list_references(videos, caption)
    targets = {clip.id: Path(out) / f"{clip.id}.safetensors" for clip in clips}
    waiting = [clip for clip in clips if not targets[clip.id].is_file()]

    def made_of(clip: Clip, **more: Any) -> dict[str, Any]:
        words = spoken(clip.caption or "", keep_bar) if prompt == "caption" else ""
        return about(described, clip.id, words, how, size, video=str(clip.path), fps=fps, dtype=dtype, **more)

    for clip in clips:
        if targets[clip.id].is_file():
            refuse_other(targets[clip.id], made_of(clip))
    if len(waiting) < len(clips):
        print(f"{len(clips) - len(waiting)} of {len(clips)} are in {out} already")
    references = {clip.id: read_reference(clip, size, fps) for clip in waiting[:1]}
    if not waiting:
        return
    backbone = open_model(model, dtype, device)
    total = len(waiting) * (steps + (steps if check else 0))
    errors = []
    with Progress("inversion steps", total, every=10.0) as progress:
        for clip in waiting:
            reference = references.pop(clip.id, None) or read_reference(clip, size, fps)
            backbone.set_frame_rate(reference.fps)
            clean = backbone.encode(reference.pixels[None].to(backbone.device))
            prompted = made_of(clip)["prompt"]
            states, error = invert_clip(backbone, clean, prompted, how, check, lambda *_: progress.advance())
            errors.append(error)
            said = made_of(clip, caption=reference.caption, round_trip_error=error)
            write_inverted(targets[clip.id], Inverted(states[-1][0], clean[0], said))
    print(f"inverted: {len(waiting)} clips in {out}, {calls(steps, order, how.refinements)} network calls each")
    if check:
        known = [error for error in errors if error is not None]
        print(f"error of the round trip: {sum(known) / len(known):.2%} on average, {max(known):.2%} at most")
