"""What losses share that compare attention of the frozen base between what the student predicts and what is true.

The base is the student's own network with its adapters off: no second copy of the weights is held. Gradients flow through the
pass on the prediction, so ``backward()`` comes after the adapters are on again; under gradient checkpointing every block is
recomputed with the switches of its forward (``muybridge.backbones.gates``). The pass ends after the last layer that is read.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.adapters import disabled
from muybridge.backbones.attention import AttentionRecord
from muybridge.backbones.base import Backbone
from muybridge.backbones.taps import AttentionTap, Kind, is_sharded
from muybridge.diffusion.schedules import broadcast_time
from muybridge.diffusion.steps import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss, per_sample

STAGES = ("transformer_in", "down_blocks", "mid_block")
"""Parts of a UNet in the order in which they run; what is in none of them runs after these."""


def in_order(names: Sequence[str]) -> list[str]:
    """Modules of one network in the order in which they run."""

    def stage(name: str) -> int:
        top = name.split(".")[0]
        return STAGES.index(top) if top in STAGES else len(STAGES)

    return sorted(names, key=stage)  # stable: blocks of one list stay in their order


def first_layers(backbone: Backbone, pattern: str, depth: float) -> str:
    """A regex of the first share of the attention modules that ``pattern`` hits, as they run.

    Args:
        backbone: With its network loaded.
        pattern: Full-match regex of attention modules.
        depth: The share, more than 0 and up to 1; at least one module.
    """
    compiled = re.compile(pattern)
    names = in_order([n for n, _ in backbone.network.named_modules() if compiled.fullmatch(n)])
    kept = names[: max(1, round(depth * len(names)))] if names else []
    return "|".join(re.escape(n) for n in kept) or pattern


class FrozenAttention(Loss):
    """Attention of the frozen base on the student's noisy prediction against that on the true noisy latents.

    Both are latents of one time ``t' = t - jump``: what a sampler's step of that length makes of the student's prediction, and
    what it makes of the truth. A subclass compares the records.

    Args:
        t_min: Samples at this time or below count for nothing.
        jump: Length of the step in timesteps. The published code takes 1; the two latents then differ by a thousandth, which
            a network in bfloat16 rounds away.
        layers: Full-match regex of the attention modules that are read; those of ``depth`` where not given.
        depth: The first share of the family's own motion-carrying and cross attention modules.
    """

    kinds: tuple[Kind, ...] = ("temporal",)
    reads_keys: bool = False
    """Whether a record's keys are compared as features, which positions must not be turned into."""

    def __init__(
        self, t_min: float = 500.0, jump: float = 20.0, layers: Optional[str] = None, depth: float = 0.5
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0.0 <= t_min < 1000.0:
            raise UsageError(f"{name} t_min is {t_min}", "a time from 0 to below 1000")
        if not 0.0 < jump <= 500.0:
            raise UsageError(f"{name} jump is {jump}", "a number of timesteps above 0, such as 20")
        if not 0.0 < depth <= 1.0:
            raise UsageError(f"{name} depth is {depth}", "a share above 0 and up to 1")
        self.t_min, self.jump, self.layers, self.depth = t_min, jump, layers, depth

    def check(self, backbone: Backbone) -> None:
        """Refuse what this family does not have, before any weight is read.

        Args:
            backbone: Loaded or not.
        """
        if self.layers is not None:
            AttentionTap(backbone.skeleton(), pattern=self.layers)

    @abstractmethod
    def compare(self, predicted: list[AttentionRecord], true: list[AttentionRecord]) -> Tensor:
        """The loss of each sample, (B,), from the same layers' records of both passes."""

    def forward(self, step: DenoisingStep) -> Tensor:
        backbone = step.network
        if not isinstance(backbone, Backbone):
            raise UsageError(
                f"{type(self).__name__} was given a step that does not say which network made it",
                "a step of a backbone",
                "a job's noised_forward makes one",
            )
        t = step.t if step.t.ndim == 1 else step.t.amax(1)
        counts = t > self.t_min
        # Ranks that share a network's weights must all run it, or those that do would wait for the others for ever.
        if not bool(counts.any()) and not is_sharded(backbone):
            return 0.0 * step.prediction.float().flatten(1).sum(1)
        boundary = _experts_part(backbone)
        high = t >= (0.0 if boundary is None else boundary)
        if bool(high.any()) and not bool(high.all()):
            # Two experts would read a part of the samples each, and layers of different samples can't be averaged.
            order = torch.cat([high.nonzero().flatten(), (~high).nonzero().flatten()]).argsort()
            return torch.cat([self(_rows(step, side.nonzero().flatten())) for side in (high, ~high)])[order]
        predicted, true, later = self.latents(step)
        tap = self._tap(backbone)
        with disabled(backbone):
            with torch.no_grad():
                tap.run(lambda: backbone.denoise(true, later, step.conditioning))
                wanted = list(tap.records)
            prediction = tap.run(lambda: backbone.denoise(predicted, later, step.conditioning))
            found = list(tap.records)
        tap.records.clear()
        value = self.compare(found, wanted)
        if prediction is not None:
            # FSDP gathers the weights of a block again when the gradient of its output arrives, and that of the last one that is
            # read would reach its attention alone.
            value = value + 0.0 * per_sample(prediction)
        return torch.where(counts, value, torch.zeros_like(value))

    def latents(self, step: DenoisingStep) -> tuple[Tensor, Tensor, Tensor]:
        """The student's and the true latents at the later time, and that time."""
        schedule, boundary = step.schedule, _experts_part(step.network)
        later = (step.t - self.jump).clamp(min=0.0)
        if boundary is not None:
            # The same weights read both, and ranks that share an expert's weights run the same expert.
            later = torch.where(step.t >= boundary, later.clamp(min=boundary), later)
        later = schedule.snap(later)
        alpha, sigma = (
            broadcast_time(c, step.clean).float() for c in schedule.coefficients(later.to(step.clean.device))
        )
        eps = schedule.to_eps(step.prediction, step.noisy, step.t)
        return alpha * step.x0.float() + sigma * eps, alpha * step.clean + sigma * step.noise, later

    def _tap(self, backbone: Backbone) -> AttentionTap:
        pattern = self.layers
        if pattern is None:
            own = [backbone.temporal_attention if "temporal" in self.kinds else None]
            crossing = backbone.cross_attention
            if "cross" in self.kinds:
                own.append(crossing if crossing is not None else backbone.temporal_attention)
            pattern = "|".join(dict.fromkeys(first_layers(backbone, one, self.depth) for one in own if one is not None))
        # Leaving a forward pass in its middle leaves the weights of a sharded network gathered.
        return AttentionTap(backbone, pattern=pattern, early_exit=not is_sharded(backbone), unturned=self.reads_keys)


def _experts_part(backbone: Optional[nn.Module]) -> Optional[float]:
    """The time at which another expert takes over, where there are two."""
    return getattr(backbone, "expert_boundary", None)


def _rows(step: DenoisingStep, index: Tensor) -> DenoisingStep:
    """Some samples of a step."""
    parts = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in ("schedule", "network")}
    return replace(step, **{name: part[index] for name, part in parts.items() if part is not None})


class LayerByLayer(FrozenAttention):
    """A loss that is the mean over the layers of attention over frames."""

    @abstractmethod
    def layer(self, predicted: AttentionRecord, true: AttentionRecord) -> Tensor:
        """The loss of each sample, (B,), from one layer's records of both passes."""

    def compare(self, predicted: list[AttentionRecord], true: list[AttentionRecord]) -> Tensor:
        pairs = list(zip(temporal(predicted), temporal(true), strict=True))
        if not pairs:
            raise UsageError(
                f"{type(self).__name__} read no attention over frames", "layers of that kind", "check layers"
            )
        return torch.stack([self.layer(*pair) for pair in pairs]).mean(0)


def temporal(records: Sequence[AttentionRecord]) -> list[AttentionRecord]:
    """Those of attention over frames."""
    return [r for r in records if r.role in ("factorised", "unified")]


def crossing(records: Sequence[AttentionRecord]) -> list[AttentionRecord]:
    """Those of attention to text, joint attention among them."""
    return [r for r in records if r.role == "cross" or (r.role == "unified" and r.text is not None)]


def key_features(record: AttentionRecord) -> Tensor:
    """The keys of attention over frames as features of every place, (B, F, places, heads · d): one layout for all families.

    Of unified attention they are taken before their rotation: turned by its frame, what stands still is another key in each.
    """
    if record.role == "factorised":
        keys = record.key.unflatten(0, (record.batch, -1)).movedim(3, 1)
    else:
        assert record.grid is not None
        return record.unturned_keys().unflatten(1, (record.grid[0], -1)).float()
    return keys.flatten(3).float()
