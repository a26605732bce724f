"""Whether a student still moves as its teacher does, while it is distilled."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.order import TakesLong
from callbacks.samples import SamplingBar
from muybridge.batch import Batch
from muybridge.errors import UsageError
from muybridge.metrics import dis_flow, motion_amount, motion_smoothness
from muybridge.video import contact_sheet, to_frames, write_image, write_video

MEASURES = ("amount", "smoothness")


class MotionMonitor(TakesLong):
    """Sample fixed prompts now and then, measure their motion against the teacher's, and say when it collapses.

    The losses of a distillation do not tell: the student's is nearly constant by construction, and a student whose videos stand
    still can have a low one. The teacher's videos of the same prompts and noises are made once, before the first update. Motion
    is measured by optical flow: its amount (the fastest pixels' speed) and smoothness (whether velocities last). Curves go to the
    logger and to ``motion.csv``, a contact sheet of each sampling to a folder, the teacher's rows above the student's.

    Args:
        prompts: What is sampled; one at least.
        every: Updates of the student between two samplings.
        teacher_steps: Steps of the teacher's own sampler.
        floor: A warning is given when the amount of motion falls below this share of the teacher's.
        stop: End the run after ``patience`` such warnings in a row.
        patience: How many it takes.
        share: Share of a frame's pixels that count for the amount, the fastest.
        videos: Write mp4 files too.
        dirpath: Where files go; ``motion`` in the run's own folder where not given.
    """

    logs = "motion/"

    def __init__(
        self,
        prompts: Sequence[str],
        every: int = 50,
        teacher_steps: int = 50,
        floor: float = 0.5,
        stop: bool = False,
        patience: int = 3,
        share: float = 0.05,
        videos: bool = False,
        dirpath: Optional[str] = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise UsageError(f"MotionMonitor prompts is {prompts!r}", "a list of one prompt or more")
        if every < 1 or teacher_steps < 1 or patience < 1:
            raise UsageError(
                f"MotionMonitor every is {every}, teacher_steps is {teacher_steps} and patience is {patience}",
                "1 or more each",
            )
        if not 0.0 <= floor < 1.0 or not 0.0 < share <= 1.0:
            raise UsageError(
                f"MotionMonitor floor is {floor} and share is {share}", "floor from 0 to below 1, share above 0 up to 1"
            )
        self.prompts, self.every, self.teacher_steps = list(prompts), every, teacher_steps
        self.floor, self.stop, self.patience, self.share = floor, stop, patience, share
        self.videos, self.dirpath = videos, dirpath
        self.teacher: dict[str, float] = {}
        self.low_in_a_row = 0
        self._last = -1
        self._root = Path()
        self._sheet: Optional[Tensor] = None

    # -- setting up ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a job without a teacher; settle where files go, on all ranks together."""
        if not callable(getattr(pl_module, "reference_videos", None)):
            raise UsageError(
                f"MotionMonitor was given {type(pl_module).__name__}",
                "a job whose teacher can be sampled (reference_videos), such as Distillation",
                "remove the callback; Samples writes videos of any job",
            )
        if pl_module.sampling.frames < 3:
            raise UsageError(
                f"MotionMonitor on clips of {pl_module.sampling.frames} frames",
                "3 or more: smoothness compares two steps",
            )
        self._root = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "motion")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuse prompts that nothing can encode now, rather than at the first sampling."""
        pl_module.check_prompts(self.prompts, pl_module.sampling)

    @property
    def batch(self) -> Batch:
        """The fixed prompts."""
        return Batch(ids=[f"{i:02d}" for i in range(len(self.prompts))], prompts=self.prompts)

    # -- measuring -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The teacher's videos: once in a run, measured; after a resume what was measured is known."""
        if self.teacher:
            return
        with SamplingBar(trainer, "sampling the teacher") as on_step:
            pixels = pl_module.reference_videos(self.batch, self.teacher_steps, on_step)
        self.teacher = self._measure(trainer, pixels)
        self._write(trainer, pl_module, pixels, "teacher")
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.teacher.items())
        rank_zero_info(f"motion of the teacher: {told}")
        if self.teacher["amount"] == 0.0:
            rank_zero_warn("the teacher's videos of these prompts do not move: MotionMonitor can't tell a collapse")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample and measure after every so many updates of the student."""
        updates = pl_module.updates
        if not updates or updates % self.every or updates == self._last:
            return
        self._last = updates
        with SamplingBar(trainer, "sampling the student") as on_step, pl_module.averaged():
            pixels = pl_module.make_videos(self.batch, pl_module.sampling, on_step)
        found = self._measure(trainer, pixels)
        ratio = found["amount"] / max(self.teacher["amount"], 1e-12)
        self._log(trainer, pl_module, found | {"amount_ratio": ratio})
        self._write(trainer, pl_module, pixels, f"update-{updates:07d}")
        self.low_in_a_row = self.low_in_a_row + 1 if ratio < self.floor else 0
        if self.low_in_a_row:
            rank_zero_warn(
                f"update {updates}: the student moves {100 * ratio:.0f} % as much as the teacher (floor {100 * self.floor:.0f}"
                f" %, {self.low_in_a_row} in a row); motion tends to fall with further updates: take an earlier checkpoint, a"
                " larger weight of MotionScoreMatching, or less guidance"
            )
        if self.stop and self.low_in_a_row >= self.patience:
            rank_zero_warn(f"update {updates}: MotionMonitor ends the run")
            trainer.should_stop = True

    def _measure(self, trainer: pl.Trainer, pixels: Tensor) -> dict[str, float]:
        """On the first rank, which tells the others, so that all of them stop together."""
        values = torch.zeros(len(MEASURES), dtype=torch.float64)
        if trainer.is_global_zero:
            flow = dis_flow(pixels.cpu())
            values = torch.stack([motion_amount(flow, self.share).mean(), motion_smoothness(flow).mean()]).double()
        values = trainer.strategy.broadcast(values)
        return dict(zip(MEASURES, values.tolist(), strict=True))

    # -- telling ---------------------------------------------------------------------------------------------------

    def _log(self, trainer: pl.Trainer, module: Any, found: dict[str, float]) -> None:
        known = {f"motion/{name}": value for name, value in found.items()}
        known |= {f"motion/{name}_of_teacher": value for name, value in self.teacher.items()}
        module.log_dict(known)
        if not trainer.is_global_zero:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        file = self._root / "motion.csv"
        row = {"update": module.updates, **{name.removeprefix("motion/"): value for name, value in known.items()}}
        fresh = not file.exists()
        with open(file, "a", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def _write(self, trainer: pl.Trainer, module: Any, pixels: Tensor, name: str) -> None:
        if not trainer.is_global_zero:
            return
        clips = [to_frames(clip) for clip in pixels]
        if self.videos or name == "teacher":
            for index, clip in enumerate(clips):
                write_video(self._root / name / f"{index:02d}.mp4", clip, module.sampling.fps)
        sheet = contact_sheet(clips)
        if name == "teacher":
            self._sheet = torch.from_numpy(sheet)
        elif self._sheet is not None:
            # Kept as a picture, so that a resumed run still has the teacher's rows above the student's.
            sheet = np.concatenate([self._sheet.numpy(), sheet])
        write_image(self._root / f"{name}.png", sheet)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image("motion", sheet, module.updates, dataformats="HWC")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was measured of the teacher and its rows of the sheet, and how long motion has been low."""
        known = {"teacher": dict(self.teacher), "low_in_a_row": self.low_in_a_row, "last": self._last}
        return known if self._sheet is None else {**known, "sheet": self._sheet}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was measured before."""
        self.teacher, self.low_in_a_row = dict(state_dict["teacher"]), state_dict["low_in_a_row"]
        self._last, self._sheet = state_dict["last"], state_dict.get("sheet")
