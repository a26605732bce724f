"""Videos of the model: at intervals during training, and as files from ``predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.order import TakesLong
from callbacks.preemption import Preemption
from callbacks.progress_line import ProgressLine
from muybridge.batch import Batch
from muybridge.errors import UsageError
from muybridge.progress import Progress
from muybridge.video import contact_sheet, to_frames, write_gif, write_image, write_video


class Samples(BasePredictionWriter, TakesLong):
    """Write videos as mp4 with a contact sheet, and show the sheet in TensorBoard.

    Args:
        prompts: What is sampled during training; nothing where empty. ``predict`` takes its prompts from the data.
        every: Updates between two samplings during training.
        at_start: Sample once before the first update, to have what training changes to compare with.
        dirpath: Where files go; ``samples`` (training) and ``predictions`` (predict) in the run's own folder where not given.
        format: ``mp4``, or ``gif`` for pages that play no video.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        every: int = 500,
        at_start: bool = False,
        dirpath: Optional[str] = None,
        format: Literal["mp4", "gif"] = "mp4",
    ) -> None:
        super().__init__(write_interval="batch")
        if every < 1:
            raise UsageError(f"Samples every is {every}", "a number of updates, 1 or more")
        self.prompts, self.every, self.at_start = list(prompts), every, at_start
        self.dirpath, self.format = dirpath, format
        self._last = -1
        self._root = Path()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Settle where files go, on all ranks together: the first one tells the others the run's folder."""
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir or trainer.default_root_dir
        self._root = Path(self.dirpath or folder)

    def write(self, folder: Path, ids: Sequence[str], pixels: Tensor, fps: float) -> list[Any]:
        """One file per clip, below ``folder`` as the clip's id says; returns the frames."""
        clips = [to_frames(clip) for clip in pixels]
        for name, clip in zip(ids, clips, strict=True):
            inside = [part for part in name.split("/") if part not in ("", ".", "..")]
            path = folder.joinpath(*inside[:-1], f"{inside[-1]}.{self.format}")
            write_gif(path, clip, fps) if self.format == "gif" else write_video(path, clip, fps)
        return clips

    # -- predict ---------------------------------------------------------------------------------------------------

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what ``predict_step`` made."""
        folder = self._root / "predictions"
        # Slots that only fill a rank's last batch are another rank's clips.
        there = [i for i in range(len(batch)) if batch.present is None or bool(batch.present[i])]
        self.write(folder, [batch.ids[i] for i in there], prediction[there], pl_module.sampling.fps)
        if batch_idx == 0:
            rank_zero_info(f"videos go to {folder}")

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuse prompts that nothing can encode now, rather than at the first sampling."""
        if self.prompts:
            pl_module.check_prompts(self.prompts, pl_module.sampling)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sample the untouched model where asked."""
        if self.prompts and self.at_start and pl_module.updates == 0:
            self._sample(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample after every so many updates."""
        updates = pl_module.updates
        if self.prompts and updates and updates % self.every == 0 and updates != self._last:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: pl.Trainer, module: Any) -> None:
        self._last = module.updates
        ids = [f"{i:02d}" for i in range(len(self.prompts))]
        sampling = module.sampling
        # Every rank takes part, since a sharded network needs all of them; the first one writes.
        with SamplingBar(trainer, f"sampling {len(ids)} clips") as on_step, module.averaged():
            pixels = module.make_videos(Batch(ids=ids, prompts=self.prompts), sampling, on_step)
        if not trainer.is_global_zero:
            return
        folder = self._root / "samples" / f"update-{module.updates:07d}"
        clips = self.write(folder, ids, pixels, sampling.fps)
        sheet = contact_sheet(clips)
        write_image(folder / "sheet.png", sheet)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image("samples", sheet, module.updates, dataformats="HWC")


class CutShort(Exception):
    """The run was told to leave while it was sampling."""


class SamplingBar:
    """How far sampling is, said by the first rank; given to samplers as ``on_step``. It goes when they are done.

    All ranks sample together, so that they agree after every step whether the run was told to leave. What the sampling has
    changed (averages in the place of weights) must be changed back inside the bar's context: the run leaves at its end.
    """

    def __init__(self, trainer: pl.Trainer, label: str) -> None:
        self.trainer = trainer
        told = [c for c in trainer.callbacks if isinstance(c, Preemption)]  # type: ignore[attr-defined]
        self.preemption: Optional[Preemption] = told[0] if told else None
        self.bar = trainer.progress_bar_callback
        self.show = trainer.is_global_zero and self.bar is not None
        self.label = label
        self.line: Optional[Progress] = None

    def __enter__(self) -> SamplingBar:
        return self

    def __call__(self, index: int, count: int, time: float, latents: Tensor) -> None:
        """Advance by one step."""
        if self.line is None:
            if isinstance(self.bar, ProgressLine):
                self.bar.clear()
            self.line = Progress(f"{self.label}, steps", count, self.show, ends=False)
        self.line.advance()
        if self.preemption is not None and self.preemption.asked(self.trainer):
            raise CutShort

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.line is not None:
            self.line.close()
        if isinstance(error, CutShort) and self.preemption is not None:
            self.preemption.leave(self.trainer)
