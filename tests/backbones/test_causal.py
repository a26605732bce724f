"""A causal backbone: nothing earlier hears of what is later, and a clip made block by block is the one of the full forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.denoising import denoising_inputs
from torch import Tensor

from muybridge.backbones import Backbone, Causal, Pretrained, load
from muybridge.backbones.adapters import LoRA, disabled, inject
from muybridge.backbones.causal import Memory, Rollout, bidirectional, is_causal, remembering, stream
from muybridge.backbones.taps import AttentionTap
from muybridge.diffusion import few_step, keyed_generator
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
FRAMES = 6
STEPS = [1000.0, 750.0, 500.0]


@pytest.fixture(scope="module")
def wan(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("wan")


@pytest.fixture(scope="module")
def causal(wan: Path) -> Backbone:
    """Blocks of two frames. For reading; tests that change one open their own."""
    return load(str(wan), causal=Causal(block=2), max_text_length=16)


@pytest.fixture(scope="module")
def plain(wan: Path) -> Backbone:
    return load(str(wan), max_text_length=16)


def call(backbone: Backbone, frames: int = FRAMES) -> tuple[Tensor, Tensor, object]:
    """Two samples of so many frames, each block at a time of its own."""
    _, _, text = denoising_inputs(backbone)
    latents = torch.randn(2, 16, frames, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([[900.0, 300.0, 600.0], [100.0, 700.0, 0.0]]).repeat_interleave(2, 1)[:, :frames]
    return latents, t, text


# -- the blocks --------------------------------------------------------------------------------------------------------


def test_blocks_fill_a_clip_or_are_refused_with_the_nearest_that_do() -> None:
    assert Causal(3).spans(6) == [(0, 3), (3, 6)]
    assert Causal(2, first=1).spans(5) == [(0, 1), (1, 3), (3, 5)]
    assert Causal(21).spans(21) == [(0, 21)]
    with pytest.raises(UsageError, match="20 latent frames in causal blocks of 3") as caught:
        Causal(3).spans(20)
    assert "21" in str(caught.value)
    with pytest.raises(UsageError, match="at least 1"):
        Causal(0)
    per_frame = Causal(2, first=1).per_frame(torch.tensor([[1.0, 2.0, 3.0]]), 5)
    assert per_frame.tolist() == [[1.0, 2.0, 2.0, 3.0, 3.0]]


@pytest.mark.parametrize("name", ["cogvideox", "latte", "unet3d", "hunyuan", "mochi", "animatediff"])
def test_a_family_without_per_frame_times_is_refused_before_anything_loads(name: str, tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="a family with per-frame times"):
        Pretrained(str(tiny_checkpoint(name)), causal=Causal(3))


def test_a_family_with_per_frame_times_that_nobody_has_made_causal_yet_is_refused_too(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="how its attention is made causal"):
        Pretrained(str(tiny_checkpoint("ltx")), causal=Causal(3))


def test_two_experts_are_refused(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="2 experts"):
        Pretrained(str(tiny_checkpoint("wan22")), causal=Causal(3))


def test_a_clip_that_the_blocks_do_not_fill_is_refused_before_anything_loads(wan: Path) -> None:
    backbone = Pretrained(str(wan), causal=Causal(block=2))
    with pytest.raises(UsageError, match="3 latent frames in causal blocks of 2"):
        backbone.check_clip(9, 16, 16)
    backbone.check_clip(13, 16, 16)


# -- causality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2])
def test_what_changes_later_changes_nothing_earlier_bit_for_bit(block: int, causal: Backbone) -> None:
    latents, t, text = call(causal)
    changed, later = latents.clone(), t.clone()
    changed[:, :, 2 * block :] = 100.0 * torch.randn_like(changed[:, :, 2 * block :])
    later[:, 2 * block :] = 555.0
    with torch.no_grad():
        before, after = causal(latents, t, text), causal(changed, later, text)
    assert torch.equal(before[:, :, : 2 * block], after[:, :, : 2 * block])
    assert not torch.equal(before[:, :, 2 * block :], after[:, :, 2 * block :])


def test_what_changes_earlier_changes_what_is_later(causal: Backbone) -> None:
    latents, t, text = call(causal)
    changed = latents.clone()
    changed[:, :, 0] += 1.0
    with torch.no_grad():
        difference = (causal(latents, t, text) - causal(changed, t, text)).abs().amax((0, 1, 3, 4))
    assert bool((difference > 0).all()), "the first frame is seen by all"


def test_gradients_flow_backwards_in_time_alone(causal: Backbone) -> None:
    latents, t, text = call(causal)
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(causal(latents, t, text)[:, :, 2:4].square().sum(), latents)
    seen = gradient.abs().amax((0, 1, 3, 4)) > 0
    assert seen.tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("per_frame", [True, False])
def test_one_block_for_the_whole_clip_is_the_plain_model(per_frame: bool, wan: Path, plain: Backbone) -> None:
    whole = load(str(wan), causal=Causal(block=FRAMES), max_text_length=16)
    latents, t, text = call(plain)
    t = t if per_frame else t[:, 0]
    with torch.no_grad():
        assert torch.equal(whole(latents, t, text), plain(latents, t, text))
    generators = [[keyed_generator(0, "s", i) for i in range(2)] for _ in range(2)]
    made = [b.sample(latents, text, STEPS, 3.0, generator=g) for b, g in zip((whole, plain), generators, strict=True)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(whole.sample(latents, text, 3), plain.sample(latents, text, 3))


def test_the_attention_is_that_of_a_block_causal_mask(causal: Backbone, wan: Path) -> None:
    """The plain network under a mask given to torch's own attention function."""
    masked = load(str(wan), max_text_length=16)
    blocks = torch.arange(FRAMES).div(2, rounding_mode="floor").repeat_interleave(4)
    mask = blocks[:, None] >= blocks[None, :]

    class Masked:
        _attention_backend = _parallel_config = None

        def __init__(self, processor):
            self.processor = processor

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return self.processor(attn, hidden_states, encoder_hidden_states, mask[None, None], rotary_emb)

    for block in masked.network.blocks:
        block.attn1.set_processor(Masked(block.attn1.processor))
    latents, t, text = call(causal)
    with torch.no_grad():
        assert torch.allclose(causal(latents, t, text), masked(latents, t, text), rtol=0, atol=2e-6)


def test_bidirectional_is_the_plain_model_even_if_its_backward_comes_later(wan: Path, plain: Backbone) -> None:
    shared = load(str(wan), causal=Causal(block=2), max_text_length=16, gradient_checkpointing=True)
    latents, t, text = call(plain)

    def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor]:
        named = dict(backbone.network.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    with bidirectional(shared):
        assert not is_causal(shared)
        both = shared(latents, t, text)
    assert is_causal(shared)
    only = shared(latents, t, text)
    assert torch.equal(both, plain(latents, t, text))
    wanted = gradients(plain, plain(latents, t, text).square().mean())
    found = gradients(shared, both.square().mean())
    assert all(torch.allclose(found[n], wanted[n], rtol=0, atol=1e-7) for n in wanted)
    # Recomputed after the other mode has run, the causal pass is causal still.
    again = load(str(wan), causal=Causal(block=2), max_text_length=16)
    wanted = gradients(again, again(latents, t, text).square().mean())
    with bidirectional(shared):
        found = gradients(shared, only.square().mean())
    assert all(torch.allclose(found[n], wanted[n], rtol=0, atol=1e-7) for n in wanted)


# -- block by block ----------------------------------------------------------------------------------------------------


def test_a_block_on_the_memory_of_clean_blocks_is_that_of_the_full_forward(causal: Backbone) -> None:
    """The full forward with clean blocks at time 0 before the block at hand, one call for every block."""
    latents, _, text = call(causal)
    rollout = Rollout(causal, text)
    assert causal.causal is not None
    for start, stop in causal.causal.spans(FRAMES):
        t = torch.tensor([800.0, 200.0])
        times = torch.zeros(2, FRAMES)
        times[:, start:stop] = t[:, None]
        with torch.no_grad():
            wanted = causal(latents, times, text)[:, :, start:stop]
            found = rollout.denoise(latents[:, :, start:stop], t)
        assert torch.allclose(found, wanted, rtol=0, atol=2e-6)
        rollout.append(latents[:, :, start:stop])
    assert rollout.clip.equal(latents)
    tokens, layers = FRAMES * 4, len(causal.network.blocks)
    assert rollout.branches[0][1].nbytes == 2 * layers * 2 * tokens * 24 * 4


def test_a_cached_clip_is_the_one_of_full_forwards(causal: Backbone) -> None:
    """All of sampling without any memory: every step runs the network on the whole clip so far."""
    latents, _, text = call(causal)
    guidance, empty = 3.0, causal.unconditional()
    generators = [keyed_generator(0, "s", i) for i in range(2)]
    found = causal.sample(latents, text, STEPS, guidance, empty, generators)

    generators = [keyed_generator(0, "s", i) for i in range(2)]
    made: list[Tensor] = []
    for start, stop in causal.causal.spans(FRAMES):

        def denoise(noisy: Tensor, t: Tensor, start: int = start) -> Tensor:
            times = torch.cat([torch.zeros(2, start), t[:, None].expand(2, noisy.shape[2])], 1)
            clip = torch.cat([*made, noisy], 2)
            both = [causal(clip, times, c)[:, :, start:] for c in (empty.expand(2), text)]
            return both[0] + guidance * (both[1] - both[0])

        made.append(few_step(denoise, latents[:, :, start:stop], causal.schedule, STEPS, generators))
    assert torch.allclose(found, torch.cat(made, 2), rtol=0, atol=2e-5)


def test_blocks_come_as_they_are_made_and_steps_are_counted_over_all(causal: Backbone) -> None:
    latents, _, text = call(causal)

    def sample(denoise, noise):
        generator = torch.Generator().manual_seed(stop.pop(0))
        return few_step(denoise, noise, causal.schedule, STEPS, generator)

    stop = [1, 2, 3]
    blocks = list(stream(causal, latents, text, sample))
    assert [b.shape[2] for b in blocks] == [2, 2, 2]
    changed = latents.clone()
    changed[:, :, 4:] = 0.0
    stop = [1, 2, 3]
    others = list(stream(causal, changed, text, sample))
    assert [a.equal(b) for a, b in zip(blocks, others, strict=True)] == [True, True, False]
    seen: list[tuple[int, int]] = []
    causal.sample(latents, text, STEPS, on_step=lambda i, n, t, z: seen.append((i, n)))
    assert seen == [(i, 9) for i in range(9)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_block_stop_at_finished_ones_and_are_those_of_the_full_forward(
    checkpointed: bool, wan: Path
) -> None:
    backbone = load(str(wan), causal=Causal(block=2), max_text_length=16, gradient_checkpointing=checkpointed)
    latents, _, text = call(backbone)
    t = torch.tensor([800.0, 200.0])
    rollout = Rollout(backbone, text)
    rollout.append(latents[:, :, :2])
    noisy = latents[:, :, 2:4].clone().requires_grad_()
    prediction = rollout.denoise(noisy, t)
    # What follows before the backward pass must not reach into it.
    rollout.append(latents[:, :, 2:4])
    rollout.denoise(latents[:, :, 4:], t)
    (found,) = torch.autograd.grad(prediction.square().mean(), noisy)

    whole = torch.cat([latents[:, :, :2], noisy], 2)
    times = torch.cat([torch.zeros(2, 2), t[:, None].expand(2, 2)], 1)
    (wanted,) = torch.autograd.grad(backbone(whole, times, text)[:, :, 2:].square().mean(), noisy)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-7)


def test_a_memory_needs_a_causal_backbone(plain: Backbone) -> None:
    with pytest.raises(UsageError, match="not causal"), remembering(plain, Memory()):
        pass
    with bidirectional(plain):
        assert not is_causal(plain)


# -- with adapters, taps -----------------------------------------------------------------------------------------------


def test_an_adapter_and_a_bidirectional_teacher_share_one_base(wan: Path, plain: Backbone) -> None:
    """The student is the causal base with its adapter, the teacher the same weights without both."""
    shared = load(str(wan), causal=Causal(block=2), max_text_length=16, gradient_checkpointing=True)
    inject(shared, LoRA(rank=2, projections=["q", "k", "v", "o"]))
    latents, t, text = call(plain)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    student = shared(latents, t, text)
    with torch.no_grad(), bidirectional(shared), disabled(shared):
        assert torch.equal(shared(latents, t, text), plain(latents, t, text))
    changed = latents.clone()
    changed[:, :, 4:] += 1.0
    assert torch.equal(shared(changed, t, text)[:, :, :4], student[:, :, :4])
    student.square().mean().backward()
    reached = [p.grad.abs().max() > 0 for n, p in shared.named_parameters() if "lora_" in n]
    assert reached
    assert all(reached)


def test_cross_attention_of_a_causal_backbone_is_read_as_of_any(causal: Backbone, plain: Backbone) -> None:
    latents, t, text = call(causal)
    with torch.no_grad(), bidirectional(causal):
        taps = [AttentionTap(b, kind="cross") for b in (causal, plain)]
        for tap, backbone in zip(taps, (causal, plain), strict=True):
            tap.run(lambda backbone=backbone: backbone.denoise(latents, t, text))
    assert [r.name for r in taps[0].records] == [r.name for r in taps[1].records]
    assert all(torch.equal(a.query, b.query) for a, b in zip(*(tap.records for tap in taps), strict=True))
