"""Where motion lives in a model's sampling."""

from __future__ import annotations

from typing import Any, Literal, Optional

from muybridge.begun import begin
from muybridge.errors import UsageError


def probe(
    *,
    model: str,
    videos: str,
    out: str = "runs/probe",
    caption: Optional[str] = None,
    subject: Optional[str] = None,
    motion: Optional[str] = None,
    swaps: list[Literal["subject", "motion", "noise"]] = ["subject"],  # noqa: B006
    boundaries: int = 10,
    steps: int = 50,
    order: Literal["euler", "midpoint"] = "euler",
    refinements: Optional[int] = None,
    guidance: float = 1.0,
    frames: Optional[list[int]] = None,
    height: Optional[int] = None,
    width: Optional[int] = None,
    fps: Optional[float] = None,
    limit: Optional[int] = None,
    alignment: Literal["model", "clip", "reader"] = "model",
    clip_model: Optional[str] = None,
    keep_bar: bool = False,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Optional[str] = None,
) -> None:
    """Find the time above which a model settles how things move and below which it settles how they look.

    Clips are inverted, and sampled again with other words in the prompt during a part of the sampling. Run it again after it was
    stopped: clips that are done are kept. A config takes the result as ``tau: {from_probe: FOLDER}``.

    Args:
        model: Directory of a diffusers pipeline, or a hub id.
        videos: A video, a folder of videos with .txt captions beside them, or a table; captions are ``a man | runs to the left``.
        out: Folder for the table, the pictures and the result.
        caption: The caption, where ``videos`` is one video.
        subject: The new subject; where not given, that of the nearest clip before it that has another, or else after it.
        motion: The new motion, for the swap ``motion``; likewise.
        swaps: What is tampered with. ``subject`` is the probe; ``motion`` (its words) and ``noise`` (no words) are cross-checks.
        boundaries: Equal parts of the steps.
        steps: Of inversion and sampling.
        order: ``euler``, or ``midpoint`` with two network calls a step.
        refinements: Fixed-point iterations of each Euler step of the inversion; 2 where not given.
        guidance: Standard guidance of the sampling; the inversion has none.
        frames: Frames of a clip; several lengths are probed one after another. The family's usual number where not given.
        height: Height in pixels; likewise.
        width: Width in pixels; likewise.
        fps: Frames per second; each video's own where not given.
        limit: Take only so many clips.
        alignment: What says how much a result is like the new words: the ``model`` itself, ``clip``, or the proving ground's
            ``reader``.
        clip_model: Directory of a CLIP model.
        keep_bar: Give the text encoder captions with their bar, for models that were trained so.
        seed: Of fresh noise.
        dtype: Of the network.
        device: Such as ``cuda:1``; the first GPU where there is one, where not given.
    """
    from dataclasses import asdict
    from pathlib import Path

    from muybridge.backbones import pick_family
    from muybridge.cli.devices import open_model
    from muybridge.customization import report
    from muybridge.customization.inverted import How
    from muybridge.customization.probe import SWAPS, Settings, marks, network_steps, probe_clip, target_caption
    from muybridge.customization.references import clip_size, list_references, read_reference
    from muybridge.customization.scores import check_alignment, make_alignment
    from muybridge.diffusion.inversion import check_method, ladder, usual_refinements
    from muybridge.progress import Progress

    unknown = [s for s in swaps if s not in SWAPS]
    if unknown or not swaps or len(set(swaps)) < len(swaps):
        raise UsageError(f"swaps are {list(swaps)}", f"some of {', '.join(SWAPS)}, each once")
    how = How(steps, order, usual_refinements(order) if refinements is None else refinements)
    settings = Settings(how, boundaries, guidance, keep_bar, seed)
    described = pick_family(model)(path=model)
    ladder(described.schedule, steps)
    check_method(described.schedule, order, how.refinements)
    marks(steps, boundaries)
    sizes = [clip_size(described, f, height, width) for f in (frames or [None])]  # type: ignore[list-item]
    clips = list_references(videos, caption)[:limit]
    captions = [clip.caption or "" for clip in clips]
    work = []
    for swap in swaps:
        for size in sizes:
            for i, clip in enumerate(clips):
                # Those before first: clips that are added later leave the words of the others as they are.
                others = [*reversed(captions[:i]), *captions[i + 1 :]]
                work.append((swap, size, clip, target_caption(captions[i], others, swap, subject, motion)))
    check_alignment(
        alignment, clip_model, [words for *_, clip, target in work for words in (clip.caption or "", target)]
    )
    root = Path(out)
    about = {
        "model": model,
        "videos": videos,
        "dtype": dtype,
        "family": described.family,
        **asdict(settings),
        "alignment": alignment,
        "height": sizes[0][1],
        "width": sizes[0][2],
        "fps": fps,
        "subject": subject,
        "motion": motion,
    }
    begin(root / report.SETTINGS, about, "cells", usual={"videos": videos, "dtype": dtype})

    def file_of(swap: str, size: tuple[int, int, int], name: str) -> Path:
        return root / "cells" / f"{name.replace('/', '__')}.{size[0]}f.{swap}.csv"

    left = []
    for swap, size, clip, target in work:
        file = file_of(swap, size, clip.id)
        if not file.is_file():
            left.append((swap, size, clip, target))
        else:
            report.refuse_other_words(file, target)
    if len(left) < len(work):
        print(f"{len(work) - len(left)} of {len(work)} grids are in {out} already")
    if left:
        read_reference(left[0][2], left[0][1], fps)
    backbone = open_model(model, dtype, device) if left else described
    scorer = make_alignment(alignment, backbone, clip_model, keep_bar) if left else None
    total = sum(network_steps(steps, boundaries, swap, guidance) + steps for swap, *_ in left)
    with Progress("network steps", total, every=10.0) as progress:
        for swap, size, clip, target in left:
            assert scorer is not None
            reference = read_reference(clip, size, fps)
            backbone.set_frame_rate(reference.fps)
            cells = probe_clip(backbone, reference, target, swap, settings, scorer, progress.advance)
            report.write_cells(file_of(swap, size, clip.id), cells)
    cells = [c for swap, size, clip, _ in work for c in report.read_cells(file_of(swap, size, clip.id))]
    result = report.conclude(root, cells, backbone, about)
    for part in (result, *result["cross_checks"]):
        say(part)
    print(f"table, pictures and result: {root}")


def say(part: dict[str, Any]) -> None:
    """One line for one swap at one length."""
    head = f"{part['swap']} at {part['frames']} frames, {part['clips']} clips:"
    if part["tau"] is None:
        print(f"{head} no boundary ({part['reason']})")
        return
    spread = f", spread {part['spread']:.0f} between clips" if part["spread"] is not None else ""
    level = part["logsnr"] if isinstance(part["logsnr"], str) else f"{part['logsnr']:.2f}"
    print(f"{head} tau {part['tau']:.0f}, logSNR {level}{spread}, clarity {part['clarity']:.2f}")
