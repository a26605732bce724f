"""Attention taps: what they record is what torch computed, for every family, and the model never notices."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.denoising import denoising_inputs, open_tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from muybridge import tiny
from muybridge.backbones import Backbone
from muybridge.backbones.attention import AttentionRecord
from muybridge.backbones.taps import AttentionTap
from muybridge.errors import UsageError
from muybridge.losses.attention_motion_flow import expected_flow

Tiny = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", list(tiny.MAKERS))
BOTH = ("temporal", "cross")


class Witness(TorchFunctionMode):
    """Queries, values and results of every attention call: what the maps are held against."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.calls.append((bound["query"], bound["value"], out))
        return out


def hooks_of(backbone: Backbone) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


def assert_untouched(backbone: Backbone) -> None:
    assert hooks_of(backbone) == 0
    assert "_forward" not in backbone.__dict__
    assert not any(not isinstance(mode, Witness) for mode in _get_current_function_mode_stack())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def map_loss(records: list[AttentionRecord]) -> Tensor:
    """A number that depends on all maps, of order 1."""
    total = torch.zeros(())
    for record in records:
        if record.role in ("unified", "factorised"):
            total = (
                total + record.same_site_map().pow(2).sum(-1).mean() + record.frame_marginal(16).pow(2).sum(-1).mean()
            )
        if record.role == "cross" or record.text is not None:
            total = total + record.cross_map(chunk=16).pow(2).sum(-1).mean()
    return total


@every_family
def test_recomputed_attention_is_torchs(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    witness, tap = Witness(), AttentionTap(backbone, kind=BOTH)
    with torch.no_grad():
        expected = backbone.denoise(latents, t, text)
        with witness:
            prediction = tap.run(lambda: backbone.denoise(latents, t, text))
    assert torch.equal(prediction, expected)
    modules = sum(len(names) for names in tap._tapped.values())
    assert len(tap.records) == modules // len(backbone.networks)  # at one time one expert runs
    for record in tap.records:
        weights = record.attention_map()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)
        whole = [(value, out) for query, value, out in witness.calls if query is record.query]
        if whole:
            [(value, out)] = whole
            torch.testing.assert_close(weights @ value, out, atol=1e-5, rtol=1e-5)
            continue
        # Mochi: one call for each sample, unpadded.
        for sample, row in enumerate(weights):
            [(value, out)] = [
                (v, o) for q, v, o in witness.calls if torch.equal(q[0], record.query[sample, :, : q.shape[2]])
            ]
            length = value.shape[2]
            torch.testing.assert_close(row[:, :length, :length] @ value[0], out[0], atol=1e-5, rtol=1e-5)
            assert not row[:, :, length:].any()


@every_family
def test_maps_have_one_layout_in_all_families(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    frames, height, width = (n // p for n, p in zip(latents.shape[2:], backbone.geometry.patch, strict=True))
    tap = AttentionTap(backbone, kind=BOTH)
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, t, text))
    assert any(r.grid == (frames, height, width) for r in tap.records)
    temporal = [r for r in tap.records if r.role != "cross"]
    crossing = [r for r in tap.records if r.role == "cross" or r.text is not None]
    assert temporal
    assert crossing
    for record in temporal:
        assert record.grid is not None
        sites, heads = math.prod(record.grid[1:]), record.query.shape[1]
        for one in (record.same_site_map(), record.frame_marginal()):
            assert one.shape == (2, sites, heads, frames, frames)
        torch.testing.assert_close(
            record.same_site_map().sum(-1), torch.ones(2, sites, heads, frames), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(record.frame_marginal(7), record.frame_marginal(), atol=1e-6, rtol=1e-6)
    for record in crossing:
        assert record.grid is not None
        assert record.cross_map().shape[:3] == (2, record.query.shape[1], math.prod(record.grid))
        among = record.cross_map(among_text=True)
        torch.testing.assert_close(among.sum(-1), torch.ones(among.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx", "mochi"])
def test_parts_of_unified_attention_are_parts_of_its_whole_map(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    tap = AttentionTap(backbone)
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, t, text))
    for record in tap.records:
        assert record.grid is not None
        frames, sites = record.grid[0], math.prod(record.grid[1:])
        count, weights = frames * sites, record.attention_map()
        first = weights.shape[-1] - count if record.text == "first" else 0
        video = weights[:, :, first : first + count]
        square = video[..., first : first + count].unflatten(-1, (frames, sites)).unflatten(2, (frames, sites))
        marginal = square.sum(-1).permute(0, 3, 1, 2, 4)
        torch.testing.assert_close(record.frame_marginal(5), marginal, atol=1e-6, rtol=1e-5)
        same = square.diagonal(dim1=3, dim2=5).permute(0, 4, 1, 2, 3)
        same = same / same.sum(-1, keepdim=True)
        torch.testing.assert_close(record.same_site_map(), same, atol=1e-6, rtol=1e-4)
        if record.text is not None:
            to_text = record.cross_map(chunk=5).sum(-1).unflatten(2, (frames, sites)).permute(0, 3, 1, 2)
            torch.testing.assert_close(to_text + marginal.sum(-1), torch.ones_like(to_text), atol=1e-5, rtol=0)


@every_family
def test_a_sample_has_the_same_maps_alone_and_in_a_batch(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    together, alone = AttentionTap(backbone, kind=BOTH), AttentionTap(backbone, kind=BOTH)
    with torch.no_grad():
        together.run(lambda: backbone.denoise(latents, t, text))
        alone.run(lambda: backbone.denoise(latents[1:], t[1:], text[1]))
    for both, one in zip(together.records, alone.records, strict=True):
        assert both.name == one.name
        if both.role != "cross":
            torch.testing.assert_close(both.same_site_map()[1:], one.same_site_map(), atol=1e-5, rtol=1e-4)
        if both.role == "cross" or both.text is not None:
            a, b = both.cross_map()[1:], one.cross_map()
            torch.testing.assert_close(a[..., : b.shape[-1]], b, atol=1e-5, rtol=1e-4)


@every_family
def test_gradients_of_maps_survive_checkpointing_and_early_exit(name: str, tiny_checkpoint: Tiny) -> None:
    path = tiny_checkpoint(name)
    gradients = {}
    for recompute in (False, True):
        backbone = open_tiny(path, gradient_checkpointing=recompute)
        latents, t, text = denoising_inputs(backbone)
        with torch.no_grad():
            before = backbone.denoise(latents, t, text)
        for early in (False, True):
            noisy = latents.clone().requires_grad_()
            tap = AttentionTap(backbone, kind=BOTH, early_exit=early)
            result = tap.run(lambda: backbone.denoise(noisy, t, text))  # noqa: B023 - called at once
            assert (result is None) == early
            count = len(tap.records)
            map_loss(tap.records).backward()
            assert len(tap.records) == count
            gradients[recompute, early] = noisy.grad
            assert_untouched(backbone)
        with torch.no_grad():
            assert torch.equal(backbone.denoise(latents, t, text), before)
    reference = gradients[False, False]
    assert reference.abs().max() > 1e-6
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, reference, atol=1e-6 * float(reference.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["wan", "unet3d", "mochi"])
def test_recomputation_inside_the_tap_adds_no_record(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name), gradient_checkpointing=True)
    latents, t, text = denoising_inputs(backbone)
    with AttentionTap(backbone) as tap:
        noisy = latents.clone().requires_grad_()
        prediction = backbone.denoise(noisy, t, text)
        count = len(tap.records)
        (prediction.pow(2).mean() + map_loss(tap.records)).backward()
        assert len(tap.records) == count == len(tap._tapped[next(iter(tap._tapped))])
        assert not tap._visits
    assert noisy.grad is not None
    assert_untouched(backbone)


def test_early_exit_leaves_the_rest_uncomputed(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    ran = []
    handles = [
        backbone.network.get_submodule(f"blocks.{i}").register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i in range(2)
    ]
    tap = AttentionTap(backbone, pattern=r"blocks\.0\.attn1", early_exit=True)
    assert tap.run(lambda: backbone.denoise(latents, t, text)) is None
    assert ran == [0]
    assert [r.name for r in tap.records] == ["blocks.0.attn1"]
    for handle in handles:
        handle.remove()
    assert_untouched(backbone)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_exception_inside_leaves_nothing_behind(recompute: bool, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"), gradient_checkpointing=recompute)
    latents, t, text = denoising_inputs(backbone)
    expected = backbone.denoise(latents, t, text)

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    inside = backbone.network.get_submodule("blocks.1.attn1.to_v").register_forward_hook(fail)
    tap = AttentionTap(backbone, kind=BOTH, early_exit=True)
    with pytest.raises(KeyError, match="on purpose"):
        tap.run(lambda: backbone.denoise(latents, t, text))
    inside.remove()
    assert_untouched(backbone)
    assert torch.equal(backbone.denoise(latents, t, text), expected)
    assert tap.run(lambda: backbone.denoise(latents, t, text)) is None
    assert len(tap.records) == 4


def test_maps_are_full_precision_inside_mixed_precision(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    tap = AttentionTap(backbone)
    makers = (AttentionRecord.attention_map, AttentionRecord.same_site_map, lambda r: expected_flow(r, 2.0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tap.run(lambda: backbone.denoise(latents, t, text))
        inside = [make(r) for r in tap.records for make in makers]
    outside = [make(r) for r in tap.records for make in makers]
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_both_experts_are_recorded(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan22"))
    latents, _, text = denoising_inputs(backbone, samples=3)
    times = torch.tensor([900.0, 500.0, 950.0])
    tap = AttentionTap(backbone)
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, times, text))
    names = [(r.network, r.name, r.batch) for r in tap.records]
    assert names == [
        ("transformer", "blocks.0.attn1", 2),
        ("transformer", "blocks.1.attn1", 2),
        ("transformer_2", "blocks.0.attn1", 1),
        ("transformer_2", "blocks.1.attn1", 1),
    ]
    early = AttentionTap(backbone, early_exit=True)
    with pytest.raises(UsageError, match="2 of 3 samples"):
        early.run(lambda: backbone.denoise(latents, times, text))
    assert_untouched(backbone)


class OddAttention(nn.Module):
    """A user's own attention, with the options that diffusers' families do not use."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.options.get("enable_gqa"):
            key, value = key[:, :1], value[:, :1]
        return F.scaled_dot_product_attention(query, key, value, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))},
        {"attn_mask": torch.arange(6) < 5},
    ],
    ids=str,
)
def test_a_users_own_attention(options: dict[str, Any]) -> None:
    if "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"].expand(6, 6)}
    network = nn.Sequential(OddAttention(**options))
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    witness, tap = Witness(), AttentionTap(network, pattern="0", grid=(3, 2, 1))
    with witness, tap:
        network(x)
    [record], [(_, value, out)] = tap.records, witness.calls
    if options.get("enable_gqa"):
        value = value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(record.attention_map() @ value, out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(record.frame_marginal(4).sum(-1), torch.ones(2, 2, 2, 3), atol=1e-5, rtol=0)
    whole = record.attention_map().unflatten(-1, (3, 2)).unflatten(2, (3, 2)).diagonal(dim1=3, dim2=5)
    same = whole.permute(0, 4, 1, 2, 3) / whole.permute(0, 4, 1, 2, 3).sum(-1, keepdim=True)
    if "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
        same = same.nan_to_num()  # place 1 of the last frame is masked for all
    torch.testing.assert_close(record.same_site_map().nan_to_num(), same, atol=1e-5, rtol=1e-4)


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_a_regex_that_hits_nothing_names_what_there_is(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match=r"hits no module(.|\n)*blocks\.0\.attn1"):
        AttentionTap(backbone, pattern=r"blocks\.\d+\.attention")
    with pytest.raises(UsageError, match="no regular expression"):
        AttentionTap(backbone, pattern="(")
    with pytest.raises(UsageError, match="temporal, cross, or both"):
        AttentionTap(backbone, kind="spatial")  # type: ignore[arg-type]


def test_another_attention_backend_is_an_error_that_says_so(tiny_checkpoint: Tiny) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    tap = AttentionTap(backbone)
    with torch.no_grad():
        with attention_backend("flex"), pytest.raises(UsageError, match=r'set_attention_backend\("native"\)'):
            tap.run(lambda: backbone.denoise(latents, t, text))
        assert_untouched(backbone)
        with attention_backend("native"):
            tap.run(lambda: backbone.denoise(latents, t, text))
    assert len(tap.records) == 2


def test_a_tap_that_saw_nothing_says_so(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan22"))
    latents, t, text = denoising_inputs(backbone, t=900.0)
    low_noise = AttentionTap(backbone.networks["transformer_2"], pattern=r"blocks\.0\.attn1")
    with pytest.raises(UsageError, match="recorded nothing"):
        low_noise.run(lambda: backbone.denoise(latents, t, text))
    assert_untouched(backbone)


def test_a_regex_of_blocks_is_refused(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    with pytest.raises(UsageError, match="attention modules alone"):
        AttentionTap(backbone, pattern=r"blocks\.0").run(lambda: backbone.denoise(latents, t, text))
    assert_untouched(backbone)


def test_misuse_is_refused(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    with pytest.raises(UsageError, match=r"tap\.run"), AttentionTap(backbone, early_exit=True):
        pass
    with pytest.raises(UsageError, match="without a pattern"):
        AttentionTap(backbone.network)
    tap = AttentionTap(backbone, kind=BOTH)
    tap.run(lambda: backbone.denoise(latents, t, text))
    unified, crossing = tap.records[:2]
    with pytest.raises(UsageError, match="does not attend to text"):
        unified.cross_map()
    with pytest.raises(UsageError, match="no attention over frames"):
        crossing.same_site_map()
    bare = AttentionTap(backbone.network, pattern=r"blocks\.0\.attn1")
    bare.run(lambda: backbone.denoise(latents, t, text))
    with pytest.raises(UsageError, match="no attention over frames"):
        bare.records[0].same_site_map()
    assert torch.equal(bare.records[0].attention_map(), unified.attention_map())
