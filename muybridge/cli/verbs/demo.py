"""A first run from nothing, in a minute or two on a laptop."""

from __future__ import annotations

import time
from pathlib import Path

from muybridge.errors import UsageError


def demo(out: str = "runs/demo", updates: int = 40) -> None:
    """Fit a tiny Wan pipeline on toy clips, sample it, export it; a tour of the command with nothing downloaded.

    The model has random weights and a random VAE, so its videos are no sight: what this shows is that everything runs.

    Args:
        out: Where everything goes; a folder that this command made before is continued.
        updates: Updates of training.
    """
    from muybridge.cli.jobs import run_job
    from muybridge.tiny import write
    from muybridge.toy_clips import write_clips
    from muybridge.video import contact_sheet, frame_count, read_frames, write_image

    if updates < 1:
        raise UsageError(f"{updates} updates", "1 or more")
    started = time.monotonic()
    root = Path(out)

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}", flush=True)

    model, clips = root / "model", root / "clips"
    if not (model / "model_index.json").is_file():
        say("a tiny Wan pipeline: text encoder, transformer, VAE, scheduler")
        write("wan", model)
    if not list(clips.glob("*.mp4")):
        say("toy clips with captions")
        write_clips(clips, 8)
    options = [
        "-c",
        "tiny/wan.yaml",
        f"--model.backbone.path={model}",
        f"--data.videos={clips}",
        f"--data.validation={clips}",
        f"--trainer.default_root_dir={root / 'run'}",
        f"--trainer.max_steps={updates}",
    ]
    say(f"muybridge fit {' '.join(options)}")
    if run_job("fit", options):
        raise RuntimeError("fit failed; its message is above")
    say("muybridge predict: a video for the caption of every clip")
    if run_job("predict", [*options, "--ckpt_path=last"]):
        raise RuntimeError("predict failed; its message is above")
    files = sorted((root / "run").rglob("predictions/*.mp4"))
    sheet = write_image(root / "sheet.png", contact_sheet([read_frames(f, range(frame_count(f))) for f in files[:4]]))
    say("muybridge export: a pipeline directory that diffusers loads")
    exported = root / f"exported-{int(time.time())}"
    if run_job("export", [*options, "--ckpt_path=last", f"--out={exported}"]):
        raise RuntimeError("export failed; its message is above")
    say("done")
    print(f"videos:        {files[0].parent}")
    print(f"contact sheet: {sheet}")
    print(f"pipeline:      {exported}")
    print(f"curves:        tensorboard --logdir {root / 'run'}")
