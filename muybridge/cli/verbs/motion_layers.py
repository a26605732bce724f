"""Which layers' attention knows motion."""

from __future__ import annotations

from typing import Literal, Optional


def motion_layers(
    *,
    model: str,
    videos: str,
    out: str = "runs/motion-layers",
    times: list[float] = [500.0, 700.0, 900.0],  # noqa: B006
    frames: Optional[int] = None,
    height: Optional[int] = None,
    width: Optional[int] = None,
    fps: Optional[float] = None,
    limit: Optional[int] = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Optional[str] = None,
) -> None:
    """Rank a model's attention layers by how well their maps find clips of the same motion, against latents and pixels.

    Writes a table of average precisions per layer and noise level, and the layers that motion feature matching should read.

    Args:
        model: Directory of a diffusers pipeline, or a hub id.
        videos: A folder or table of clips with captions ``a man | runs``; several clips share the words of a motion.
        out: Folder for the table and the result.
        times: Noise levels as timesteps.
        frames: Frames of a clip; the family's usual number where not given.
        height: Height in pixels; likewise.
        width: Width in pixels; likewise.
        fps: Frames per second; each video's own where not given.
        limit: Take only so many clips.
        seed: Of the one noise of all clips.
        dtype: Of the network.
        device: Such as ``cuda:1``; the first GPU where there is one, where not given.
    """
    import csv
    import io
    import json
    from pathlib import Path

    from muybridge.backbones import pick_family
    from muybridge.cli.devices import open_model
    from muybridge.customization.references import clip_size, list_references, read_reference
    from muybridge.customization.retrieval import Key, as_regex, best_layers, describe, retrieve
    from muybridge.errors import UsageError
    from muybridge.progress import Progress
    from muybridge.proving_ground.captions import split_caption
    from muybridge.whole import write_text

    bad = [t for t in times if not 0.0 < t < 1000.0]
    if bad or not times:
        raise UsageError(f"times are {list(times)}", "timesteps above 0 and below 1000", "such as [500, 700, 900]")
    size = clip_size(pick_family(model)(path=model), frames, height, width)
    clips = list_references(videos)[:limit]
    motions = [split_caption(clip.caption or "")[1] for clip in clips]
    if len(set(motions)) in (1, len(motions)):
        raise UsageError(
            f"{len(clips)} clips of {len(set(motions))} motions", "several motions, and several clips of some of them"
        )
    backbone = open_model(model, dtype, device)
    described = []
    with Progress("clips", len(clips), every=10.0) as progress:
        for clip in clips:
            reference = read_reference(clip, size, fps)
            backbone.set_frame_rate(reference.fps)
            described.append(describe(backbone, reference, times, seed=seed))
            progress.advance()
    scores = retrieve(described, motions, seed)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["what", "layer", "time", "average_precision"])
    writer.writerows([*key, round(score, 6)] for key, score in sorted(scores.items()))
    root = Path(out)
    write_text(root / "retrieval.csv", table.getvalue())
    chosen = {what: best_layers(scores, what) for what in ("temporal", "cross")}
    layers = [*chosen["temporal"], *(name for name in chosen["cross"] if name not in chosen["temporal"])]
    chance = scores[Key("chance", "all", 0.0)]
    result = {
        "model": model,
        "clips": len(clips),
        "motions": sorted(set(motions)),
        "chance": chance,
        "layers": layers,
        "regex": as_regex(layers),
        **{
            what: {str(k.time): v for k, v in scores.items() if (k.what, k.layer) == (what, "all")}
            for what in ("temporal", "cross", "both", "noisy latents", "latents", "pixels")
        },
    }
    write_text(root / "retrieval.json", json.dumps(result, indent=2) + "\n")
    for what in ("temporal", "cross", "both", "noisy latents", "latents", "pixels"):
        best = max((v for k, v in scores.items() if (k.what, k.layer) == (what, "all")), default=None)
        if best is not None:
            print(f"{what:<14} {best:6.1%}")
    print(f"{'chance':<14} {chance:6.1%}")
    print(f"layers: {as_regex(layers) or 'none above chance'}")
    print(f"table and result: {root}")
