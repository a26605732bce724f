"""Clips with captions from a folder of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from datamodules.collate import collate
from datamodules.prompts import PromptDataset
from muybridge.batch import Batch
from muybridge.errors import UsageError
from muybridge.video import Frames, frame_count, frame_rate, read_frames, to_pixels

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def find_videos(folder: str) -> list[Path]:
    """All videos under a folder, in the order of their relative paths."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"video folder {folder} does not exist", "a folder", f"relative paths are looked up from {Path.cwd()}")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(
            f"{folder} holds no video", f"files ending in {', '.join(SUFFIXES)}, at any depth", "check the folder, or convert the files"
        )
    return found


def read_captions(videos: list[Path]) -> list[str]:
    """The text beside each video, in a file of the same name ending in .txt."""
    missing = [v for v in videos if not v.with_suffix(".txt").is_file()]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(videos)} videos have no caption, first {missing[0]}",
            f"a text file beside each video, such as {missing[0].with_suffix('.txt').name}",
            "write the captions, or move videos without one elsewhere",
        )
    return [v.with_suffix(".txt").read_text(encoding="utf-8").strip() for v in videos]


def window(available: int, rate: float, frames: int, fps: Optional[float]) -> list[int]:
    """Indices of ``frames`` frames around the middle of a video, at ``fps`` where given.

    Raises:
        UsageError: Where the video is shorter than the clip.
    """
    stride = rate / fps if fps else 1.0
    span = (frames - 1) * stride
    if round(span) > available - 1:
        raise UsageError(
            f"{available} frames at {rate:.3g} per second",
            f"at least {round(span) + 1} for a clip of {frames} frames" + (f" at {fps:g} per second" if fps else ""),
        )
    start = (available - 1 - span) / 2
    return [round(start + i * stride) for i in range(frames)]


def fit(frames: Frames, height: int, width: int) -> Frames:
    """Scale until both sides are covered, then crop the middle."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    rows, columns = max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = [f if f.shape[:2] == (rows, columns) else cv2.resize(f, (columns, rows), interpolation=method) for f in frames]
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.stack([f[top : top + height, left : left + width] for f in resized])


class VideoDataset(Dataset[Batch]):
    """One clip a video.

    Args:
        root: Ids are paths relative to it.
        videos: The files.
        captions: One for each.
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second of a clip; the video's own where not given.
    """

    def __init__(
        self, root: str, videos: list[Path], captions: list[str], frames: int, height: int, width: int, fps: Optional[float]
    ) -> None:
        self.ids = [v.relative_to(root).with_suffix("").as_posix() for v in videos]
        self.videos, self.captions = videos, captions
        self.size, self.fps = (frames, height, width), fps

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Batch:
        video = self.videos[index]
        frames, height, width = self.size
        rate = frame_rate(video)
        try:
            picks = window(frame_count(video), rate, frames, self.fps)
        except UsageError as error:
            raise UsageError(f"{video} is too short: {error.given}", error.expected, "shorten the clip, or remove the video") from None
        pixels = to_pixels(fit(read_frames(video, picks), height, width))
        return Batch(ids=[self.ids[index]], pixels=pixels[None], prompts=[self.captions[index]], fps=self.fps or rate)


class VideoData(ResumableData):
    """Videos in a folder, each with its caption in a .txt file beside it.

    Args:
        videos: Folder of videos, at any depth.
        validation: Folder of videos for the validation loss; none where not given.
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second of a clip; each video's own where not given.
        batch_size: Clips of a micro-batch, on every rank.
        num_workers: Processes that decode, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
    """

    def __init__(
        self,
        videos: str,
        validation: Optional[str] = None,
        frames: int = 81,
        height: int = 480,
        width: int = 832,
        fps: Optional[float] = None,
        batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.videos, self.validation = videos, validation
        self.clip_size = (frames, height, width)
        self.fps = fps
        self._sets: dict[str, VideoDataset] = {}

    def setup(self, stage: str) -> None:
        """Find the files and read the captions, before any weight loads."""
        for name, folder in (("train", self.videos), ("validation", self.validation)):
            if folder is not None and name not in self._sets:
                files = find_videos(folder)
                self._sets[name] = VideoDataset(folder, files, read_captions(files), *self.clip_size, self.fps)

    def train_dataset(self) -> Dataset[Batch]:
        return self._sets["train"]

    def _plain_loader(self, name: str) -> DataLoader[Batch]:
        return DataLoader(self._sets[name], batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate)

    def val_dataloader(self) -> Any:
        """The validation clips in their order; nothing where there are none."""
        return self._plain_loader("validation") if "validation" in self._sets else []

    def test_dataloader(self) -> Any:
        """As for validation, or the training clips where there is no validation folder."""
        return self._plain_loader("validation" if "validation" in self._sets else "train")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The captions of the validation clips, or of the training clips, as prompts."""
        clips = self._sets.get("validation", self._sets["train"])
        return DataLoader(PromptDataset(clips.ids, clips.captions), batch_size=self.batch_size, collate_fn=collate)
