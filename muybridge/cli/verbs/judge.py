"""Clips of the proving ground, real or made by a model, held against what they were asked to show."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from muybridge.errors import UsageError


def judge(
    *,
    videos: str,
    prompts: Optional[str] = None,
    reference: Optional[str] = None,
    against: Optional[str] = None,
    out: Optional[str] = None,
) -> None:
    """Read motion, shape and colour of clips, fit the laws of motion, and score all of it against the clips' captions.

    Args:
        videos: A folder of clips with captions in .txt files beside them, or a table with columns ``video`` and ``caption``. With
            ``prompts``, a folder that `muybridge sample` wrote.
        prompts: The file of prompts that the folder was sampled from.
        reference: Caption of the clip that the model was customized by, to tell how much of its look shows in the others.
        against: A table that this command wrote of other clips (real ones): also tell how far what these show of motion is from
            those.
        out: Write the table to this JSON file.
    """
    from muybridge.data.sources import list_clips
    from muybridge.progress import Progress
    from muybridge.proving_ground.score_files import read_scores, write_scores
    from muybridge.proving_ground.scoring import read_clips
    from muybridge.video import frame_count, read_frames

    if prompts is not None:
        from datamodules.prompts import read_prompts

        ids, captions = read_prompts(prompts)
        files = [Path(videos) / f"{name}.mp4" for name in ids]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise UsageError(
                f"{len(absent)} of {len(files)} clips of {prompts} are not in {videos}, such as {absent[0].name}",
                "a folder that `muybridge sample` filled with these prompts",
                "run it to its end, or leave prompts out",
            )
    else:
        clips = list_clips(videos)
        files, captions = [clip.path for clip in clips], [clip.caption or "" for clip in clips]
    other = read_scores(against) if against is not None else None
    read = [read_frames(file, range(frame_count(file))) for file in files]
    with Progress("clips judged", len(files), every=10.0) as progress:
        references = None if reference is None else [reference] * len(files)
        scores = read_clips(read, captions, references, tell=progress.advance)
    print(scores)
    if other is not None:
        print(f"{'distance':14} {scores.distance(other):6.3f}")
    if out is not None:
        print(f"table: {write_scores(out, scores)}")
