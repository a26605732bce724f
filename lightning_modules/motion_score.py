"""A model of motion alone: the score of differences of frames, given none, the first, or some frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_modules.base import Sampling
from lightning_modules.finetuning import Finetuning
from lightning_modules.optimization import LearningRate
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.base import Backbone
from muybridge.backbones.motion_model import MotionModel, check_motion_model
from muybridge.batch import Batch
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.differences import Differences, mixed, roll_windows
from muybridge.diffusion.draws import keyed_generator, keyed_noise
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.diffusion.steps import DenoisingStep
from muybridge.diffusion.timesteps import TimestepSampler, Uniform
from muybridge.errors import UsageError
from muybridge.losses import Loss
from muybridge.metrics.likelihood import motion_likelihood


@dataclass
class Mixing:
    """How much of the motion model's score is added to the appearance model's, ``s + μ Mᵀ s_motion``.

    Args:
        weight: ``μ``; 0 is the appearance model alone.
        form: ``sum`` is the score of ``p(z) p(Mz)^μ``. ``replace`` moves the estimate's differences towards the motion model's,
            all the way at a weight of 1, and is bounded at every noise level.
        low: Below this time the appearance model runs alone.
        high: Above this time the appearance model runs alone.
    """

    weight: float = 0.3
    form: Literal["sum", "replace"] = "replace"
    low: float = 20.0
    high: float = 980.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UsageError(f"mixing weight is {self.weight}", "0 or more; 0 is the appearance model alone")
        if not 0.0 < self.low < self.high < 1000.0:
            raise UsageError(
                f"mixing from time {self.low:g} to {self.high:g}",
                "low below high, both between 0 (clean) and 1000 (noise)",
                "the mixed score grows without bound at both ends",
            )


@dataclass
class Windows:
    """How a clip is made window by window, after given frames.

    Args:
        stride: Differences taken of each window; all where not given. Smaller ones let windows overlap.
        weights: What a window says counts this much, one number for each place in a window, nearest first; equal where not given.
    """

    stride: Optional[int] = None
    weights: Optional[list[float]] = None


@dataclass
class Rating:
    """How ``test`` measures the log-likelihood of clips' motion.

    Args:
        steps: Steps of the ODE.
        probes: Random probes of the trace.
        seed: Of the probes.
    """

    steps: int = 20
    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.probes < 1:
            raise UsageError(f"a rating in {self.steps} steps with {self.probes} probes", "at least 1 of each")


class MotionScore(Finetuning):
    r"""Train a backbone as the score of motion: of ``Δx``, of ``Δx`` given the first frame, or of a window given those before.

    ``differences.context`` chooses: 0 models all differences of a clip, 1 those after the first frame, k with ``window`` those
    that follow any k frames. Given frames stand clean in the network's own sequence, at time 0. Nothing of the network changes.

    Args:
        backbone: What is trained; ``class_path: Pretrained`` picks the family from the checkpoint.
        losses: Losses of one denoising step of differences, such as ``Denoising``.
        loss_weights: A weight for each loss; all 1 where not given.
        differences: What is modelled, and under which noise.
        window: Differences that are modelled together, at any place of a clip; all of a clip where not given.
        appearance: A model of frames of the same family, frozen; gives the first frames of ``predict`` and ``Samples``, or is
            what the motion score is mixed into (context 0).
        mixing: How the two scores are mixed.
        windows: How windows follow one another.
        rating: Let ``test`` log the log-likelihood of the clips' motion, in nats per dimension.
        timesteps: Which times are drawn.
        adapter: Train a LoRA instead of the weights.
        trainable: Full-match regex of the weights to train; all of them where neither this nor an adapter is given.
        optimizer: The optimizer.
        learning_rate: Warm-up and decay of the learning rate.
        caption_dropout: Share of samples trained with the empty caption, which keeps guidance working.
        validation_quantiles: Where between clean (0) and noise (1) the validation loss is measured.
        sampling: How ``predict`` and the ``Samples`` callback make videos.
        seed: All randomness of training is a function of this seed, the sample's place in the run and its id.
    """

    def __init__(
        self,
        backbone: Backbone,
        losses: list[Loss],
        loss_weights: Optional[list[float]] = None,
        differences: Differences = Differences(context=1),  # noqa: B008
        window: Optional[int] = None,
        appearance: Optional[Backbone] = None,
        mixing: Mixing = Mixing(),  # noqa: B008
        windows: Windows = Windows(),  # noqa: B008
        rating: Optional[Rating] = None,
        timesteps: TimestepSampler = Uniform(),  # noqa: B008
        adapter: Optional[LoRA] = None,
        trainable: Optional[str] = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        learning_rate: LearningRate = LearningRate(),  # noqa: B008
        caption_dropout: float = 0.1,
        validation_quantiles: list[float] = [0.1, 0.3, 0.5, 0.7, 0.9],  # noqa: B006
        sampling: Sampling = Sampling(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone=backbone,
            losses=losses,
            loss_weights=loss_weights,
            timesteps=timesteps,
            adapter=adapter,
            trainable=trainable,
            optimizer=optimizer,
            learning_rate=learning_rate,
            caption_dropout=caption_dropout,
            validation_quantiles=validation_quantiles,
            sampling=sampling,
            seed=seed,
        )
        if appearance is not None and appearance.family != backbone.family:
            raise UsageError(
                f"a motion model on {backbone.family} with a {appearance.family} for appearance",
                "one family: both work on latents of one VAE, under one noise schedule",
            )
        self.differences = differences
        self.window = window
        self.appearance = appearance
        self.mixing, self.windows, self.rating = mixing, windows, rating
        self._rated = torch.zeros(2, dtype=torch.float64)

    # -- setting up ------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Backbone]:
        mine = {"backbone": self.backbone}
        return mine if self.appearance is None else {**mine, "appearance": self.appearance}

    @property
    def model(self) -> MotionModel:
        """The backbone, read as a model of differences."""
        return MotionModel(self.backbone, self.differences)

    def together(self, frames: int) -> int:
        """Differences that are modelled together in clips of so many latent frames; refuses clips that are too short."""
        k = self.differences.context
        possible = self.differences.count(frames - k)
        wanted = possible if self.window is None else self.window
        if not 1 <= wanted <= possible:
            raise UsageError(
                f"{'all' if self.window is None else self.window} differences after {k} given frames, in clips of {frames} "
                "latent frames",
                f"at least 1 and at most {max(possible, 0)}: one frame has no motion",
                "set model.window and model.differences.context, or take longer clips",
            )
        return wanted

    def check(self) -> None:
        super().check()
        sampling, k = self.sampling, self.differences.context
        frames = self.backbone.latent_shape(sampling.frames, sampling.height, sampling.width)[1]
        window = self.together(frames)
        check_motion_model(self.backbone, self.differences, window)
        if k and not isinstance(sampling.steps, int):
            raise UsageError(
                f"sampling.steps is {sampling.steps}", "a number of steps: a window of differences is made by its ODE"
            )
        if k:
            # A dry run on one number: it refuses strides and weights that leave a difference unsaid.
            zero = torch.zeros(1, 1, k, 1, 1)
            roll_windows(
                lambda *_: zero[:, :, :1].expand(-1, -1, window, -1, -1),
                zero,
                frames - k,
                window,
                self.windows.stride,
                self.windows.weights,
            )

    def prepare(self) -> None:
        super().prepare()
        if self.appearance is not None:
            self.appearance.requires_grad_(False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The appearance model is frozen and in no checkpoint: a run may gain or lose it.
        made = checkpoint.get("muybridge")
        if made is not None and self.appearance is not None:
            roles = {"appearance": {"family": self.appearance.family}, **made["roles"]}
            checkpoint = {**checkpoint, "muybridge": {**made, "roles": roles}}
        super().on_load_checkpoint(checkpoint)

    def check_prompts(self, prompts: Any, sampling: Sampling) -> None:
        if prompts and self.appearance is None:
            raise UsageError(
                "videos are asked for of prompts, and a motion model alone has no frame to begin with",
                "appearance: a model of frames",
                "give the job an appearance model, or sample no prompts",
            )
        super().check_prompts(prompts, sampling)

    # -- one step --------------------------------------------------------------------------------------------------

    def clean_latents(self, batch: Batch, backbone: Backbone) -> Tensor:
        """Frames: those of a whole clip, or of a window and the frames before it at a drawn place."""
        latents = super().clean_latents(batch, backbone)
        k, frames = self.differences.context, latents.shape[2]
        wanted = k + self.differences.frames(self.together(frames))
        if frames == wanted:
            return latents
        if batch.weights is not None:
            raise UsageError("motion weights with windows of a clip", "window not given, or data without weights")
        trainer = self._trainer
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        parts = []
        for slot, (name, clip) in enumerate(zip(batch.ids, latents, strict=True)):
            start = (frames - wanted) // 2
            if trainer is not None and trainer.training:
                place = self.samples_seen + slot * ranks + rank
                generator = keyed_generator(self.seed, "window", place, name)
                start = int(torch.randint(frames - wanted + 1, (), generator=generator))
            parts.append(clip[:, start : start + wanted])
        return torch.stack(parts)

    def noised_forward(
        self, clean: Tensor, noise: Tensor, t: Tensor, text: Conditioning, batch: Batch
    ) -> DenoisingStep:
        """Noise the differences of the frames, run the network, collect all that a loss may want.

        Args:
            clean: Frames, those of the context first.
            noise: Standard normal, of the same shape.
            t: Times, (B,).
            text: One per sample.
            batch: What it came from.
        """
        schedule, k = self.backbone.schedule, self.differences.context
        context = clean[:, :, :k] if k else None
        u = self.differences.apply(clean[:, :, k:], None if context is None else context[:, :, -1:])
        n = self.differences.noise_of(noise[:, :, k:])
        noisy = schedule.add_noise(u, n, t)
        prediction = self.model.denoise(noisy, t, text, context)
        return DenoisingStep(
            clean=u,
            noise=n,
            noisy=noisy,
            t=t,
            prediction=prediction,
            target=schedule.target(u, n, t),
            x0=schedule.to_x0(prediction, noisy, t),
            conditioning=text,
            weights=None if batch.weights is None else batch.weights[:, :, -u.shape[2] :],
            schedule=schedule,
            present=batch.present,
        )

    # -- rating ----------------------------------------------------------------------------------------------------

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss as in validation, and the log-likelihood of the clips' motion where a rating is asked for."""
        super().test_step(batch, batch_idx)
        if self.rating is None:
            return
        latents, text = self.clean_latents(batch, self.backbone), self.text(batch, self.backbone)
        rating = self.rating
        values = motion_likelihood(
            self.backbone, self.differences, latents, text, batch.ids, rating.steps, rating.probes, rating.seed
        ).double()
        there = torch.ones_like(values, dtype=torch.bool) if batch.present is None else batch.present
        self._rated = self._rated.to(values.device) + torch.stack([values[there].sum(), there.double().sum()])

    def on_test_epoch_start(self) -> None:
        """Begin a measurement."""
        super().on_test_epoch_start()
        self._rated = torch.zeros_like(self._rated)

    def on_test_epoch_end(self) -> None:
        """Log the means over all samples of all ranks."""
        super().on_test_epoch_end()
        if self.rating is not None:
            total, count = self.trainer.strategy.reduce(self._rated.to(self.device), reduce_op="sum")
            self.log("test/motion_log_likelihood", (total / count).float())

    # -- videos ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def make_videos(
        self, batch: Batch, sampling: Sampling, on_step: Any = None, backbone: Optional[Backbone] = None
    ) -> Tensor:
        """Videos, pixels (B, 3, F, H, W) in [-1, 1].

        Without context the appearance model's clip under the mixed score. With context the frames that follow given ones: the
        batch's own first frames where it has clips, else those of a clip of the appearance model.
        """
        text = self.text(batch, self.backbone)
        empty = None if sampling.guidance == 1.0 else self.backbone.unconditional(sampling.negative_prompt)
        with self.run_precision():
            if self.differences.given:
                latents = self._continued(batch, sampling, text, empty)
            else:
                latents = self._appearance_clip(batch, sampling, text, empty, self.mixing.weight, on_step)
        return self.backbone.decode(latents)

    def _appearance_clip(
        self,
        batch: Batch,
        sampling: Sampling,
        text: Conditioning,
        empty: Optional[Conditioning],
        weight: float,
        on_step: Any = None,
    ) -> Tensor:
        """A clip of the appearance model, with so much of the motion score in it."""
        appearance = self.appearance
        if appearance is None:
            raise UsageError(
                "videos of a motion model alone",
                "appearance: a model of frames, or clips whose first frames are gone on from",
                "give the job an appearance model",
            )
        denoise = appearance.guided(text, empty, sampling.guidance)
        if weight > 0:
            motion = self.model.denoiser(text, None, empty, sampling.guidance)
            how = self.mixing
            denoise = mixed(denoise, motion, appearance.schedule, self.differences, weight, how.form, how.low, how.high)
        generators = [keyed_generator(sampling.seed, "sampler", name) for name in batch.ids]
        noise = self.noise_for(batch.ids, sampling)
        return appearance.run_sampler(denoise, noise, sampling.steps, generators, on_step)

    def _continued(self, batch: Batch, sampling: Sampling, text: Conditioning, empty: Optional[Conditioning]) -> Tensor:
        """Given frames, and window by window what follows them."""
        k = self.differences.context
        channels, frames, height, width = self.backbone.latent_shape(sampling.frames, sampling.height, sampling.width)
        if batch.latents is not None or batch.pixels is not None:
            context = super().clean_latents(batch, self.backbone)[:, :, :k]
        else:
            context = self._appearance_clip(batch, sampling, text, empty, 0.0)[:, :, :k]
        window = self.together(frames)
        times = ode_times(self.backbone.schedule, int(sampling.steps))  # type: ignore[arg-type]
        shape = (channels, window, height, width)

        def say(before: Tensor, number: int) -> Tensor:
            drawn = [keyed_noise(shape, sampling.seed, "window", number, name) for name in batch.ids]
            noise = self.differences.noise_of(torch.stack(drawn).to(before.device))
            denoise = self.model.denoiser(text, before, empty, sampling.guidance)
            *_, (_, u) = ode_path(denoise, noise, self.backbone.schedule, times)
            return u / self.differences.scale

        rest = roll_windows(say, context, frames - k, window, self.windows.stride, self.windows.weights)
        return torch.cat([context.float(), rest], 2)
