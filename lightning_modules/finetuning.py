"""Finetuning of all weights, some weights, or an adapter, under a list of losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Optional

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.base import DiffusionModule, Sampling, freeze, present_sum
from lightning_modules.gradients import exchange, scale, total_norm, whole_ones
from lightning_modules.optimization import LearningRate
from lightning_modules.parallel import FullyShard
from muybridge.backbones.adapters import LoRA, check_lora, inject, resolve_range
from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_generator
from muybridge.diffusion.steps import DenoisingStep, denoising_step
from muybridge.diffusion.timesteps import TimestepSampler, Uniform
from muybridge.errors import UsageError
from muybridge.export import export_adapter, export_pipeline
from muybridge.losses import Loss

MAX_SKIPPED = 20
"""After so many updates in a row without a finite gradient a run has diverged."""


class Finetuning(DiffusionModule):
    r"""Train a backbone, or an adapter on it, on clips with captions.

    Args:
        backbone: What is trained; ``class_path: Pretrained`` picks the family from the checkpoint.
        losses: Losses of one denoising step, such as ``Denoising`` or one of your own.
        loss_weights: A weight for each loss; all 1 where not given.
        timesteps: Which times are drawn.
        adapter: Train a LoRA instead of the weights.
        trainable: Full-match regex of the weights to train, such as
            ``transformer\.blocks\.\d+\.attn1\..*``; all of them where
            neither this nor an adapter is given.
        optimizer: The optimizer.
        learning_rate: Warm-up and decay of the learning rate.
        caption_dropout: Share of samples trained with the empty caption, which keeps guidance working.
        validation_quantiles: Where between clean (0) and noise (1) the validation loss is measured. They do not depend on
            ``timesteps``, and the noise is the same for every run and every checkpoint, so that curves compare.
        sampling: How ``predict`` and the ``Samples`` callback make videos.
        seed: All randomness of training is a function of this seed, the sample's place in the run and its id.
    """

    def __init__(
        self,
        backbone: Backbone,
        losses: list[Loss],
        loss_weights: Optional[list[float]] = None,
        timesteps: TimestepSampler = Uniform(),  # noqa: B008 - immutable, and printed by --print_config
        adapter: Optional[LoRA] = None,
        trainable: Optional[str] = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        learning_rate: LearningRate = LearningRate(),  # noqa: B008
        caption_dropout: float = 0.1,
        validation_quantiles: list[float] = [0.1, 0.3, 0.5, 0.7, 0.9],  # noqa: B006
        sampling: Sampling = Sampling(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not losses:
            raise UsageError("losses is empty", "at least one loss, such as Denoising")
        weights = list(loss_weights) if loss_weights is not None else [1.0] * len(losses)
        if len(weights) != len(losses):
            raise UsageError(f"{len(losses)} losses and {len(weights)} loss_weights", "one weight for each loss")
        if not 0.0 <= caption_dropout < 1.0:
            raise UsageError(f"caption_dropout is {caption_dropout}", "a share from 0 to below 1")
        if not validation_quantiles or not all(0.0 < q < 1.0 for q in validation_quantiles):
            raise UsageError(f"validation_quantiles is {validation_quantiles}", "numbers between 0 and 1")
        if adapter is not None and trainable is not None:
            raise UsageError(
                "both adapter and trainable are given", "one of them", "an adapter freezes all of the base"
            )
        self.backbone = backbone
        self.losses = nn.ModuleList(losses)
        self.loss_names = unique_names(losses)
        self.loss_weights = weights
        self.timesteps = timesteps
        self.adapter = adapter
        self.trainable = trainable
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.caption_dropout = caption_dropout
        self.validation_quantiles = list(validation_quantiles)
        self.sampling = sampling
        self.seed = seed
        self._skipped_in_a_row = 0
        self._sums: dict[float, Tensor] = {}

    # -- setting up ------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Backbone]:
        return {"backbone": self.backbone}

    @property
    def sampled(self) -> Backbone:
        return self.backbone

    def check(self) -> None:
        low, high = self.timesteps.bounds(self.backbone.schedule)
        networks = self.backbone.networks_between(low, high)
        if len(networks) > 1 and self._trainer is not None and self.trainer.world_size > 1:
            raise UsageError(
                f"{self.backbone.family} has {len(networks)} experts, and the time range of this job trains all of them at once",
                "one expert a run on several ranks, or ranks whose times fall to different experts wait for each other for ever",
                "set timesteps.low or timesteps.high at the experts' boundary, and finetune one after the other",
            )
        if self.adapter is not None:
            check_lora(self.backbone, self.adapter)
            first, last = resolve_range(self.backbone, self.adapter.t_min, self.adapter.t_max)
            if low < first or high > last:
                raise UsageError(
                    f"times are drawn from {low:g} to {high:g}, and the adapter acts from {first:g} to {last:g}",
                    "times inside the adapter's range: outside it nothing is trained",
                    f"set timesteps.low to {{value: {first:g}}} and timesteps.high to {{value: {last:g}}}",
                )
        if self.trainable is not None:
            check_trainable(self.backbone, self.trainable)

    def check_text(self) -> None:
        if self.caption_dropout > 0 and not self.can_encode(self.backbone, ""):
            raise UsageError(
                f"caption_dropout is {self.caption_dropout}, and neither a text encoder nor a cache gives the empty caption",
                "one of them",
                "add text_encoder to the backbone's components, train from a muybridge cache, or set caption_dropout to 0",
            )

    def prepare(self) -> None:
        if self.adapter is not None:
            inject(self.backbone, self.adapter)
        elif self.trainable is not None:
            freeze(self.backbone.networks, self.trainable)
        else:
            # An expert that never works in this range would sit in the optimizer without a gradient.
            used = self.backbone.networks_between(*self.timesteps.bounds(self.backbone.schedule))
            for name, network in self.backbone.networks.items():
                network.requires_grad_(name in used)

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trained, and its schedule per update."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        total = float(self.trainer.estimated_stepping_batches)
        scheduler = self.learning_rate.schedule(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- one step --------------------------------------------------------------------------------------------------

    def noised_forward(
        self, clean: Tensor, noise: Tensor, t: Tensor, text: Conditioning, batch: Batch
    ) -> DenoisingStep:
        """Noise the latents, run the network, collect all that a loss may want."""
        schedule, weights, present = self.backbone.schedule, batch.weights, batch.present
        return denoising_step(self.backbone, schedule, clean, noise, t, text, weights, present)

    def draw(self, batch: Batch, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, times and caption dropout of a training batch, on the CPU.

        Keyed by (seed, place, id), where the place counts the samples of the run: the numbers are the same however the
        global batch is cut into ranks, micro-batches and slots, and after a resume, and a clip that comes again (one clip
        on many ranks, repeats, drawing with replacement) is noised anew.
        """
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer is not None else (1, 0)
        noise, u, drop = [], [], []
        for slot, name in enumerate(batch.ids):
            # Ranks take turns in the order of an epoch, as datamodules.sampling deals it out.
            generator = keyed_generator(self.seed, "train", self.samples_seen + slot * ranks + rank, name)
            u.append(torch.rand((), generator=generator, dtype=torch.float64))
            drop.append(torch.rand((), generator=generator) < self.caption_dropout)
            noise.append(torch.randn(tuple(shape), generator=generator))
        t = self.timesteps.quantile(torch.stack(u), self.backbone.schedule)
        return torch.stack(noise), t, torch.stack(drop)

    def losses_of(self, step: DenoisingStep) -> dict[str, Tensor]:
        """Every loss by name, one number per sample."""
        values = {}
        for name, loss in zip(self.loss_names, self.losses, strict=True):
            value = loss(step)
            if not isinstance(value, Tensor) or value.shape != (step.clean.shape[0],):
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UsageError(
                    f"the loss {name} returned {given}",
                    f"one number per sample, ({step.clean.shape[0]},)",
                    "reduce over everything but the batch: muybridge.losses.per_sample does",
                )
            values[name] = value
        return values

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, one number per sample."""
        return torch.stack([w * values[n] for n, w in zip(self.loss_names, self.loss_weights, strict=True)]).sum(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch."""
        clean = self.clean_latents(batch, self.backbone)
        text = self.text(batch, self.backbone)
        noise, t, drop = (x.to(clean.device) for x in self.draw(batch, clean.shape[1:]))
        if bool(drop.any()):
            empty = self.backbone.pair_unconditional(text, self.backbone.unconditional().to(clean.device))
            text = Conditioning.where(~drop, text, empty)
        return self.learn(self.losses_of(self.noised_forward(clean, noise, t, text, batch)), batch)

    def learn(self, values: dict[str, Tensor], batch: Batch) -> Tensor:
        """What is minimised: the mean of the weighted losses over the samples that are there; logged, and each loss with it."""
        share = self.share_of_batch(batch)
        loss = present_sum(self.total(values), batch.present) / share
        size = len(batch)
        self.samples_seen += size * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        if len(values) > 1:
            means = {f"train/{n}": present_sum(v, batch.present) / share for n, v in values.items()}
            self.log_dict(means, batch_size=size, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient norm, before clipping; an update that is not finite is skipped, on all ranks."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if isinstance(self.trainer.strategy, FullyShard):
            # What a loss learns of its own is not sharded, and DDP, which would exchange it, is not there.
            exchange(self.trainer.strategy, whole_ones(gradients))
        norm = total_norm(gradients)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if bool(torch.isfinite(norm)):
            self._skipped_in_a_row = 0
            return
        # The norm is that of the whole gradient on every rank, so that all of them skip.
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise UsageError(
                f"the gradient was not finite in {MAX_SKIPPED} updates in a row, the last number {self.updates}",
                "a run that has not diverged",
                "go on from an earlier checkpoint with a smaller learning rate, or with trainer.gradient_clip_val",
            )
        rank_zero_warn(f"update {self.updates}: the gradient is not finite, its step is skipped")
        for parameter in self.parameters():
            parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip; where shards and whole weights are trained together, by the norm of both, which torch does not take."""
        trained = [p for p in self.parameters() if p.grad is not None]
        whole = whole_ones(p.grad for p in trained)
        if not gradient_clip_val or gradient_clip_algorithm == "value" or len(whole) in (0, len(trained)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        size = float(total_norm([p.grad for p in trained]))
        if size > gradient_clip_val:
            scale(trained, gradient_clip_val / size)

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement."""
        self._sums.clear()

    def on_test_epoch_start(self) -> None:
        """Begin a measurement."""
        self._sums.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The losses at fixed noise and fixed times."""
        self._measure(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples of all ranks."""
        self._log_measured("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all samples of all ranks."""
        self._log_measured("test")

    def _measure(self, batch: Batch) -> None:
        clean, size = self.clean_latents(batch, self.backbone), len(batch)
        text = self.text(batch, self.backbone)
        shape = tuple(clean.shape[1:])
        everything = Uniform()
        count = torch.tensor(float(size)) if batch.present is None else batch.present.sum()
        for q in self.validation_quantiles:
            noise = torch.stack(
                [torch.randn(shape, generator=keyed_generator(0, "validation", name, str(q))) for name in batch.ids]
            )
            t = everything.quantile(torch.full((size,), q), self.backbone.schedule).to(clean.device)
            values = self.total(self.losses_of(self.noised_forward(clean, noise.to(clean), t, text, batch)))
            total = torch.stack([present_sum(values, batch.present).double(), count.to(values.device).double()])
            self._sums[q] = self._sums.get(q, torch.zeros_like(total)) + total

    def _log_measured(self, stage: str) -> None:
        """Sums and counts are added up over ranks, since these may hold different numbers of samples."""
        if not self._sums:
            return
        sums = self.trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
        means = (sums[:, 0] / sums[:, 1]).float()
        for q, mean in zip(self._sums, means, strict=True):
            self.log(f"{stage}/loss_t{1000 * q:03.0f}", mean)
        self.log(f"{stage}/loss", means.mean(), prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Videos of the batch's prompts; the ``Samples`` callback writes them."""
        return self.make_videos(batch, self.sampling)

    # -- out -------------------------------------------------------------------------------------------------------

    def export(self, out: str) -> list[str]:
        """The result as files for others: a diffusers pipeline directory, or the adapter's own files.

        A run that kept an average exports the average.
        """
        with self.averaged():
            if self.adapter is not None:
                return [str(p) for p in export_adapter(self.backbone, out)]
            return [str(export_pipeline(self.backbone, out))]


def check_trainable(backbone: Backbone, trainable: str) -> None:
    """Refuse a regex that hits no parameter, before any is loaded."""
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise UsageError(f"trainable {trainable!r} is no regular expression ({error})", "a Python regex") from error
    names = [f"{net}.{n}" for net in backbone._present_networks() for n, _ in backbone.skeleton(net).named_parameters()]
    if not any(pattern.fullmatch(name) for name in names):
        near = [name for name in names if pattern.search(name)][:3] or names[:3]
        raise UsageError(
            f"trainable {trainable!r} matches no parameter",
            f"a regex that matches whole names, such as {', '.join(near)}",
        )


def unique_names(losses: Sequence[nn.Module]) -> list[str]:
    """A short name for each loss; a class used twice gets numbers."""
    names: list[str] = []
    for loss in losses:
        base = type(loss).__name__
        count = sum(n == base or n.startswith(f"{base}_") for n in names)
        names.append(base if count == 0 else f"{base}_{count + 1}")
    return names
