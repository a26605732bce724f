"""What every job shares: roles, loading, sharding, averages, counters, and what a checkpoint holds."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import muybridge
from lightning_modules.parallel import FullyShard
from muybridge.averaging import WeightAverage
from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.data.cache import Cache
from muybridge.data.memory import Memory
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_generator, keyed_noise
from muybridge.errors import UsageError


@dataclass
class Sampling:
    """How a job makes videos: in ``predict``, and in the ``Samples`` callback during training.

    Args:
        steps: A number runs the checkpoint's own scheduler; a list of falling times runs the few-step sampler.
        guidance: Standard guidance scale, ``u + s (c - u)``; 1 is none.
        negative_prompt: The other branch of guidance.
        frames: Frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second of the files.
        seed: The noise of a clip is a function of this seed and the clip's id alone.
    """

    steps: int | list[float] = 50
    guidance: float = 5.0
    negative_prompt: str = ""
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    seed: int = 0


class DiffusionModule(pl.LightningModule, ABC):
    """A job on one or several backbones.

    A subclass names its roles, says in :meth:`check` what can be wrong before anything is loaded, and in :meth:`prepare`
    which weights are trained. Everything below is then the same for all jobs: weights are loaded in ``configure_model``
    (so that a strategy can shard them), a checkpoint holds what is trained and nothing else, and updates are counted here
    because Lightning's ``global_step`` adds up all optimizers of a job.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.samples_seen = 0
        self.average: Optional[WeightAverage] = None
        # Set by callbacks.EMA before configure_model runs, because the buffers must exist before the strategy sets up.
        self.average_requested = False
        # Encoded prompts, on the CPU; a long one of a large encoder takes megabytes.
        self._texts: Memory[Conditioning] = Memory(2**30, lambda text: text.nbytes)
        self._cache: Optional[Cache] = None
        # Frozen weights are absent from checkpoints on purpose; load_state_dict below checks the rest.
        self.strict_loading = False
        # Networks stay in eval mode on purpose: dropout would make a loss depend on more than (seed, place, id), and the
        # few layers of these families that have any are trained without it in every recipe we know.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    # -- what a job says of itself ---------------------------------------------------------------------------------

    @abstractmethod
    def roles(self) -> dict[str, Backbone]:
        """The backbones of this job by role, such as student, teacher, critic."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what can't work, before weights load."""

    @abstractmethod
    def prepare(self) -> None:
        """Inject adapters, freeze; called once, after loading and before sharding."""

    def check_text(self) -> None:
        """Refuse a job that will want a text it can't have; called once caches are known, before weights load."""

    def to_average(self) -> Optional[set[str]]:
        """Names of the trained parameters that ``callbacks.EMA`` averages; all of them where ``None``."""
        return None

    @property
    @abstractmethod
    def sampled(self) -> Backbone:
        """The backbone whose videos are this job's result."""

    # -- setting up ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load, prepare, shard, average; once, whatever number of times Lightning calls it."""
        roles = self.roles()
        self._take_cache()
        if any(backbone.networks for backbone in roles.values()):
            return
        data = getattr(self._trainer, "datamodule", None)
        one = getattr(data, "clip_size", None)
        for clip in getattr(data, "clip_sizes", [one] if one is not None else []):
            self.sampled.check_clip(*clip)
        self.check()
        self.check_text()
        self._check_frame_rate(data)
        precision = str(getattr(self._trainer, "precision", "32-true"))
        if precision.endswith("-true") and precision not in ("32-true", "64-true"):
            raise UsageError(
                f"trainer.precision is {precision}, which turns all weights and batches to 16 bits",
                "bf16-mixed: the same arithmetic, with weights and losses in float32",
                "for a smaller frozen base set the backbone's dtype to bfloat16",
            )
        for role, backbone in roles.items():
            if "denoiser" not in backbone.components:
                raise UsageError(
                    f"the {role} was given components {list(backbone.components)}", "components that include denoiser"
                )
            backbone.materialize()
        self.prepare()
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            raise UsageError(
                f"{type(self).__name__} trains no parameter", "at least one", "check the adapter and trainable settings"
            )
        low = {str(p.dtype) for p in trained if p.dtype not in (torch.float32, torch.float64)}
        if low:
            raise UsageError(
                f"weights to train were loaded in {', '.join(sorted(low))}: steps of a small learning rate round to nothing",
                "dtype: float32 for trained weights, with Trainer precision bf16-mixed for speed",
                "set the backbone's dtype to float32, or train an adapter (it is kept in float32)",
            )
        strategy = getattr(self._trainer, "strategy", None)
        if isinstance(strategy, FullyShard):
            for backbone in roles.values():
                strategy.shard(backbone)
        if self.average_requested:
            self.average = WeightAverage(self, self.to_average())
            # DDP would send all buffers before every forward; each rank makes the same averages of the same weights.
            self._ddp_params_and_buffers_to_ignore = [f"average.{name}" for name, _ in self.average.named_buffers()]

    def _check_frame_rate(self, data: Any) -> None:
        """Warn where a network whose positions are seconds is told another rate than the clips have."""
        told = getattr(self.sampled, "frame_rate", None)
        windows = getattr(getattr(data, "reading", None), "windows", None)
        for name, fps in (
            ("data.fps", getattr(windows, "fps", None)),
            ("sampling.fps", getattr(getattr(self, "sampling", None), "fps", None)),
        ):
            if told is not None and fps is not None and fps != told:
                pl.utilities.rank_zero_warn(
                    f"{name} is {fps:g} and the backbone's frame_rate {told:g}: {self.sampled.family} takes them for clips that"
                    " run faster or slower than they do; give both the same"
                )

    def _take_cache(self) -> None:
        """Check the datamodule's cache against the model, and let it stand in for the text encoder."""
        cache = getattr(getattr(self._trainer, "datamodule", None), "cache", None)
        if cache is None:
            return
        cache.check_backbone(self.sampled)
        if "text" in cache.columns:
            self._cache = cache
            for backbone in self.roles().values():
                for negative_prompt in cache.negative_prompts:
                    backbone.give_unconditional(cache.unconditional(negative_prompt), negative_prompt)

    def on_fit_start(self) -> None:
        """Say once what is trained."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        names = ", ".join(f"{role} {backbone.family}" for role, backbone in self.roles().items())
        pl.utilities.rank_zero_info(f"{type(self).__name__} of {names}: trains {trained:,} of {total:,} parameters")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _kept(self) -> set[str]:
        """Names of what a checkpoint holds: trained parameters, and buffers that belong to no backbone."""
        kept = {n for n, p in self.named_parameters() if p.requires_grad}
        roles = tuple(f"{n}." for n, m in self.named_modules() if isinstance(m, Backbone))
        return kept | {n for n, _ in self.named_buffers() if not n.startswith(roles)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained, and the averages of it."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        kept = {prefix + name for name in self._kept()}
        for name in [n for n in state if n not in kept]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained weights; anything missing or left over is an error, never silence."""
        check_weights(set(state_dict), self._kept(), type(self).__name__)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters, and what made this file; plain types only, so that it loads with ``weights_only``."""
        checkpoint["muybridge"] = {
            "version": muybridge.__version__,
            "job": type(self).__name__,
            "updates": self.updates,
            "samples_seen": self.samples_seen,
            "roles": {role: {"family": b.family, "path": b.checkpoint.given} for role, b in self.roles().items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters; refuses another job's file."""
        made = checkpoint.get("muybridge")
        if made is None:
            raise UsageError(
                "this checkpoint was not written by muybridge", "a checkpoint of this job", "check ckpt_path"
            )
        if made["job"] != type(self).__name__:
            raise UsageError(
                f"this checkpoint is of the job {made['job']}", f"one of {type(self).__name__}", "check ckpt_path"
            )
        for role, backbone in self.roles().items():
            family = made["roles"].get(role, {}).get("family")
            if family != backbone.family:
                raise UsageError(f"the checkpoint's {role} is {family}", f"{backbone.family}, as the config says")
        self.updates, self.samples_seen = made["updates"], made["samples_seen"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One update of the only optimizer of a job with automatic optimisation."""
        super().optimizer_step(*args, **kwargs)
        self.updates += 1

    # -- batches ---------------------------------------------------------------------------------------------------

    def clean_latents(self, batch: Batch, backbone: Backbone) -> Tensor:
        """The batch's latents, encoded now where the source is video."""
        if batch.latents is not None:
            return batch.latents
        if batch.pixels is None:
            raise UsageError(
                "a batch with neither pixels nor latents",
                "a datamodule that yields video (VideoData) or cached latents",
                f"{type(self).__name__} can't train on prompts alone",
            )
        return backbone.encode(batch.pixels)

    def text(self, batch: Batch, backbone: Backbone) -> Conditioning:
        """The batch's conditioning, encoded now where the source is text. Each prompt is encoded once per run."""
        if batch.conditioning is not None:
            return batch.conditioning
        if batch.prompts is None:
            raise UsageError(
                "a batch with neither prompts nor text embeddings", "one of them", "give the clips captions"
            )
        known: dict[str, Conditioning] = {}
        missing = []
        for prompt in dict.fromkeys(batch.prompts):
            found = self._texts.find(prompt)
            if found is None and self._cache is not None and self._cache.has_text(prompt):
                found = self._cache.text(prompt)
            if found is None:
                missing.append(prompt)
            else:
                known[prompt] = found
        if missing:
            encoded = backbone.encode_text(missing)
            for i, prompt in enumerate(missing):
                known[prompt] = encoded[i].to("cpu")
                self._texts.put(prompt, known[prompt])
        return Conditioning.cat([known[p] for p in batch.prompts]).to(backbone.device)

    def can_encode(self, backbone: Backbone, prompt: str) -> bool:
        """Whether a prompt's conditioning is to be had: from a text encoder, from a cache, or given beforehand."""
        cached = self._cache is not None and self._cache.has_text(prompt)
        return "text_encoder" in backbone.components or cached or prompt in backbone.given_texts

    def check_prompts(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Refuse to promise videos of prompts that nothing can encode, or in steps that the model does not have."""
        self.sampled.steps_of(sampling.steps)
        branch = [sampling.negative_prompt] if sampling.guidance != 1.0 else []
        lost = [p for p in (*prompts, *branch) if not self.can_encode(self.sampled, p)]
        if lost:
            raise UsageError(
                f"videos are asked for of prompts that no text encoder and no cache gives, first {lost[0]!r}",
                "a text encoder, or these prompts in the cache",
                "add text_encoder to the backbone's components, or take the prompts from the cached captions",
            )

    def share_of_batch(self, batch: Batch) -> Tensor:
        """Samples that are there, over all ranks, per rank.

        Strategies average gradients over ranks; dividing by this rather than by the rank's own count makes that the mean
        over the samples, also where clips were skipped on one rank alone. All ranks call it together.
        """
        count = torch.tensor(float(len(batch)), device=self.device)
        if batch.present is not None:
            count = batch.present.sum().to(self.device, torch.float32)
        share = self.trainer.strategy.reduce(count, reduce_op="mean")
        if float(share) > 0:
            return share
        pl.utilities.rank_zero_warn(
            f"update {self.updates}: no clip of the batch is there ({', '.join(batch.ids[:3])}), and nothing is learnt from it"
        )
        return torch.ones_like(count)

    def averaged(self) -> AbstractContextManager[Any]:
        """Inside it the averaged weights are in place, where the run keeps an average."""
        return self.average.swapped(self) if self.average is not None else nullcontext()

    def run_precision(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run's steps. Lightning enters it for its own steps alone, not for hooks and other verbs."""
        return self._trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    # -- videos ----------------------------------------------------------------------------------------------------

    def noise_for(self, ids: list[str], sampling: Sampling) -> Tensor:
        """Starting noise: a function of the sampling seed and each clip's id."""
        shape = self.sampled.latent_shape(sampling.frames, sampling.height, sampling.width)
        return torch.stack([keyed_noise(shape, sampling.seed, "sample", i) for i in ids]).to(self.sampled.device)

    @torch.no_grad()
    def make_videos(
        self, batch: Batch, sampling: Sampling, on_step: Any = None, backbone: Optional[Backbone] = None
    ) -> Tensor:
        """Videos for a batch of prompts, pixels (B, 3, F, H, W) in [-1, 1].

        Under a sharded strategy every rank must call this together.

        Args:
            batch: Ids and prompts.
            sampling: How.
            on_step: Called after each step of the sampler.
            backbone: Which of the job's; the one whose videos are its result where not given.
        """
        backbone = backbone if backbone is not None else self.sampled
        conditioning = self.text(batch, backbone)
        empty = None if sampling.guidance == 1.0 else backbone.unconditional(sampling.negative_prompt)
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            with self.run_precision():
                latents = backbone.sample(
                    self.noise_for(batch.ids, sampling),
                    conditioning,
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    unconditional=empty,
                    generator=[keyed_generator(sampling.seed, "sampler", name) for name in batch.ids],
                    on_step=on_step,
                )
        finally:
            for module, mode in modes:
                module.training = mode
        return backbone.decode(latents)


def check_weights(given: set[str], wanted: set[str], job: str) -> None:
    """Refuse a checkpoint whose weights are not those the configuration trains."""
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} that the config trains, first {missing[0]}")
    if extra:
        parts.append(f"holds {len(extra)} that it does not, first {extra[0]}")
    averages = all(name.startswith("average.") for name in missing + extra)
    raise UsageError(
        f"the checkpoint's weights do not fit this {job}: it {' and '.join(parts)}",
        "the same adapter, trainable and EMA settings as in the run that wrote it",
        "add or remove callbacks.EMA" if averages else "use that run's config.yaml",
    )


def present_sum(values: Tensor, present: Optional[Tensor]) -> Tensor:
    """The sum over the samples that are there.

    A skipped clip is blanked rather than cut out, so that its rank still runs the same backward.
    """
    return values.sum() if present is None else torch.where(present, values, torch.zeros_like(values)).sum()


def freeze(module: nn.Module, trainable: Optional[str] = None) -> list[str]:
    """Freeze all parameters but those whose whole name matches the regex; returns the names left trainable."""
    pattern = re.compile(trainable) if trainable is not None else None
    left = []
    for name, parameter in module.named_parameters():
        keep = pattern is not None and pattern.fullmatch(name) is not None
        parameter.requires_grad_(keep)
        if keep:
            left.append(name)
    return left
