"""Few-step distillation: a student that learns from a teacher's and a critic's scores of what it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_modules.base import Sampling, present_sum
from lightning_modules.distillation_logs import of_critic, of_student
from lightning_modules.distillation_roles import ThreeRoles
from lightning_modules.finetuning import unique_names
from lightning_modules.memory import check_memory
from lightning_modules.optimization import LearningRate
from lightning_modules.two_optimizers import check_fused
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.base import Backbone
from muybridge.backbones.causal import simulate_blocks
from muybridge.batch import Batch
from muybridge.data.trajectories import TrajectoryBatch
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_generator
from muybridge.diffusion.predictions import guide
from muybridge.diffusion.rollouts import at_times, noised, simulate
from muybridge.diffusion.samplers import check_steps
from muybridge.diffusion.steps import ScoreStep
from muybridge.diffusion.timesteps import Shifted, TimestepSampler
from muybridge.errors import UsageError
from muybridge.losses import Adversarial, Loss, MotionScoreMatching, Regression

ON_THE_BAR = ("student/loss", "student/motion_ratio", "critic/loss")
"""What the progress bar shows."""


@dataclass
class Clips:
    """The clips that a student makes, in training and for samples.

    Args:
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second of the files.
        seed: The noise of a sampled clip is a function of this seed and the clip's id alone.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    seed: int = 0


@dataclass
class Draw:
    """All that is random in one turn of one micro-batch.

    Args:
        u: Where in the distribution of score times, (B,).
        start: The noise that the student begins with.
        noise: The noise of the scores.
        generators: One for each sample, for the noises between steps.
    """

    u: Tensor
    start: Tensor
    noise: Tensor
    generators: list[torch.Generator]


class Distillation(ThreeRoles):
    r"""Distil a teacher of many steps into a student of a few (DMD2, and motion score matching with it).

    In a student turn the student makes clips, and the losses pull them along the difference of two scores: the teacher's, with
    guidance, and the critic's. In a critic turn the critic learns to denoise what the student makes now. All three start from
    the teacher's weights. An iteration is one update of the critic; every ``update_ratio``-th, from the first on, is one of the
    student too. ``trainer.max_steps`` and all else that Lightning counts are iterations; averages and samples count updates of
    the student.

    Args:
        teacher: The model that is distilled; frozen.
        losses: What pulls the student: ``DistributionMatching``, beside it ``MotionScoreMatching``, ``Regression``,
            ``Adversarial``, or your own of a ``ScoreStep``.
        steps: The student's times, falling from 1000, as its network is given them (already shifted).
        student: Where the student begins, if not at the teacher's weights: an earlier stage's export, or a causal one. Its times
            are then drawn for each block.
        critic: Where the critic begins, if not at the teacher's weights.
        student_lora: Train the student as an adapter on the teacher's weights rather than as a copy of them.
        critic_lora: Train the critic as an adapter on the teacher's weights rather than as a copy of them. With both,
            memory holds the weights once.
        loss_weights: A weight for each loss; all 1 where not given.
        rollout: ``backward_simulation``: the student makes its own inputs from noise, as it does when it samples, and needs
            prompts alone. ``noised_data``: its inputs are real clips, noised to one of its steps.
        guidance: Standard guidance of the teacher, ``u + s (c - u)``; 1 is none. Recipes that write ``c + w (c - u)`` mean
            ``s = w + 1``.
        negative_prompt: The other branch of the guidance.
        batch_guidance: Run both branches as one batch, rather than one after the other, which needs less memory.
        score_times: At which times the scores of a student's clip are compared; where not given, uniform ones under the family's
            shift, clamped to [20, 980].
        critic_times: At which times the critic learns; as ``score_times`` where not given.
        update_ratio: Updates of the critic for one of the student.
        reuse_sample: Let the critic learn from the student's clip of the same iteration, rather than from a fresh one.
        student_optimizer: The student's optimizer.
        critic_optimizer: The critic's optimizer.
        student_learning_rate: Warm-up and decay of the student's learning rate, in its updates.
        critic_learning_rate: Warm-up and decay of the critic's learning rate, in its updates.
        student_clip: Largest norm of the student's gradient; not clipped where ``null``.
        critic_clip: Largest norm of the critic's gradient; not clipped where ``null``.
        student_accumulate: Micro-batches of one update of the student.
        critic_accumulate: Micro-batches of one update of the critic.
        clips: Size of the clips that the student makes.
        seed: All randomness of training is a function of this seed, the sample's place in the run and its id.
    """

    def __init__(
        self,
        teacher: Backbone,
        losses: list[Loss],
        steps: list[float],
        student: Optional[Backbone] = None,
        critic: Optional[Backbone] = None,
        student_lora: Optional[LoRA] = None,
        critic_lora: Optional[LoRA] = None,
        loss_weights: Optional[list[float]] = None,
        rollout: Literal["backward_simulation", "noised_data"] = "backward_simulation",
        guidance: float = 5.0,
        negative_prompt: str = "",
        batch_guidance: bool = True,
        score_times: Optional[TimestepSampler] = None,
        critic_times: Optional[TimestepSampler] = None,
        update_ratio: int = 5,
        reuse_sample: bool = False,
        student_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-6, weight_decay=0.01),
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-6, weight_decay=0.01),
        student_learning_rate: LearningRate = LearningRate(),  # noqa: B008
        critic_learning_rate: LearningRate = LearningRate(),  # noqa: B008
        student_clip: Optional[float] = 10.0,
        critic_clip: Optional[float] = 10.0,
        student_accumulate: int = 1,
        critic_accumulate: int = 1,
        clips: Clips = Clips(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(teacher, student, critic, student_lora, critic_lora)
        if not losses:
            raise UsageError("losses is empty", "at least one loss, such as DistributionMatching")
        weights = list(loss_weights) if loss_weights is not None else [1.0] * len(losses)
        if len(weights) != len(losses):
            raise UsageError(f"{len(losses)} losses and {len(weights)} loss_weights", "one weight for each loss")
        if not guidance > 0:
            raise UsageError(f"guidance is {guidance}", "a number above 0; 1 is none")
        counts = {
            "update_ratio": update_ratio,
            "student_accumulate": student_accumulate,
            "critic_accumulate": critic_accumulate,
        }
        for name, count in counts.items():
            if count < 1:
                raise UsageError(f"{name} is {count}", "a whole number of 1 or more")
        for name, limit in {"student_clip": student_clip, "critic_clip": critic_clip}.items():
            if limit is not None and not limit > 0:
                raise UsageError(f"{name} is {limit}", "a norm above 0, or null for none")
        self.steps = check_steps(steps)
        self.losses = nn.ModuleList(losses)
        self.loss_names = unique_names(losses)
        self.loss_weights = weights
        self.rollout = rollout
        self.guidance, self.negative_prompt, self.batch_guidance = guidance, negative_prompt, batch_guidance
        self.score_times = score_times if score_times is not None else Shifted(clamp=[20.0, 980.0])
        self.critic_times = critic_times if critic_times is not None else self.score_times
        self.update_ratio, self.reuse_sample = update_ratio, reuse_sample
        self.optimizers_of = {"student": student_optimizer, "critic": critic_optimizer}
        self.learning_rate_of = {"student": student_learning_rate, "critic": critic_learning_rate}
        self.clip_of |= {"student": student_clip, "critic": critic_clip}
        self.student_accumulate, self.critic_accumulate = student_accumulate, critic_accumulate
        self.clips = clips
        self.sampling = Sampling(
            steps=self.steps,
            guidance=1.0,
            negative_prompt=negative_prompt,
            frames=clips.frames,
            height=clips.height,
            width=clips.width,
            fps=clips.fps,
            seed=clips.seed,
        )
        self.seed = seed
        self._micro = 0

    # -- setting up ------------------------------------------------------------------------------------------------

    @property
    def _regresses(self) -> bool:
        return any(isinstance(loss, Regression) for loss in self.losses)

    @property
    def adversarial(self) -> Optional[Adversarial]:
        """The loss that trains a discriminator, if there is one."""
        found: list[Any] = [loss for loss in self.losses if isinstance(loss, Adversarial)]
        return found[0] if found else None

    def check(self) -> None:
        teacher = self.teacher
        self.check_roles()
        known = [float(teacher.schedule.snap(torch.tensor(step))) for step in self.steps]
        if len(set(known)) < len(known):
            raise UsageError(
                f"steps {self.steps} are {known} of {teacher.family}", "steps that its network tells apart"
            )
        for times in (self.score_times, self.critic_times):
            times.bounds(teacher.schedule)
        if sum(isinstance(loss, Adversarial) for loss in self.losses) > 1:
            raise UsageError("losses name Adversarial twice", "one discriminator")
        if self.adversarial is not None:
            self.adversarial.read_layers(teacher)
        if self._regresses and (self.rollout == "noised_data" or self.student.causal is not None):
            raise UsageError(
                "Regression, and " + ("the student is causal" if self.student.causal else "rollout is noised_data"),
                "backward_simulation of a student that is not causal: a pair is of a noise and what one step makes of it",
                "leave Regression out; a causal student regresses on whole paths in TrajectoryDistillation",
            )
        frames = self.latent_shape()[1]
        for loss in self.losses:
            if isinstance(loss, MotionScoreMatching) and frames - loss.skip_first_frame < 2:
                raise UsageError(
                    f"MotionScoreMatching on clips of {self.clips.frames} frames, which are {frames} latent frames",
                    "two latent frames or more, not counting one that is skipped",
                    "raise clips.frames",
                )
        if self._trainer is not None:
            self._check_run()

    def _check_run(self) -> None:
        """What the Trainer and the data must be like."""
        trainer, teacher = self.trainer, self.teacher
        if str(trainer.precision).startswith("16"):
            raise UsageError(
                f"trainer.precision is {trainer.precision}",
                "32-true or bf16-mixed",
                "loss scaling, which float16 needs, does not know of two optimizers",
            )
        networks = teacher.networks_between(0.0, 1000.0)
        if len(networks) > 1 and trainer.world_size > 1:
            raise UsageError(
                f"{teacher.family} has {len(networks)} experts, and score times fall to all of them",
                "a model with one network on several ranks: ranks whose times fall to different experts wait for ever",
                "distil on one process, or a checkpoint with one network",
            )
        data = getattr(trainer, "datamodule", None)
        wants_clips = self.rollout == "noised_data" or self.adversarial is not None
        if wants_clips and hasattr(data, "texts") and not hasattr(data, "clip_sizes"):
            why = "rollout is noised_data" if self.rollout == "noised_data" else "Adversarial compares with real clips"
            raise UsageError(
                f"{why}, and {type(data).__name__} has prompts alone",
                "a datamodule with clips, such as LatentData or VideoData",
                "give one, or set rollout to backward_simulation and leave Adversarial out",
            )
        if self.rollout == "backward_simulation":
            self._check_sizes(data)
        check_memory(self)

    def _check_sizes(self, data: Any) -> None:
        """What the student's own clips are compared with is of their size."""
        size = (self.clips.frames, self.clips.height, self.clips.width)
        given = list(getattr(data, "clip_sizes", ())) if self.adversarial is not None else []
        made = getattr(data, "made", None)
        if made is not None:
            todo = "write them anew: muybridge trajectories"
            if made["family"] != self.teacher.family:
                raise UsageError(f"trajectories of {made['family']} for a {self.teacher.family}", "one family", todo)
            if made["times"][0] < float(self.teacher.schedule.snap(torch.tensor(1000.0))) - 1.0:
                raise UsageError(
                    f"trajectories that begin at time {made['times'][0]:g}",
                    "at pure noise, which the student is then given",
                    f"{todo} with steps that begin at 1000",
                )
            given = [tuple(made[name] for name in ("frames", "height", "width"))]
        for frames, height, width in given:
            if (frames, height, width) != size:
                raise UsageError(
                    f"data with clips of {frames} frames of {height}x{width}",
                    f"{size[0]} frames of {size[1]}x{size[2]}, as the student makes them",
                    "change model.clips, or the size of the data",
                )

    def check_text(self) -> None:
        if self.guidance != 1.0 and not self.can_encode(self.teacher, self.negative_prompt):
            raise UsageError(
                f"guidance is {self.guidance}, and neither a text encoder nor a cache gives the negative prompt"
                f" {self.negative_prompt[:40]!r}",
                "one of them",
                "add text_encoder to the teacher's components, write the cache with this config, or set guidance to 1",
            )

    def prepare(self) -> None:
        if self.adversarial is not None:
            self.adversarial.attach(self.critic, self.seed)
        super().prepare()

    def beside(self, role: str) -> list[nn.Parameter]:
        """The discriminator learns with the critic."""
        return list(self.adversarial.parameters()) if role == "critic" and self.adversarial is not None else []

    def configure_optimizers(self) -> Any:
        """One optimizer and one schedule for each trained role."""
        if self.trainer.max_steps > 0:
            iterations = float(self.trainer.max_steps)
        else:
            iterations = float(self.trainer.estimated_stepping_batches) / self.critic_accumulate
        made = []
        for role in ("student", "critic"):
            optimizer = self.optimizers_of[role](list(self.trained(role).values()))
            check_fused(role, optimizer)
            updates = iterations / self.update_ratio if role == "student" else iterations
            made.append(
                {
                    "optimizer": optimizer,
                    "lr_scheduler": {"scheduler": self.learning_rate_of[role].schedule(optimizer, updates)},
                }
            )
        return made

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["muybridge"] |= {"iterations": self.iterations, "steps": self.steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        made = checkpoint["muybridge"]
        if made["steps"] != self.steps:
            raise UsageError(
                f"the checkpoint's student was trained at the steps {made['steps']}, and this config says {self.steps}",
                "the same steps",
                "use that run's config.yaml, or begin a new run from its export",
            )
        # Gradients of micro-batches are in no checkpoint: an iteration that was cut is begun anew.
        self.iterations, self._micro = made["iterations"], 0

    # -- turns -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch | TrajectoryBatch, batch_idx: int) -> None:
        """One micro-batch: the student's turn where it is due, then the critic's."""
        batch, pairs = self._clips_and_pairs(batch)
        text = self.text(batch, self.teacher)
        student_due = self.iterations % self.update_ratio == 0
        turns = max(self.critic_accumulate, self.student_accumulate if student_due else 0)
        share, sample = self.share_of_batch(batch), None
        if student_due and self._micro < self.student_accumulate:
            sample = self.student_turn(batch, text, share, pairs)
        if self._micro < self.critic_accumulate:
            self.critic_turn(batch, text, share, sample if self.reuse_sample else None)
        self.samples_seen += len(batch) * self.trainer.world_size
        self._micro += 1
        # Both at the end, so that micro-batches are the parts of one large batch.
        if self._micro == turns:
            if student_due and self.update("student"):
                self.updates += 1
            self.update("critic")
            self.iterations += 1
            self._micro = 0

    def _clips_and_pairs(self, batch: Batch | TrajectoryBatch) -> tuple[Batch, Optional[Tensor]]:
        """Clips (encoded, where the job needs them), and the noises that the teacher made them of where there are such pairs."""
        if isinstance(batch, TrajectoryBatch):
            ends = batch.latents[:, -1]
            text, present = batch.conditioning, batch.present
            clips = Batch(ids=batch.ids, latents=ends, prompts=batch.prompts, conditioning=text, present=present)
            return clips, batch.latents[:, 0]
        if self._regresses:
            raise UsageError(
                "Regression without pairs of a noise and what the teacher made of it",
                "data: TrajectoryData, on a folder that the teacher's sampler wrote",
                "write one, or leave Regression out",
            )
        if self.rollout == "noised_data" or self.adversarial is not None:
            batch = replace(batch, latents=self.clean_latents(batch, self.teacher))
        return batch, None

    def latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of the student's clips."""
        self.student.check_clip(self.clips.frames, self.clips.height, self.clips.width)
        return self.teacher.latent_shape(self.clips.frames, self.clips.height, self.clips.width)

    def draw(self, batch: Batch, turn: str, shape: Sequence[int], shared_noise: bool = False) -> Draw:
        """All that is random in a turn, on the CPU, keyed by (seed, turn, place, id) as in :class:`Finetuning`."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        u, start, noise, generators = [], [], [], []
        for slot, name in enumerate(batch.ids):
            generator = keyed_generator(self.seed, turn, self.samples_seen + slot * ranks + rank, name)
            u.append(torch.rand((), generator=generator, dtype=torch.float64))
            one = (shape[0], 1, *shape[2:]) if shared_noise else tuple(shape)
            noise.append(torch.randn(one, generator=generator).expand(tuple(shape)))
            start.append(torch.randn(tuple(shape), generator=generator))
            generators.append(generator)
        device = self.teacher.device
        return Draw(torch.stack(u), torch.stack(start).to(device), torch.stack(noise).to(device), generators)

    def exit_step(self, turn: str) -> int:
        """At which of its steps a rollout is left: the same on all ranks, since they must run equally many forwards."""
        generator = keyed_generator(self.seed, turn, "exit", self.iterations, self._micro)
        return int(torch.randint(len(self.steps), (), generator=generator))

    def roll_out(self, batch: Batch, text: Conditioning, turn: str, draw: Draw) -> tuple[Tensor, int]:
        """The student's clean estimate at one of its steps, and at which; with gradient where that is enabled.

        A causal student is at another step in each block, and may be at 0, where a block is clean and only looked at. What its
        blocks are given there is what they are given when it samples.
        """
        schedule, causal, start = self.teacher.schedule, self.student.causal, draw.start
        with self.playing("student") as student:

            def denoise(noisy: Tensor, t: Tensor) -> Tensor:
                return student(noisy, t, text)

            exit_step = self.exit_step(turn)
            if causal is None and self.rollout == "backward_simulation":
                z = simulate(denoise, start, schedule, self.steps[: exit_step + 1], draw.generators)[-1]
                t = torch.full((len(z),), self.steps[exit_step], device=z.device)
            else:
                frames = start.shape[2]
                t = self._times_of_samples(draw, causal.spans(frames) if causal is not None else [(0, frames)])
                t = causal.per_frame(t, frames) if causal is not None else t[:, 0]
                t = schedule.snap(t.to(start.device))
                if self.rollout == "noised_data":
                    clean = self.clean_latents(batch, self.teacher).to(start)
                    z = noised(clean, start, schedule, t, self.steps[0])
                else:
                    *inputs, made = simulate_blocks(student, start, text, self.steps, draw.generators)
                    z = at_times(inputs, made, schedule, self.steps, t)
                exit_step = -1
            # Casts that autocast kept of a forward without gradients are not to be found by the one with them.
            torch.clear_autocast_cache()
            t = schedule.snap(t)
            return schedule.to_x0(denoise(z, t), z, t), exit_step

    def _times_of_samples(self, draw: Draw, spans: list[tuple[int, int]]) -> Tensor:
        """One of the student's steps for each block of each sample, (B, blocks); a causal student's block may be clean."""
        known = torch.tensor([*self.steps, 0.0] if len(spans) > 1 else self.steps)
        picks = [torch.randint(len(known), (len(spans),), generator=g) for g in draw.generators]
        return known[torch.stack(picks)]

    def student_turn(self, batch: Batch, text: Conditioning, share: Tensor, pairs: Optional[Tensor] = None) -> Tensor:
        """Roll out, compare two scores, pull; the sample, detached.

        Args:
            batch: Prompts, and clips where the job needs them.
            text: Their conditioning.
            share: See :meth:`share_of_batch`.
            pairs: The noises that the teacher made the batch's clips of; the student then begins with these.
        """
        shared_noise = any(getattr(loss, "shared_noise", False) for loss in self.losses)
        draw = self.draw(batch, "student", self._shape(batch, pairs), shared_noise)
        if pairs is not None:
            draw.start = pairs.to(draw.start)
        sample, exit_step = self.roll_out(batch, text, "student", draw)
        # The losses see a leaf: their gradients in the sample are looked at one by one, and one backward pass takes their sum.
        leaf = sample.detach().requires_grad_()
        step = self.score_step(leaf, draw, text)
        if pairs is not None and exit_step == 0:
            step = replace(step, target=self.clean_latents(batch, self.teacher).to(leaf))
        gradients, total = [], torch.zeros((), device=leaf.device, dtype=torch.float64)
        for name, weight, loss in zip(self.loss_names, self.loss_weights, self.losses, strict=True):
            value = loss(step)
            if not isinstance(value, Tensor) or value.shape != (len(leaf),):
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UsageError(f"the loss {name} returned {given}", f"one number per sample, ({len(leaf)},)")
            mean = weight * present_sum(value, batch.present) / share
            (gradient,) = torch.autograd.grad(mean, leaf)
            gradients.append(gradient)
            total = total + mean.detach()
        self.back((sample * torch.stack(gradients).sum(0)).sum() / self.student_accumulate)
        ranks = self.trainer.world_size
        self._tell(of_student(step, self.loss_names, gradients, total, batch.present, self._sum_up, ranks))
        return sample.detach()

    def _shape(self, batch: Batch, pairs: Optional[Tensor] = None) -> tuple[int, ...]:
        if pairs is not None or self.rollout == "noised_data":
            return tuple(self.clean_latents(batch, self.teacher).shape[1:])
        return self.latent_shape()

    def score_step(self, sample: Tensor, draw: Draw, text: Conditioning) -> ScoreStep:
        """What the teacher and the critic say of a sample at one score time."""
        schedule = self.teacher.schedule
        t = self.score_times.quantile(draw.u, schedule).to(sample.device)
        noisy = schedule.add_noise(sample, draw.noise.to(sample), t)
        with torch.no_grad():
            real = schedule.to_x0(self.guided_teacher(noisy.detach(), t, text), noisy.detach(), t)
        logits = None
        with self.playing("critic") as critic:
            if self.adversarial is None:
                with torch.no_grad():
                    prediction = critic(noisy.detach(), t, text)
            else:
                with self.adversarial.reading(critic) as outputs:
                    prediction = critic(noisy, t, text)
                # The prediction takes part with a gradient of 0: FSDP2 gathers a unit's weights for the backward pass when a
                # gradient reaches its output, and what is read lies inside of units.
                logits = self.adversarial.judge(outputs, len(sample)) + 0.0 * prediction.float().flatten(1).sum(1)
        fake = schedule.to_x0(prediction.detach(), noisy.detach(), t)
        return ScoreStep(sample, noisy.detach(), t, real, fake, text, logits=logits)

    def guided_teacher(self, noisy: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The teacher's prediction under guidance, both branches in one batch where asked."""
        with self.playing("teacher") as teacher:
            if self.guidance == 1.0:
                return teacher(noisy, t, text)
            empty = teacher.unconditional(self.negative_prompt).to(noisy.device)
            if not self.batch_guidance:
                return teacher.guided(text, empty, self.guidance)(noisy, t)
            both = Conditioning.cat([teacher.pair_unconditional(text, empty), text])
            without, given = teacher(torch.cat([noisy, noisy]), torch.cat([t, t]), both).chunk(2)
            return guide(without, given, self.guidance)

    def critic_turn(self, batch: Batch, text: Conditioning, share: Tensor, sample: Optional[Tensor] = None) -> None:
        """The family's own regression, without guidance, on what the student makes now."""
        schedule = self.teacher.schedule
        draw = self.draw(batch, "critic", tuple(sample.shape[1:]) if sample is not None else self._shape(batch))
        if sample is None:
            with torch.no_grad():
                sample, _ = self.roll_out(batch, text, "critic", draw)
        t = self.critic_times.quantile(draw.u, schedule).to(sample.device)
        noise = draw.noise.to(sample)
        noisy = schedule.add_noise(sample, noise, t)
        verdict: Optional[Tensor] = None
        with self.playing("critic") as critic:
            if self.adversarial is None:
                prediction = critic(noisy, t, text)
            else:
                real = self.clean_latents(batch, self.teacher).to(sample)
                # One forward of both, with the same noise: what differs is the clip alone.
                both = torch.cat([noisy, schedule.add_noise(real, noise, t)])
                with self.adversarial.reading(critic) as outputs:
                    prediction = critic(both, torch.cat([t, t]), Conditioning.cat([text, text]))[: len(sample)]
                fake_logits, real_logits = self.adversarial.judge(outputs, 2 * len(sample)).chunk(2)
                verdict = self.adversarial.verdict(fake_logits, real_logits)
        target = schedule.target(sample, noise, t)
        value = ((prediction.to(target.dtype) - target) ** 2).flatten(1).mean(1)
        loss = present_sum(value, batch.present) / share
        if verdict is not None and self.adversarial is not None:
            loss = loss + self.adversarial.critic_weight * present_sum(verdict, batch.present) / share
        self.back(loss / self.critic_accumulate)
        self._tell(of_critic(value.detach(), verdict, t, batch.present, self._sum_up))

    # -- what is logged --------------------------------------------------------------------------------------------

    def _sum_up(self, values: Tensor) -> Tensor:
        """Numbers of this rank's samples, summed over all ranks."""
        return self.trainer.strategy.reduce(values.detach().double().clone(), reduce_op="sum")

    def _tell(self, told: dict[str, Tensor]) -> None:
        for name, value in told.items():
            self.log(name, value.float(), prog_bar=name in ON_THE_BAR)

    # -- out -------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The student's videos of the batch's prompts; the ``Samples`` callback writes them."""
        return self.make_videos(batch, self.sampling)
