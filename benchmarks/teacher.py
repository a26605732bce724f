"""How well the proving ground's trained pipeline shows what it is asked for, against real clips with the same captions.

    python benchmarks/teacher.py [--model DIR] [--prompts 504] [--steps 50] [--guidance 3.0] [--curve RUN ...] [--card DIR]

Captions are those of held-out clips: their pairs of shape and colour were never trained on, and motions take turns. Three rows:
real clips as drawn; the same after the pipeline's own autoencoder, which is what its denoiser could reach at best; and samples,
the noise of number i a function of the seed and i. Writes ``benchmarks/results/teacher.json`` and ``teacher.md``; with
``--curve`` the losses that runs logged, as ``teacher-curve.csv``; with ``--card`` the card that ships beside the weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from muybridge.backbones import load
from muybridge.diffusion.draws import keyed_noise
from muybridge.progress import Progress
from muybridge.proving_ground import Scene, draw_scene, render
from muybridge.proving_ground.scoring import Scores, read_clips
from muybridge.proving_ground.small import SMALL
from muybridge.video import Frames, to_frames, to_pixels

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = ("motion", "law", "colour", "shape", "all", "static", "absent", "law_score", "amount", "smoothness")
SEED = 7
"""Of the captions and of the noise; training clips have seed 0."""


def sample(backbone: Any, scenes: list[Scene], seed: int, steps: int, guidance: float, batch: int = 36) -> list[Frames]:
    """Clips for the captions of scenes."""
    frames: list[Frames] = []
    world_frames, size = scenes[0].frames, scenes[0].size
    shape = backbone.latent_shape(world_frames, size, size)
    with Progress("sampled", len(scenes), every=10.0) as progress:
        for start in range(0, len(scenes), batch):
            some = scenes[start : start + batch]
            noise = torch.stack([keyed_noise(shape, seed, "teacher", scene.name) for scene in some])
            with torch.no_grad():
                latents = backbone.sample(
                    noise, backbone.encode_text([scene.caption for scene in some]), steps=steps, guidance=guidance
                )
            frames += [to_frames(pixels) for pixels in backbone.decode(latents)]
            for _ in some:
                progress.advance()
    return frames


def rebuilt(backbone: Any, clips: list[Frames], batch: int = 36) -> list[Frames]:
    """Clips after encoder and decoder."""
    frames: list[Frames] = []
    for start in range(0, len(clips), batch):
        pixels = torch.stack([to_pixels(clip) for clip in clips[start : start + batch]])
        frames += [to_frames(back) for back in backbone.decode(backbone.encode(pixels))]
    return frames


def line(name: str, scores: Scores, against: Scores) -> str:
    """One row of the table."""
    summary = scores.summary
    cells = [f"{summary[f].value:.3f} [{summary[f].low:.3f}, {summary[f].high:.3f}]" for f in FIGURES]
    return f"| {name} | {' | '.join(cells)} | {scores.distance(against):.3f} |"


def curve(runs: list[Path]) -> list[tuple[int, str, float]]:
    """Update, name and value of what runs logged about validation; a later run goes on where the one before it ended."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    found: dict[tuple[int, str], float] = {}
    for run in runs:
        events = EventAccumulator(str(run)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("val/"):
                found |= {(event.step + 1, tag): event.value for event in events.Scalars(tag)}
    return [(step, tag, value) for (step, tag), value in sorted(found.items())]


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# The proving ground's teacher

A `WanPipeline` of {parameters}, trained from nothing on clips of muybridge's proving ground: {size} pixels, {frames} frames,
{pace:g} of the usual pace; {motions}; {looks}. It knows no other words than theirs.
`muybridge.backbones.load("proving-ground")` loads it; in diffusers,
`pipeline(..., height={size}, width={size}, num_frames={less}, max_sequence_length=16)` makes {frames} frames.

It is for experiments about motion whose answer is known: distillation, customization and attribution in minutes on a laptop.
It is no model of the world.

## Scores

`{command}`, {date}, {machine}. Captions are held out: their pairs of shape and colour were never trained on. Shares have Wilson's
95 % interval, means the bootstrap's; `distance` is Fréchet's to other real clips, in what the reader reads motions from.

{table}

Read right, by the motion that was asked for: {motion}. By law: {law}.

## Training

The commands at the top of `configs/proving_ground/autoencoder.yaml` and `teacher.yaml`, with their seeds, on {trained}.

{curve}
"""


def card(folder: Path, found: dict[str, Any], table: str, trained: str, points: list[tuple[int, str, float]]) -> None:
    """Write the model card: everything in it is read from the files and the results."""
    from safetensors import safe_open

    def count(part: str) -> int:
        total = 0
        for file in (folder / part).glob("*.safetensors"):
            with safe_open(str(file), "pt") as held:
                total += sum(held.get_tensor(name).numel() for name in held.keys())  # noqa: SIM118 - no mapping
        return total

    world = SMALL
    sizes = {"transformer": "denoiser", "vae": "autoencoder", "text_encoder": "text encoder"}
    tags = sorted({tag for _, tag, _ in points})
    steps = sorted({step for step, _, _ in points})
    held = {(step, tag): value for step, tag, value in points}
    rows = [
        f"| updates | {' | '.join(tags)} |",
        "|---" * (len(tags) + 1) + "|",
        *(f"| {step} | {' | '.join(f'{held[step, tag]:.4f}' for tag in tags)} |" for step in steps),
    ]
    looks = f"{', '.join(world.shapes)} in {', '.join(world.colours)}, texture {', '.join(world.textures)}"
    (folder / "README.md").write_text(
        CARD.format(
            parameters=", ".join(f"{count(part) / 1e6:.2f} M ({name})" for part, name in sizes.items()),
            size=world.size,
            frames=world.frames,
            pace=world.pace,
            less=world.frames - 1,
            motions=", ".join(world.motions),
            looks=f"{looks}, before {', '.join(world.backgrounds)}",
            command=found["command"],
            date=found["date"],
            machine=found["machine"],
            table=table,
            motion=", ".join(f"{name} {share:.2f}" for name, share in found["by_motion"]["motion"].items()),
            law=", ".join(f"{name} {share:.2f}" for name, share in found["by_motion"]["law"].items()),
            trained=trained,
            curve="\n".join(rows),
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving-ground")
    parser.add_argument("--prompts", type=int, default=504)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=SEED, help="of captions and noise: guidance was chosen with others")
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher.json")
    parser.add_argument("--sheet", type=Path, help="write a picture of some samples too")
    parser.add_argument(
        "--curve", type=Path, nargs="*", default=[], help="folders of the denoiser's training runs, in order"
    )
    parser.add_argument("--card", type=Path, help="the model's folder, to write its card")
    parser.add_argument(
        "--trained", default="a machine that was not named", help="what it was trained on, for the card"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, backbone = SMALL, load(args.model)
    scenes = [draw_scene(world, args.seed, index, held_out=True) for index in range(args.prompts)]
    captions = [scene.caption for scene in scenes]
    clips = [render(scene) for scene in scenes]
    started = time.process_time()
    samples = sample(backbone, scenes, args.seed, args.steps, args.guidance)
    seconds = (time.process_time() - started) / len(scenes)
    rows = {
        "real": read_clips(clips, captions),
        "real, through its autoencoder": read_clips(rebuilt(backbone, clips), captions),
        f"sampled, {args.steps} steps, guidance {args.guidance:g}": read_clips(samples, captions),
    }
    other = read_clips(
        [render(draw_scene(world, args.seed + 1, i, held_out=True)) for i in range(args.prompts)], captions
    )
    table = [
        f"| {args.prompts} held-out captions | {' | '.join(FIGURES)} | distance |",
        "|---" * (len(FIGURES) + 2) + "|",
        *(line(name, scores, other) for name, scores in rows.items()),
    ]
    sampled = list(rows.values())[-1]
    by_motion = {
        figure: {name: round(e.value, 3) for name, e in sampled.by_motion(figure).items()}
        for figure in ("motion", "law", "colour")
    }
    found = {
        "command": f"python benchmarks/teacher.py --prompts {args.prompts} --steps {args.steps} --guidance {args.guidance:g}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "processor_seconds_per_clip": round(seconds, 3),
        "rows": {
            name: {f: [round(e.value, 4), round(e.low, 4), round(e.high, 4)] for f, e in scores.summary.items()}
            for name, scores in rows.items()
        },
        "by_motion": by_motion,
    }
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(table)
    args.out.with_suffix(".md").write_text(
        f"# The proving ground's teacher\n\n`{found['command']}`, {found['date']}, {found['machine']}; "
        f"{seconds:.2f} processor seconds a clip. Shares have Wilson's 95 % interval, means the bootstrap's; `distance` is "
        f"Fréchet's to other real clips in what the reader reads motions from.\n\n{text}\n\n"
        f"Read right, by motion asked for: {json.dumps(by_motion['motion'])}; by law: {json.dumps(by_motion['law'])}.\n",
        encoding="utf-8",
    )
    print(text)
    print(json.dumps(by_motion))
    points = curve(args.curve)
    if points:
        lines = ["updates,name,value", *(f"{step},{tag},{value:.6f}" for step, tag, value in points)]
        args.out.with_name("teacher-curve.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.card:
        card(args.card, found, text, args.trained, points)
    if args.sheet:
        from muybridge.video import contact_sheet, write_image

        write_image(args.sheet, contact_sheet(samples[:12]))


if __name__ == "__main__":
    main()
