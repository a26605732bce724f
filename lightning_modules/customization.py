"""Teaching a model the motion of one or a few clips, without their look."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_modules.base import Sampling
from lightning_modules.finetuning import Finetuning
from lightning_modules.optimization import LearningRate
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.customization.inverted import Inverted, read_inverted
from muybridge.customization.references import spoken
from muybridge.customization.tau import Tau
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.data.memory import Memory
from muybridge.data.reading import Reading, survey
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.inversion import mix_noise
from muybridge.diffusion.timesteps import TimestepSampler, Uniform
from muybridge.errors import UsageError
from muybridge.losses import Loss
from muybridge.losses.frozen_attention import FrozenAttention
from muybridge.proving_ground.captions import split_caption

MANY = 64
"""So many references are looked into before a run; more are a data set, whose bad files are counted as they come."""


class MotionCustomization(Finetuning):
    r"""Train a small adapter on the attention that carries motion, at the times at which motion is settled.

    Times are drawn from τ to 1000, and the adapter acts there alone: below τ every step of the sampler is the base model's,
    bit for bit. The range travels in the adapter's file.

    Args:
        backbone: What is customized; ``class_path: Pretrained`` picks the family from the checkpoint.
        losses: Losses of one denoising step; ``Denoising`` alone is the plain recipe.
        loss_weights: A weight for each loss; all 1 where not given.
        tau: Where motion ends and looks begin: a value, ``{from_probe: FOLDER}``, or the family's published one. 0 is all times.
        adapter: The LoRA; rank 4 on the value and output projections of the motion-carrying attention by default.
        timesteps: Which times are drawn; cut at τ.
        optimizer: The optimizer.
        learning_rate: Warm-up and decay of the learning rate.
        captions: ``split`` refuses captions that do not part subject and motion (``a man | runs``); ``free`` takes any.
        keep_bar: Give the text encoder captions with their bar, for models that were trained so.
        caption_dropout: Share of samples trained with the empty caption.
        inverted: Noise of a reference that ``muybridge invert`` wrote, to be mixed into the noise that videos start from.
        beta: How much of it: 0 is none, 1 nothing else. Published recipes take 0.3 to 0.5; more leaks the reference's look.
        validation_quantiles: Where between clean (0) and noise (1) the validation loss is measured.
        sampling: How ``predict`` and the ``Samples`` callback make videos.
        seed: All randomness of training is a function of this seed, the sample's place in the run and its id.
    """

    def __init__(
        self,
        backbone: Backbone,
        losses: list[Loss],
        loss_weights: Optional[list[float]] = None,
        tau: Tau = Tau(),  # noqa: B008 - immutable, and printed by --print_config
        adapter: LoRA = LoRA(),  # noqa: B008
        timesteps: TimestepSampler = Uniform(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-4, weight_decay=0.01),
        learning_rate: LearningRate = LearningRate(),  # noqa: B008
        captions: Literal["split", "free"] = "split",
        keep_bar: bool = False,
        caption_dropout: float = 0.0,
        inverted: Optional[str] = None,
        beta: float = 0.0,
        validation_quantiles: list[float] = [0.1, 0.3, 0.5, 0.7, 0.9],  # noqa: B006
        sampling: Sampling = Sampling(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        if adapter.t_min is not None or adapter.t_max is not None:
            raise UsageError(
                "the adapter of MotionCustomization has a time range of its own",
                "tau alone: it says where the adapter acts and which times are drawn",
                "move adapter.t_min to tau, or use Finetuning",
            )
        if captions not in ("split", "free"):
            raise UsageError(f"captions is {captions!r}", "split or free")
        if (beta > 0.0) is not (inverted is not None) or not 0.0 <= beta <= 1.0:
            raise UsageError(
                f"beta is {beta} and inverted is {inverted!r}",
                "both or neither: how much of which noise",
                "`muybridge invert` writes the noise of a clip; beta is from 0 to 1",
            )
        boundary = tau.resolve(backbone)
        if boundary.value > 0.0:
            adapter = replace(adapter, t_min=boundary)
            if timesteps.low is None:
                timesteps = copy.copy(timesteps)
                timesteps.low = boundary
        super().__init__(
            backbone=backbone,
            losses=losses,
            loss_weights=loss_weights,
            timesteps=timesteps,
            adapter=adapter,
            optimizer=optimizer,
            learning_rate=learning_rate,
            caption_dropout=caption_dropout,
            validation_quantiles=validation_quantiles,
            sampling=sampling,
            seed=seed,
        )
        self.tau = boundary.value
        self.captions, self.keep_bar = captions, keep_bar
        self.inverted, self.beta = inverted, beta
        self._latents: Memory[Tensor] = Memory(2**30, lambda latents: latents.nbytes)
        self._start: Optional[Inverted] = None

    def check(self) -> None:
        super().check()
        for loss in self.losses:
            if isinstance(loss, FrozenAttention):
                loss.check(self.backbone)
        if self.inverted is not None:
            self._start = read_inverted(self.inverted, self.backbone)
            size = self.sampling
            wanted = self.backbone.latent_shape(size.frames, size.height, size.width)
            if tuple(self._start.noise.shape) != wanted:
                raise UsageError(
                    f"{self.inverted} is noise of shape {tuple(self._start.noise.shape)}",
                    f"{wanted}, as sampling.frames, height and width ask for",
                    "invert the clip at the size that is sampled",
                )

    def check_text(self) -> None:
        super().check_text()
        data = getattr(self._trainer, "datamodule", None)
        for clips in getattr(data, "_sets", {}).values():
            for clip in getattr(clips, "clips", ()):
                if self.captions == "split":
                    check_caption(clip.id, clip.caption)
                self._check_cached(clip.caption or "")
            if len(getattr(clips, "clips", ())) <= MANY and hasattr(clips, "reading"):
                check_files(clips.clips, list(clips.buckets), clips.reading)

    def _check_cached(self, caption: str) -> None:
        """Refuse embeddings of captions with bars where prompts are spoken without; a cache holds captions as written."""
        if self._cache is not None and spoken(caption, self.keep_bar) != caption:
            raise UsageError(
                f"the cache holds the caption {caption!r} encoded with its bar, and videos are asked for without bars",
                "one way to speak",
                "leave data.cache out (the few captions of a customization are encoded once), or set keep_bar to true for a model"
                " that was trained with bars",
            )

    def on_train_start(self) -> None:
        """Encode the few texts of the whole run, and give the text encoder's memory back; it may be more than the network's."""
        data = getattr(self.trainer, "datamodule", None)
        sets = getattr(data, "_sets", {}).values()
        captions = {clip.caption or "" for clips in sets for clip in getattr(clips, "clips", ())}
        if not 0 < len(captions) <= MANY or "text_encoder" not in self.backbone.components or self._cache is not None:
            return
        callbacks: list[Any] = getattr(self.trainer, "callbacks", [])
        shown = [prompt for callback in callbacks for prompt in getattr(callback, "prompts", ())]
        wanted = sorted(captions | set(shown))
        self.text(Batch(ids=wanted, prompts=wanted), self.backbone)
        if self.caption_dropout > 0.0:
            self.backbone.unconditional()
        if shown and self.sampling.guidance != 1.0:
            self.backbone.unconditional(self.sampling.negative_prompt)
        self.backbone.release("text_encoder")

    def clean_latents(self, batch: Batch, backbone: Backbone) -> Tensor:
        """The references' latents, encoded once."""
        blank = batch.present is not None and not bool(batch.present.all())
        if batch.latents is not None or batch.pixels is None or blank:
            return super().clean_latents(batch, backbone)
        keys = [(name, tuple(clip.shape), glance(clip)) for name, clip in zip(batch.ids, batch.pixels, strict=True)]
        found = [self._latents.find(key) for key in keys]
        known = [one for one in found if one is not None]
        if len(known) == len(batch):
            return torch.stack(known).to(backbone.device)
        latents = super().clean_latents(batch, backbone)
        for key, one in zip(keys, latents, strict=True):
            self._latents.put(key, one.cpu())
        return latents

    def text(self, batch: Batch, backbone: Backbone) -> Conditioning:
        """The batch's conditioning, without the bars of its captions."""
        if batch.conditioning is None and batch.prompts is not None:
            batch = replace(batch, prompts=[spoken(p, self.keep_bar) for p in batch.prompts])
        return super().text(batch, backbone)

    def can_encode(self, backbone: Backbone, prompt: str) -> bool:
        return super().can_encode(backbone, spoken(prompt, self.keep_bar))

    def noise_for(self, ids: list[str], sampling: Sampling) -> Tensor:
        """Starting noise, with the reference's mixed in where that is asked for."""
        fresh = super().noise_for(ids, sampling)
        if self._start is None:
            return fresh
        return mix_noise(self._start.noise.to(fresh).expand_as(fresh), fresh, self.beta)


def check_caption(name: str, caption: Optional[str]) -> None:
    """Refuse a reference whose caption does not part its subject and its motion."""
    try:
        split_caption(caption or "")
    except UsageError as error:
        raise UsageError(
            f"the caption of {name} is {caption!r}",
            "a subject and a motion with a bar between, such as 'a man | runs to the left'",
            "write it so, that prompts can keep the motion and change the subject, or set captions to free",
        ) from error


def check_files(clips: Sequence[Clip], buckets: list[Bucket], reading: Reading) -> None:
    """Refuse references that can't be used, such as one that is shorter than the model's clip; looks at packets alone.

    Args:
        clips: The references.
        buckets: Sizes of clips.
        reading: How clips are made of videos.
    """
    for clip in clips:
        problem = next((c.problem for c in survey(clip, buckets, reading).clips if c.problem), None)
        if problem is not None:
            raise UsageError(
                f"the reference {clip.path} can't be used: {problem}",
                f"a video that fills a clip of {buckets[0]} (frames x height x width)",
                "give a longer clip, set fewer data.frames, or a higher data.fps",
            )


def glance(clip: Tensor) -> bytes:
    """A digest of some thousand of a clip's pixels: files of different folders, and windows of one file, may have one name.

    Args:
        clip: (3, F, H, W).
    """
    flat = clip.detach().reshape(-1)
    # No stride that pixels' rows or planes have.
    some = flat[:: max(1, flat.numel() // 4096) | 1]
    return hashlib.blake2b(some.float().cpu().numpy().tobytes(), digest_size=16).digest()
