"""Clips with captions from videos, whatever lists them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import torch.distributed as dist

from datamodules.bad_videos import BadVideoWatch, OnError, refuse_one
from datamodules.clips import CachedClips, ClipData, ClipDataset, ClipSampler, Place
from muybridge.batch import Batch
from muybridge.data.account import FILE, Account, BadVideo, merge, refuse
from muybridge.data.buckets import Bucket
from muybridge.data.cache import Cache
from muybridge.data.clips import Clip
from muybridge.data.encoding import Material
from muybridge.data.reading import Reading, Survey, read_clip, survey
from muybridge.data.selection import Plan, plan
from muybridge.data.sources import Captions, Kind, list_clips, recognise
from muybridge.data.windows import Windows
from muybridge.errors import UsageError
from muybridge.progress import Progress
from muybridge.video import to_pixels

__all__ = ["ClipSampler", "VideoData", "VideoDataset"]


class VideoDataset(ClipDataset):
    """Clips as batches of one, decoded when asked for. One that can't be used is absent, with the reason as its remark.

    Args:
        clips: Their records.
        buckets: Shapes.
        bucket_of: Which shape each clip has; ``None`` for one that is left out.
        reading: How they are made.
        places: Which clip each sample is, where it is not each once.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        bucket_of: Sequence[Optional[int]],
        reading: Reading,
        places: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(clips, buckets, bucket_of, places)
        self.reading = reading
        seen: dict[int, int] = {}
        self.draws = []
        for place in self.places:
            self.draws.append(seen.get(place, 0))
            seen[place] = self.draws[-1] + 1

    def __getitem__(self, key: int | Place) -> Batch:
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        clip, number = self.clips[self.places[sample]], self.bucket_of[self.places[sample]]
        bucket = self.buckets[number or 0]
        prompts = [clip.caption or ""]
        try:
            taken = read_clip(clip, bucket, self.reading, epoch, self.draws[sample])
        except BadVideo as error:
            pixels = torch.zeros(1, 3, bucket.frames, *bucket.size)
            return Batch([clip.id], pixels, prompts=prompts, present=torch.tensor([False]), remarks=[str(error)])
        remarks = [taken.remark] if taken.remark else None
        return Batch([taken.id], to_pixels(taken.frames)[None], prompts=prompts, fps=taken.fps, remarks=remarks)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """All settings that the pixels of a clip depend on."""
        return {"clips": [str(bucket) for bucket in self.buckets], **self.reading.settings()}


class VideoData(ClipData):
    """Clips of videos with captions, from a folder, a table, the manifest of a data set, or one file.

    Args:
        videos: A folder with a .txt caption beside each video; a .csv, .tsv, .jsonl or .parquet table with columns ``video`` and
            ``caption``; an Open-Sora-Plan or MixKit .json (``path``, ``cap``); a VIDGEN .json (``vid``, ``caption``); or a video.
        validation: Another of these, for the validation loss; none where not given.
        cache: What ``muybridge cache`` made of these clips: latents and texts are read from it, and no video is decoded.
        source: What ``videos`` is, where its name and content do not tell.
        root: Folder that a manifest's paths are relative to; the manifest's own where not given.
        captions: Whether a clip without a caption is an error, or gets the empty one.
        caption: The caption, where ``videos`` is one video.
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        buckets: Several shapes instead of ``frames``, ``height`` and ``width``; each clip goes to the one that keeps most of it.
        fps: Frames per second of a clip; each video's own where not given.
        stride: Take every so many source frames, instead of ``fps``.
        window: Which part of a longer video: its ``centre``, ``random`` ones that change every epoch, or ``all`` of it in clips.
        clips_per_video: How many ``centre`` (evenly spread, where there is room) or ``random`` windows of each video.
        window_step: Frames of a clip from one of ``all`` windows to the next; a clip's length where not given.
        framing: Scale until the clip is covered and ``crop``, or until the picture fits and pad (``letterbox``).
        decoder: ``auto`` reads by decord what it reads exactly, and by PyAV the rest.
        on_error: What a video that can't be used does: ``skip`` notes it in ``bad_videos.jsonl``, ``raise`` ends the run.
        max_bad_fraction: The run ends where more than this share of clips was skipped.
        selection: Train on these clips only: a .txt file with one id a line, or .csv or .parquet with a column ``id``.
        sampling_weights: Draw clips with replacement, each as often as a .csv or .parquet file with columns ``id`` and ``weight``
            says; the selection's own column ``weight`` where not given, and every clip once where there is none.
        repeats: How often the clips stand in one epoch.
        motion_weights: Read motion weights from the cache too.
        batch_size: Clips of a micro-batch, on every rank.
        num_workers: Processes that decode, on every rank.
        seed: The order of an epoch, and random windows, are a function of this seed and the epoch.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out an epoch's last clips (with buckets, each bucket's) where they do not fill a batch on every rank,
            rather than fill it up.
    """

    def __init__(
        self,
        videos: str,
        validation: Optional[str] = None,
        cache: Optional[str] = None,
        source: Kind = "auto",
        root: Optional[str] = None,
        captions: Captions = "required",
        caption: Optional[str] = None,
        frames: int = 81,
        height: int = 480,
        width: int = 832,
        buckets: Optional[list[Bucket]] = None,
        fps: Optional[float] = None,
        stride: int = 1,
        window: Literal["centre", "random", "all"] = "centre",
        clips_per_video: int = 1,
        window_step: Optional[int] = None,
        framing: Literal["crop", "letterbox"] = "crop",
        decoder: Literal["auto", "decord", "av"] = "auto",
        on_error: OnError = "skip",
        max_bad_fraction: float = 0.1,
        selection: Optional[str] = None,
        sampling_weights: Optional[str] = None,
        repeats: int = 1,
        motion_weights: bool = False,
        batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, shuffle=shuffle, drop_last=drop_last
        )
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise UsageError(f"max_bad_fraction is {max_bad_fraction}", "a share from 0 to 1")
        if buckets is not None and (not buckets or len(set(buckets)) < len(buckets)):
            raise UsageError(f"buckets are {[str(b) for b in buckets]}", "at least one, and each once")
        self.videos, self.validation, self.source, self.root = videos, validation, source, root
        self.captions, self.caption = captions, caption
        self.buckets = list(buckets) if buckets is not None else [Bucket(frames, height, width)]
        windows = Windows(window, clips_per_video, window_step, fps, stride)
        self.reading = Reading(windows, framing, decoder, seed)
        self.on_error, self.max_bad_fraction = on_error, max_bad_fraction
        self.selection, self.sampling_weights, self.repeats = selection, sampling_weights, repeats
        self.cache_path, self.origin = cache, videos
        if motion_weights and cache is None:
            raise UsageError(
                "motion_weights is true, and there is no cache to read them from",
                "a cache with motion weights",
                "muybridge cache --motion DIS, then data.cache",
            )
        self.motion_weights = motion_weights
        self._videos: dict[str, VideoDataset] = {}
        self._watcher: Optional[BadVideoWatch] = None

    # -- what there is ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """List the clips, before any weight loads; look into the files where the number or shape of clips depends on them."""
        if "train" not in self._sets:
            clips = list_clips(self.videos, self.source, self.root, self.captions, self.caption)
            clips, bucket_of, self._enlarged = self._look(clips, self.reading)
            self._plan = self._planned(clips)
            self._videos["train"] = VideoDataset(clips, self.buckets, bucket_of, self.reading, self._plan.places)
            if self.validation is not None:
                self._videos["validation"] = self._validation_set(self.validation)
            self._sets = dict(self._videos) if self.cache_path is None else self._cached(Path(self.cache_path))
        if self.trainer is not None:
            self._watch(self.trainer)

    def _planned(self, clips: Sequence[Clip]) -> Plan:
        planned = plan([clip.id for clip in clips], self.selection, self.sampling_weights, self.repeats)
        windows = self.reading.windows
        count = windows.count if windows.mode == "random" else 1
        return Plan(planned.places * count, planned.weights * count if planned.weights is not None else None)

    def _validation_set(self, path: str) -> VideoDataset:
        manifest = Path(path).is_file() and recognise(Path(path)) != "clip"
        clips = list_clips(path, root=self.root if manifest else None, captions=self.captions)
        reading = self.reading
        if reading.windows.mode == "random":
            # What is measured must not change from epoch to epoch.
            reading = replace(reading, windows=replace(reading.windows, mode="centre", count=1))
        clips, bucket_of, _ = self._look(clips, reading)
        # Left out of training, they are left out here too, where no slot is there to keep.
        places = sorted((i for i, b in enumerate(bucket_of) if b is not None), key=lambda i: bucket_of[i] or 0)
        return VideoDataset(clips, self.buckets, bucket_of, reading, places)

    def _look(self, clips: list[Clip], reading: Reading) -> tuple[list[Clip], list[Optional[int]], list[bool]]:
        """Clips (one for every window), their buckets, and which are enlarged."""
        if len(self.buckets) == 1 and not reading.windows.needs_lengths:
            return clips, [0] * len(clips), [False] * len(clips)
        found = survey_all(clips, self.buckets, reading)
        # With one bucket, a clip that can't be used keeps its slot, as it does where files are only looked into when read.
        spare = 0 if len(self.buckets) == 1 else None
        parts = [(clip, spare if s.bucket is None else s.bucket, s.enlarged) for s in found for clip in s.clips]
        bad = {clip.id: clip.problem for s in found for clip in s.clips if clip.problem is not None}
        account = Account(len(clips), len(bad), bad)
        if bad and self.on_error == "raise":
            name, reason = next(iter(bad.items()))
            raise refuse_one(name, str(next(c.path for c in clips if c.id == name)), reason)
        if account.too_many(self.max_bad_fraction):
            raise refuse(account, self.max_bad_fraction, self._list(clips, bad))
        return [p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts]

    def _list(self, clips: Sequence[Clip], bad: Mapping[str, str]) -> str:
        """Write bad clips down where a run would; returns where that is."""
        trainer = self.trainer
        file = Path(trainer.log_dir or trainer.default_root_dir if trainer is not None else ".") / FILE
        if trainer is None or trainer.is_global_zero:
            merge(file, bad, {clip.id: str(clip.path) for clip in clips})
        return str(file)

    def _cached(self, path: Path) -> dict[str, ClipDataset]:
        """The same clips in the same places, from a cache."""
        found: dict[str, ClipDataset] = {}
        self.cache = Cache(path)
        for name, videos in self._videos.items():
            cache = self.cache if name == "train" else Cache(path / name)
            cache.check_like(self.cache)
            cache.check_preprocessing(videos.preprocessing)
            cache.check_clips([videos.clips[place] for place in dict.fromkeys(videos.places)])
            weights = self.motion_weights
            found[name] = CachedClips(cache, videos.clips, videos.buckets, videos.bucket_of, videos.places, weights)
        return found

    def _watch(self, trainer: Any) -> None:
        if self._watcher in trainer.callbacks:
            return
        sets = dict(self._sets)

        def paths(stage: str) -> dict[str, str]:
            return {clip.id: str(clip.path) for clip in sets.get(stage, sets["train"]).clips}

        data = self._sets["train"]
        out = {c.id: c.problem for c, b in zip(data.clips, data.bucket_of, strict=True) if b is None and c.problem}
        self._watcher = BadVideoWatch(self.on_error, self.max_bad_fraction, paths, out)
        # A trainer may have watched another datamodule before.
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, BadVideoWatch)] + [self._watcher]

    def to_cache(self) -> Material:
        """What ``muybridge cache`` encodes: every clip that is trained on, once."""
        if self.reading.windows.mode == "random":
            raise UsageError(
                "window is random: every epoch has other clips, which no cache can hold",
                "window: centre or all, where clips are cached",
            )

        def once(data: VideoDataset) -> VideoDataset:
            kept = sorted(set(data.places))
            clips, bucket_of = [data.clips[i] for i in kept], [data.bucket_of[i] for i in kept]
            return VideoDataset(clips, data.buckets, bucket_of, data.reading)

        validation = self._videos.get("validation")
        return Material(once(self._videos["train"]), once(validation) if validation is not None else None)


def survey_all(clips: Sequence[Clip], buckets: list[Bucket], reading: Reading) -> list[Survey]:
    """A look into every clip's file, shared by the ranks of a run, several files at a time."""
    shared = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    mine = clips[rank::world]
    found = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress("videos looked into", len(mine), rank == 0, ends=False) as progress,
    ):
        for looked in pool.map(lambda clip: survey(clip, buckets, reading), mine):
            found.append(looked)
            progress.advance()
    if not shared:
        return found
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, found)
    return [parts[place % world][place // world] for place in range(len(clips))]
