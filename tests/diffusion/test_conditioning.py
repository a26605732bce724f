"""Conditionings can be moved, picked, spread and joined without losing a mask."""

from __future__ import annotations

import pytest
import torch

from muybridge.diffusion import Conditioning


def make(count: int, length: int = 4, mask: bool = True, pooled: bool = True, seed: int = 0) -> Conditioning:
    g = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(count, length, 3, generator=g),
        torch.rand(count, length, generator=g) > 0.4 if mask else None,
        torch.randn(count, 5, generator=g) if pooled else None,
    )


def same(a: Conditioning, b: Conditioning) -> bool:
    pairs = ((a.text, b.text), (a.mask, b.mask), (a.pooled, b.pooled))
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "how", [((torch.bfloat16,), {}), ((), {"dtype": torch.bfloat16}), (("cpu", torch.bfloat16), {})]
)
def test_a_mask_stays_boolean(how: tuple) -> None:
    args, kwargs = how
    moved = make(2).to(*args, **kwargs)
    assert moved.text.dtype == moved.pooled.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool


def test_the_device_moves_everything() -> None:
    moved = make(2).to("meta")
    assert moved.text.is_meta
    assert moved.mask.is_meta
    assert moved.pooled.is_meta


def test_picking_keeps_the_batch_axis() -> None:
    c = make(4)
    assert len(c) == 4
    assert len(c[2]) == len(c[1:2]) == 1
    assert same(c[[3, 0]], c[torch.tensor([3, 0])])
    assert torch.equal(c[[3, 0]].text, c.text[[3, 0]])


def test_one_prompt_is_spread_and_more_are_not() -> None:
    c = make(1)
    assert same(c.expand(3)[1], c)
    assert c.expand(1) is c
    with pytest.raises(ValueError, match="2 prompts over 3"):
        make(2).expand(3)


def test_joining_pads_and_masks() -> None:
    a, b = make(2, 4), make(1, 6, seed=1)
    both = Conditioning.cat([a, b])
    assert both.text.shape == (3, 6, 3)
    assert torch.equal(both.text[:2, :4], a.text)
    assert not both.text[:2, 4:].any()
    assert not both.mask[:2, 4:].any()
    assert torch.equal(both.mask[2:], b.mask)
    assert same(both[2], b)


def test_joining_never_loses_a_mask() -> None:
    with pytest.raises(ValueError, match="mask"):
        Conditioning.cat([make(1), make(1, mask=False)])
    with pytest.raises(ValueError, match="pooled"):
        Conditioning.cat([make(1), make(1, pooled=False)])
    with pytest.raises(ValueError, match="without masks"):
        Conditioning.cat([make(1, 4, mask=False), make(1, 6, mask=False)])


def test_choosing_per_sample() -> None:
    yes, no = make(3), make(1, seed=7)
    chosen = Conditioning.where(torch.tensor([True, False, True]), yes, no)
    assert same(chosen[0], yes[0])
    assert same(chosen[1], no)
    assert same(chosen[2], yes[2])
