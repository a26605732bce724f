"""Videos of prompts, from a checkpoint or from the model that a config begins with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Optional

from muybridge.begun import begin
from muybridge.errors import UsageError

TRAINER = {"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "plugins": None}
"""One process, whatever the run used: the weights of one role fit where they were trained."""


def sample(
    trainer: Any,
    model: Any,
    prompts: str,
    out: str,
    ckpt_path: Optional[str] = None,
    seed: Optional[int] = None,
    batch_size: int = 1,
    format: Literal["mp4", "gif"] = "mp4",
) -> None:
    """Make a video of every prompt of a file, with a contact sheet: a distilled student's in its few steps.

    Steps, guidance and size are those of the config's sampling (of a distillation: its steps and clips). The noise of a video
    is a function of the seed and the prompt's id alone. Run it again after it was stopped: it makes what is missing.

    Args:
        trainer: Sets up and loads.
        model: What the config describes.
        prompts: A text file with one prompt a line, or a JSONL file with ``prompt`` (and ``id``) in every line.
        out: The folder, a new one or one that is to be completed.
        ckpt_path: A checkpoint file, a sharded checkpoint folder, ``last`` or ``best``; the weights that training begins with
            where not given. A run that kept an average samples the average.
        seed: Another seed than the config's.
        batch_size: Videos made together.
        format: ``mp4``, or ``gif`` for pages that play no video.
    """
    from datamodules.prompts import read_prompts

    if not callable(getattr(model, "make_videos", None)) or not hasattr(model, "sampling"):
        raise UsageError(f"{type(model).__name__} makes no videos", "a job with a sampling, such as Distillation")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}", "1 or more")
    ids, texts = read_prompts(prompts)
    sampling = model.sampling if seed is None else dataclasses.replace(model.sampling, seed=seed)
    model.sampled.check_clip(sampling.frames, sampling.height, sampling.width)
    model.check_prompts(texts, sampling)
    folder = Path(out)
    begin(folder / "sampling.json", {"checkpoint": ckpt_path, "sampling": dataclasses.asdict(sampling)}, "videos")

    from muybridge.cli.checkpoints import one_file

    with one_file(ckpt_path, folder) as file:
        trainer.run_with(model, lambda: make(model, sampling, ids, texts, folder, batch_size, format), file)
    print(folder / "sheet.png")


def make(
    model: Any, sampling: Any, ids: list[str], texts: list[str], folder: Path, batch_size: int, format: Any
) -> None:
    """Make what is missing, then the sheet of all."""
    from callbacks.samples import Samples
    from muybridge.batch import Batch
    from muybridge.progress import Progress
    from muybridge.video import contact_sheet, frame_count, read_frames, write_image

    writer = Samples(format=format)
    waiting = [i for i, name in enumerate(ids) if not (folder / f"{name}.{format}").exists()]
    rows: dict[str, Any] = {}
    with model.averaged(), Progress("videos", len(waiting)) as progress:
        for start in range(0, len(waiting), batch_size):
            part = waiting[start : start + batch_size]
            batch = Batch(ids=[ids[i] for i in part], prompts=[texts[i] for i in part])
            clips = writer.write(folder, batch.ids, model.make_videos(batch, sampling), sampling.fps)
            rows |= dict(zip(batch.ids, clips, strict=True))
            progress.advance(len(part))
    for name in ids:
        if name not in rows:
            file = folder / f"{name}.{format}"
            rows[name] = read_frames(file, range(frame_count(file)))
    write_image(folder / "sheet.png", contact_sheet([rows[name] for name in ids]))
