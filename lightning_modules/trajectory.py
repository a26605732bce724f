"""Stage 2 of distillation: a student learns to jump from states of its teacher's trajectories to their ends."""

from __future__ import annotations

from typing import Any, Optional

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_modules.base import Sampling, present_sum
from lightning_modules.finetuning import Finetuning
from lightning_modules.optimization import LearningRate
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.base import Backbone
from muybridge.backbones.causal import Causal
from muybridge.batch import Batch
from muybridge.data.teaching import Size, TeacherPath, kept_times
from muybridge.data.trajectories import TrajectoryBatch
from muybridge.diffusion.draws import keyed_generator
from muybridge.diffusion.samplers import check_steps
from muybridge.diffusion.steps import TrajectoryStep
from muybridge.errors import UsageError
from muybridge.export import export_pipeline
from muybridge.losses import Loss


class TrajectoryDistillation(Finetuning):
    r"""Regress a few-step student on its teacher's ODE trajectories; the start of a causal student.

    ``muybridge trajectories`` with the same config writes them. A causal student draws one of the steps, or the clean end, for
    each block by itself, so that it learns to go on from blocks of any noise and from finished ones; a bidirectional one draws
    a step a clip. No noise is added: what it is given lies on the trajectory.

    Args:
        student: What is trained; causal where its ``causal`` says so.
        steps: The student's falling times, which the trajectories pass through.
        losses: Losses of one step along a trajectory, such as ``TrajectoryRegression``.
        loss_weights: A weight for each loss; all 1 where not given.
        teacher: What writes the trajectories; the student's own checkpoint, all its frames seeing one another, where not given.
        path: How the teacher goes from noise to clean.
        clean_blocks: Give a causal student some blocks clean, as all finished ones are when it samples.
        adapter: Train a LoRA instead of the weights.
        trainable: Full-match regex of the weights to train; all of them where neither this nor an adapter is given.
        optimizer: The optimizer.
        learning_rate: Warm-up and decay of the learning rate.
        sampling: How ``predict`` and the ``Samples`` callback make videos; the trajectories are of its size.
        seed: All randomness of training is a function of this seed, the sample's place in the run and its id.
    """

    def __init__(
        self,
        student: Backbone,
        steps: list[float],
        losses: list[Loss],
        loss_weights: Optional[list[float]] = None,
        teacher: Optional[Backbone] = None,
        path: TeacherPath = TeacherPath(),  # noqa: B008
        clean_blocks: bool = True,
        adapter: Optional[LoRA] = None,
        trainable: Optional[str] = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-6, weight_decay=0.01),
        learning_rate: LearningRate = LearningRate(),  # noqa: B008
        sampling: Sampling = Sampling(steps=[1000.0, 757.0, 522.0], guidance=1.0),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone=student,
            losses=losses,
            loss_weights=loss_weights,
            adapter=adapter,
            trainable=trainable,
            optimizer=optimizer,
            learning_rate=learning_rate,
            caption_dropout=0.0,
            sampling=sampling,
            seed=seed,
        )
        self.steps = check_steps(steps)
        self.path = path
        self.clean_blocks = clean_blocks
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule: training never loads, saves or shards it
        if teacher is not None and teacher.family != student.family:
            raise UsageError(
                f"a {student.family} student of a {teacher.family} teacher",
                "teacher and student of one family: trajectories are latents of the teacher's own VAE and schedule",
            )

    # -- setting up ------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Backbone]:
        return {"student": self.backbone}

    @property
    def teacher(self) -> Backbone:
        """What writes the trajectories."""
        return self._teacher[0] if self._teacher[0] is not None else self.backbone

    @property
    def size(self) -> Size:
        """Frames, height and width of the trajectories."""
        return self.sampling.frames, self.sampling.height, self.sampling.width

    def check(self) -> None:
        super().check()
        for backbone in {id(b): b for b in (self.backbone, self.teacher)}.values():
            backbone.check_clip(*self.size)
        kept_times(self.teacher, self.path, self.steps)  # refuses steps that are not on the path
        data = getattr(self._trainer, "datamodule", None)
        made: Optional[dict[str, Any]] = getattr(data, "made", None)
        if made is None:
            return
        lost = [step for step in self.steps if min(abs(step - t) for t in made["times"]) > 1.0]
        size = tuple(made[k] for k in ("frames", "height", "width"))
        todo = "write them anew with this config: muybridge trajectories -c ... --out ANOTHER"
        if made["family"] != self.backbone.family:
            raise UsageError(f"trajectories of {made['family']} for a {self.backbone.family}", "one family", todo)
        if lost:
            known = ", ".join(f"{t:g}" for t in made["times"])
            raise UsageError(
                f"the trajectories hold no state at the student's step {lost[0]:g}",
                f"steps within 1 of their times, {known}",
                f"change model.steps, or {todo}",
            )
        if size != self.size:
            raise UsageError(
                f"trajectories of {size[0]} frames of {size[1]}x{size[2]}, and a sampling of {self.size[0]} frames of "
                f"{self.size[1]}x{self.size[2]}",
                "one size",
                f"change model.sampling, or {todo}",
            )

    # -- one step --------------------------------------------------------------------------------------------------

    def blocks(self, frames: int) -> Causal:
        """What has a time of its own: each block of a causal student, the whole clip of another."""
        return self.backbone.causal if self.backbone.causal is not None else Causal(block=frames)

    def places(self, times: Tensor) -> Tensor:
        """Where the student's steps stand among a batch's times, (B, S) -> (B, steps); the clean end last where it is drawn."""
        wanted = [*self.steps, 0.0] if self.clean_blocks and self.backbone.causal is not None else self.steps
        distance = (times[:, None, :] - torch.tensor(wanted, device=times.device)[None, :, None]).abs()
        nearest = distance.min(2)
        if bool((nearest.values > 1.0).any()):
            row = int((nearest.values > 1.0).any(1).nonzero()[0])
            raise UsageError(
                f"a trajectory with states at {', '.join(f'{t:g}' for t in times[row].tolist())}",
                f"states within 1 of the student's steps, {', '.join(f'{t:g}' for t in wanted)}",
                "change model.steps, or write the trajectories anew",
            )
        return nearest.indices

    def draw_blocks(self, batch: TrajectoryBatch, count: int, choices: int) -> Tensor:
        """Which of its choices each block is given, (B, blocks); keyed as all draws of training are."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer is not None else (1, 0)
        drawn = [
            torch.randint(
                choices,
                (count,),
                generator=keyed_generator(self.seed, "trajectory", self.samples_seen + slot * ranks + rank, name),
            )
            for slot, name in enumerate(batch.ids)
        ]
        return torch.stack(drawn)

    def along(self, batch: TrajectoryBatch, chosen: Tensor) -> TrajectoryStep:
        """One forward of the student on the states that were chosen.

        Args:
            batch: Trajectories.
            chosen: (B, blocks), places in the student's steps; one more is the clean end.
        """
        states = batch.latents
        frames = states.shape[3]
        places = self.places(batch.times).gather(1, chosen.to(batch.times.device))
        index = self.blocks(frames).per_frame(places, frames)
        noisy = states.gather(1, index[:, None, None, :, None, None].expand(-1, 1, *states.shape[2:]))[:, 0]
        t = batch.times.gather(1, index)
        if self.backbone.causal is None:
            t = t[:, 0]
        text = self.text(batch, self.backbone)  # type: ignore[arg-type]
        prediction = self.backbone(noisy, t, text)
        schedule = self.backbone.schedule
        return TrajectoryStep(
            clean=states[:, -1],
            noisy=noisy,
            t=t,
            prediction=prediction,
            x0=schedule.to_x0(prediction, noisy, t),
            conditioning=text,
            schedule=schedule,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch of trajectories."""
        self._need_trajectories(batch)
        count = len(self.blocks(batch.latents.shape[3]).spans(batch.latents.shape[3]))
        chosen = self.draw_blocks(batch, count, self.places(batch.times).shape[1])
        return self.learn(self.losses_of(self.along(batch, chosen)), batch)  # type: ignore[arg-type]

    def _measure(self, batch: Any) -> None:
        """The losses with all blocks at the same step, for each step."""
        self._need_trajectories(batch)
        size, frames = len(batch), batch.latents.shape[3]
        count = torch.tensor(float(size)) if batch.present is None else batch.present.sum()
        for place, step in enumerate(self.steps):
            chosen = torch.full((size, len(self.blocks(frames).spans(frames))), place)
            values = self.total(self.losses_of(self.along(batch, chosen)))  # type: ignore[arg-type]
            total = torch.stack([present_sum(values, batch.present).double(), count.to(values.device).double()])
            self._sums[step / 1000.0] = self._sums.get(step / 1000.0, torch.zeros_like(total)) + total

    def _need_trajectories(self, batch: Any) -> None:
        if isinstance(batch, TrajectoryBatch):
            return
        held = "clips" if isinstance(batch, Batch) else type(batch).__name__
        raise UsageError(
            f"TrajectoryDistillation was given {held}",
            "trajectories: data TrajectoryData",
            "write them with `muybridge trajectories` and this config",
        )

    # -- out -------------------------------------------------------------------------------------------------------

    def export(self, out: str) -> list[str]:
        """The student as a diffusers pipeline directory whose scheduler holds its steps, or the adapter's own files.

        A run that kept an average exports the average.
        """
        if self.adapter is not None:
            return super().export(out)
        with self.averaged():
            return [str(export_pipeline(self.backbone, out, self.steps))]
