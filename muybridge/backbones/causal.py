"""Block-causal attention on a backbone's own network, and clips made block by block.

A causal student sees, from a frame of some block, the frames of that block and of the blocks before it. diffusers' network is
used as it is: a hook on its rotary embedding hands every attention layer a plan of the call, and a processor follows the plan.
No mask is built: each block's queries attend once, without a mask, to the keys up to the block's end. That runs on every
attention kernel, n blocks cost (n + 1)/2n of full attention, and what comes later cannot reach what is earlier, not even by
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from muybridge.diffusion import samplers
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.predictions import guide
from muybridge.diffusion.rollouts import simulate
from muybridge.errors import UsageError

if TYPE_CHECKING:
    from muybridge.backbones.base import Backbone

Span = tuple[int, int]
"""From where to before where."""


@dataclass(frozen=True)
class Causal:
    """Which frames a frame sees: those of its own block and of the blocks before.

    Args:
        block: Latent frames of a block; the clip's whole number of them is the plain model.
        first: Latent frames of the first block, where it is another number (1: the first frame stands alone).
    """

    block: int = 3
    first: Optional[int] = None

    def __post_init__(self) -> None:
        if self.block < 1 or (self.first is not None and self.first < 1):
            raise UsageError(
                f"causal blocks of {self.block} latent frames"
                + (f", the first of {self.first}" if self.first is not None else ""),
                "whole numbers of at least 1",
                "81 frames of Wan are 21 latent frames, 7 blocks of 3",
            )

    def spans(self, frames: int) -> list[Span]:
        """The blocks of a clip of so many latent frames; refuses a clip that they don't fill."""
        first = self.first if self.first is not None else self.block
        rest = frames - first
        if rest < 0 or rest % self.block:
            count = max(round(rest / self.block), 0)
            near = sorted({first + max(count + i, 0) * self.block for i in (-1, 0, 1)})
            raise UsageError(
                f"{frames} latent frames in causal blocks of {self.block}"
                + (f" after a first one of {first}" if first != self.block else ""),
                f"a number of latent frames that the blocks fill, such as {', '.join(map(str, near))}",
                "change causal.block or causal.first, or the frames of the clip (81 frames of Wan are 21 latent frames)",
            )
        starts = [0, *range(first, frames, self.block)]
        return list(zip(starts, [*starts[1:], frames], strict=True))

    def per_frame(self, per_block: Tensor, frames: int) -> Tensor:
        """One number for each block, (B, blocks), as one for each frame, (B, F)."""
        spans = self.spans(frames)
        if per_block.ndim != 2 or per_block.shape[1] != len(spans):
            raise ValueError(f"{tuple(per_block.shape)} numbers for {len(spans)} blocks: expected (B, blocks)")
        lengths = torch.tensor([b - a for a, b in spans], device=per_block.device)
        return per_block.repeat_interleave(lengths, dim=1)


def check_causal(family: str, per_frame_times: bool, known: bool, networks: Sequence[str]) -> None:
    """Refuse a causal backbone of a family that can't be one; needs no weights.

    Args:
        family: Its name.
        per_frame_times: Whether its network takes a time for each frame.
        known: Whether the family says how its attention is made causal.
        networks: The networks that the checkpoint holds.
    """
    if not per_frame_times:
        raise UsageError(
            f"a causal {family}",
            "a family with per-frame times (Wan): the blocks of a causal clip are at different noise levels at once, and "
            f"{family}'s network modulates all frames, and the text, by one time",
            "take causal out of the backbone's settings, or use a Wan checkpoint",
        )
    if not known:
        raise UsageError(
            f"a causal {family}",
            "a family that says how its attention is made causal (Wan)",
            f"{family} has per-frame times, so it can be: write its _make_causal, see docs/plug-in-a-backbone.md",
        )
    if len(networks) > 1:
        raise UsageError(
            f"a causal {family} with {len(networks)} experts ({', '.join(networks)})",
            "a checkpoint with one network: an expert is chosen for a whole call, so a later block's time would decide which "
            "weights earlier blocks run through",
            "use Wan 2.1 (1.3B or 14B) or 2.2's TI2V-5B",
        )


# -- what a call is told -----------------------------------------------------------------------------------------------

KeysValues = tuple[Tensor, Tensor]


class Memory:
    """Keys and values of the blocks that are finished, by layer: (B, tokens, heads, head channels), already rotated.

    Blocks are added and never written into, so that what a backward pass saved of them stays what it was.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.blocks: list[dict[int, KeysValues]] = []

    def add(self, frames: int, block: dict[int, KeysValues]) -> None:
        """Take in a finished block.

        Args:
            frames: Its latent frames.
            block: Its keys and values by layer.
        """
        self.frames += frames
        self.blocks.append(block)

    @property
    def nbytes(self) -> int:
        """Memory of all blocks."""
        return sum(k.nbytes + v.nbytes for block in self.blocks for k, v in block.values())


class Plan(tuple[Any, ...]):
    """A rotary embedding ``(cos, sin)`` that also says who attends to whom.

    It travels as an argument of every block, so a checkpointed block is recomputed under the plan of its forward, whatever has
    been switched since.
    """

    spans: list[Span]
    past: tuple[dict[int, KeysValues], ...]
    kept: Optional[dict[int, KeysValues]]

    @classmethod
    def of(
        cls,
        rotary: tuple[Tensor, Tensor],
        spans: list[Span],
        past: Sequence[dict[int, KeysValues]] = (),
        kept: Optional[dict[int, KeysValues]] = None,
    ) -> Plan:
        """A plan.

        Args:
            rotary: Of the call's tokens.
            spans: The blocks, in tokens of the call.
            past: Keys and values of each block before the call, by layer.
            kept: Where the call leaves its own, by layer.
        """
        plan = cls(rotary)
        plan.spans, plan.past, plan.kept = spans, tuple(past), kept
        return plan


class Switch:
    """What the causal layers of one backbone do at the moment.

    Args:
        causal: The blocks.
    """

    def __init__(self, causal: Causal) -> None:
        self.causal = causal
        self.on = True
        self.memory: Optional[Memory] = None
        self.write: Optional[dict[int, KeysValues]] = None


class _RotaryHook:
    """Turns what the rotary module gives into a plan. Called with (module, args, output) after each of its calls."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __call__(self, rope: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        if not self.switch.on:
            return output
        frames, height, width = args[0].shape[2:]
        tokens = (height // rope.patch_size[1]) * (width // rope.patch_size[2])
        memory = self.switch.memory
        if memory is None:
            return Plan.of(output, [(a * tokens, b * tokens) for a, b in self.switch.causal.spans(frames)])
        # The positions after those in memory: the module looks at nothing but the shape.
        whole = rope.forward(torch.empty((1, 1, memory.frames + frames, height, width), device="meta"))
        cos, sin = (x[:, memory.frames * tokens :] for x in whole)
        return Plan.of((cos, sin), [(0, frames * tokens)], memory.blocks, self.switch.write)


class CausalProcessor:
    """Self-attention of one layer under a plan; without one, the processor that was there before.

    Args:
        plain: The processor that was there.
        layer: The layer's place in the network.
    """

    def __init__(self, plain: Any, layer: int) -> None:
        self.plain, self.layer = plain, layer

    # diffusers' own methods choose the attention kernel by setting these.
    @property
    def _attention_backend(self) -> Any:
        return self.plain._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.plain._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.plain._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        if value is not None:
            raise UsageError("context parallelism on a causal backbone", "data parallelism or FSDP2")
        self.plain._parallel_config = value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        rotary_emb: Optional[tuple[Tensor, Tensor]] = None,
    ) -> Tensor:
        """As diffusers calls it."""
        if not isinstance(rotary_emb, Plan):
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        if rotary_emb.kept is not None:
            rotary_emb.kept[self.layer] = (key.detach(), value.detach())
        own = key.shape[1]
        if rotary_emb.past:
            keys, values = zip(*(block[self.layer] for block in rotary_emb.past), strict=True)
            key, value = torch.cat([*keys, key], 1), torch.cat([*values, value], 1)
        before = key.shape[1] - own
        parts = [
            dispatch_attention_fn(
                query[:, start:stop],
                key[:, : before + stop],
                value[:, : before + stop],
                backend=self._attention_backend,
            )
            for start, stop in rotary_emb.spans
        ]
        hidden_states = torch.cat(parts, 1).flatten(2, 3).type_as(query)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of neighbouring channels; every angle stands twice in ``cos`` and ``sin``."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).type_as(x)


def install(network: nn.Module, attention: Sequence[Any], rope: nn.Module, causal: Causal) -> Switch:
    """Make a network's self-attention causal; returns the switch.

    Args:
        network: For messages.
        attention: Its self-attention modules, in order.
        rope: The module whose output they all are given.
        causal: The blocks.
    """
    if not attention:
        raise RuntimeError(f"{type(network).__name__} has no self-attention to make causal")
    switch = Switch(causal)
    rope.register_forward_hook(_RotaryHook(switch))
    for layer, module in enumerate(attention):
        module.set_processor(CausalProcessor(module.processor, layer))
    return switch


# -- switching ---------------------------------------------------------------------------------------------------------


def switch_of(backbone: Backbone) -> Optional[Switch]:
    """The switch of a causal backbone that is loaded; ``None`` of any other."""
    found: Optional[Switch] = backbone._parts.get("causal")
    return found


def is_causal(backbone: Backbone) -> bool:
    """Whether its calls are causal at the moment."""
    switch = switch_of(backbone)
    return backbone.causal is not None and (switch is None or switch.on)


@contextmanager
def bidirectional(backbone: Backbone) -> Iterator[None]:
    """Inside it all frames see one another, as in the model the checkpoint came from.

    For a teacher and a critic that share a causal student's weights. A backward pass may come after it is left.

    Args:
        backbone: Causal or not.
    """
    switch = switch_of(backbone)
    if switch is None:
        if backbone.causal is not None:
            raise RuntimeError("bidirectional() on a backbone that is not loaded yet")
        yield
        return
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before


@contextmanager
def remembering(backbone: Backbone, memory: Memory, write: bool = False) -> Iterator[dict[int, KeysValues]]:
    """Inside it a call is given one block alone: the frames that follow those in ``memory``, which it attends to too.

    Args:
        backbone: A causal backbone, loaded.
        memory: What is known of the frames before.
        write: Collect the block's own keys and values, for :meth:`Memory.add`.
    """
    switch = switch_of(backbone)
    if switch is None:
        raise UsageError(f"a memory of a {backbone.family} that is not causal", "a backbone with causal: {block: ...}")
    before = switch.on, switch.memory, switch.write
    switch.on, switch.memory, switch.write = True, memory, {} if write else None
    try:
        yield switch.write if switch.write is not None else {}
    finally:
        switch.on, switch.memory, switch.write = before


# -- block by block ----------------------------------------------------------------------------------------------------

SampleBlock = Callable[[samplers.Denoiser, Tensor], Tensor]
"""(denoiser of one block, its noise) -> the clean block."""


class Rollout:
    """A clip that grows block by block, each attending to the finished ones through their keys and values.

    ::

        rollout = Rollout(backbone, conditioning)
        for start, stop in causal.spans(frames):
            rollout.append(few_step(rollout.denoise, noise[:, :, start:stop], schedule, steps))
        clip = rollout.clip

    A block costs one call a step and one more, at time 0 without gradient, that leaves its keys and values; under guidance each
    twice. :meth:`denoise` may run with gradient: it then flows through the block at hand and stops at the finished ones.

    Args:
        backbone: A causal backbone, loaded.
        conditioning: One per sample.
        unconditional: The other branch of guidance; the empty prompt where not given.
        guidance: Standard guidance scale; 1 is none.
    """

    def __init__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        unconditional: Optional[Conditioning] = None,
        guidance: float = 1.0,
    ) -> None:
        self.backbone, self.guidance = backbone, guidance
        self.branches = [(conditioning, Memory())]
        if guidance != 1.0:
            self.branches.append((backbone.pair_unconditional(conditioning, unconditional), Memory()))
        self.blocks: list[Tensor] = []

    @property
    def clip(self) -> Tensor:
        """All finished blocks, (B, C, F, H, W)."""
        return torch.cat(self.blocks, 2)

    def denoise(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The raw prediction for the next block, under guidance."""
        predictions = []
        for conditioning, memory in self.branches:
            with remembering(self.backbone, memory):
                predictions.append(self.backbone.denoise(noisy, t, conditioning))
        return predictions[0] if len(predictions) == 1 else guide(predictions[1], predictions[0], self.guidance)

    @torch.no_grad()
    def append(self, clean: Tensor, last: bool = False) -> None:
        """Take a block as finished.

        Args:
            clean: (B, C, frames of the block, H, W).
            last: No block follows, so its keys and values are not needed.
        """
        self.blocks.append(clean.detach())
        if last:
            return
        t = torch.zeros(clean.shape[0], device=clean.device)
        for conditioning, memory in self.branches:
            with remembering(self.backbone, memory, write=True) as block:
                self.backbone.denoise(clean.detach(), t, conditioning)
            memory.add(clean.shape[2], block)


@torch.no_grad()
def stream(
    backbone: Backbone,
    noise: Tensor,
    conditioning: Conditioning,
    sample_block: SampleBlock,
    unconditional: Optional[Conditioning] = None,
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """The blocks of a clip as they are finished, (B, C, frames of the block, H, W) each.

    Args:
        backbone: A causal backbone, loaded.
        noise: Of the whole clip, (B, C, F, H, W).
        conditioning: One per sample.
        sample_block: Makes a block from its noise.
        unconditional: The other branch of guidance; the empty prompt where not given.
        guidance: Standard guidance scale; 1 is none.
    """
    assert backbone.causal is not None
    rollout = Rollout(backbone, conditioning, unconditional, guidance)
    for start, stop in backbone.causal.spans(noise.shape[2]):
        rollout.append(sample_block(rollout.denoise, noise[:, :, start:stop]), last=stop == noise.shape[2])
        yield rollout.blocks[-1]


@torch.no_grad()
def simulate_blocks(
    backbone: Backbone,
    noise: Tensor,
    conditioning: Conditioning,
    steps: Sequence[float],
    generator: Optional[samplers.Generators] = None,
) -> list[Tensor]:
    """What a causal student is given at each of its steps when it samples, and last the clip that it makes.

    Each block is rolled out on the keys and values of the finished ones, as :meth:`Backbone.sample` does it: what a block is
    given follows from clean blocks before it, never from ones as noisy as itself.

    Args:
        backbone: A causal student, loaded.
        noise: Of the whole clip, (B, C, F, H, W).
        conditioning: One per sample.
        steps: Its falling times.
        generator: Source of the fresh noises.
    """
    assert backbone.causal is not None
    rollout, parts = Rollout(backbone, conditioning), []
    for start, stop in backbone.causal.spans(noise.shape[2]):
        part = simulate(rollout.denoise, noise[:, :, start:stop], backbone.schedule, steps, generator, to_end=True)
        rollout.append(part[-1], last=stop == noise.shape[2])
        parts.append(part)
    return [torch.cat(blocks, 2) for blocks in zip(*parts, strict=True)]
