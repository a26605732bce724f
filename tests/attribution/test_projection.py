"""Projections keep inner products as the theory says, and depend on nothing but names and places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from muybridge.attribution.checks import fidelity, rank_correlation
from muybridge.attribution.projection import (
    CountSketchProjection,
    DenseProjection,
    FastfoodProjection,
    NoProjection,
    Projection,
    SRHTProjection,
    hadamard,
    hashed,
)
from muybridge.errors import UsageError

SIZES = {"a.weight": (96, 64), "a.bias": (96,), "b.table": (1, 3, 50), "b.scale": ()}
KINDS: list[Any] = [FastfoodProjection, SRHTProjection, CountSketchProjection, DenseProjection]


def gradients(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SIZES.items()}


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return (unit @ unit.T)[torch.triu_indices(len(x), len(x), 1).unbind()]


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        (FastfoodProjection, (128, 512, 2048, 8192)),
        (SRHTProjection, (128, 1024)),
        (CountSketchProjection, (128, 512, 2048)),
        (DenseProjection, (128,)),
    ],
)
def test_errors_follow_the_johnson_lindenstrauss_curve(kind: Any, dims: tuple[int, ...]) -> None:
    # Uneven columns, as gradients of linear layers have: what falls on a large one must not always fall together.
    generator = torch.Generator().manual_seed(0)
    # Gaussian weights add 2/D to 1/D', so there are many more coordinates than outputs.
    count, rows, width = (32, 2048, 128) if max(dims) > 4096 else (64, 400, 128)
    x = torch.randn(count, rows, width, generator=generator) * torch.linspace(0.2, 4.0, width)
    x = (x + 0.2 * torch.randn(rows, width, generator=generator)).flatten(1)
    true = cosines(x)
    for dim in dims:
        errors = []
        for seed in range(3):
            projection = kind(dim, seed)
            out = projection.zeros(count)
            projection.add(out, "weight", x)
            errors.append(cosines(out) - true)
            assert float((out.norm(dim=1) / x.norm(dim=1)).mean()) == pytest.approx(1.0, abs=4 / math.sqrt(dim * 8))
        # The error of a cosine c is (1 - c²)/√D'; here all c are small.
        rms = float(torch.cat(errors).square().mean().sqrt())
        if kind in (SRHTProjection, CountSketchProjection) and dim > 1024:
            assert rms <= 1.1 / math.sqrt(dim), "isometric within a block, so better than independent rows"
        else:
            assert rms == pytest.approx(float((1 - true.square()).mean()) / math.sqrt(dim), rel=0.1), dim


@pytest.mark.parametrize("kind", [*KINDS, NoProjection])
def test_a_vector_is_the_sum_of_its_pieces(kind: Any) -> None:
    def make() -> Projection:
        return kind() if kind is NoProjection else kind(256)

    whole = make().project(gradients())
    many = make()
    many.prepare({n: g.numel() for n, g in gradients().items()})
    out = many.zeros(2)
    for name, gradient in reversed(gradients().items()):
        flat = torch.stack([gradient.flatten(), gradients(1)[name].flatten()])
        for cut in torch.arange(flat.shape[1]).split(777):
            many.add(out, name, flat[:, int(cut[0]) : int(cut[-1]) + 1], int(cut[0]))
    torch.testing.assert_close(out[0], whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[1], make().project(gradients(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_parameter_contributes_is_its_own(kind: Any) -> None:
    found, some = gradients(), gradients()
    extra = some.pop("b.table")
    alone = kind(256).project({"b.table": extra})
    torch.testing.assert_close(kind(256).project(found), kind(256).project(some) + alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kind(256, 1).project(found), kind(256, 0).project(found))
    renamed = {f"x.{n}": g for n, g in found.items()}
    assert not torch.allclose(kind(256).project(renamed), kind(256).project(found))


def test_numbers_are_pinned() -> None:
    # A store outlives a release: other numbers need another version.
    assert hashed(7, 3, 3).tolist() == hashed(7, 0, 6)[3:].tolist()
    # The first two numbers of SplitMix64 from state 0.
    assert hashed(0, 0, 2).tolist() == [-2152535657050944081, 7960286522194355700]
    vector = FastfoodProjection(16).project({"w": torch.arange(100.0)})
    assert vector[:3].tolist() == pytest.approx(PINNED, rel=1e-5)


PINNED = [-176.61680603, 114.17739105, -251.40112305]


def test_hashes_look_independent() -> None:
    bits = hashed(123, 0, 2**16)
    for which in (0, 15, 61, 62):
        share = float(((bits >> which) & 1).double().mean())
        assert share == pytest.approx(0.5, abs=4 * 0.5 / 2**8)
    signs = ((bits >> 62) & 1).double() * 2 - 1
    for lag in (1, 2, 1024):
        assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 4 / 2**8
    assert torch.equal(hadamard(8) @ hadamard(8), 8 * torch.eye(8))


def test_the_transform_is_the_hadamard_matrix() -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(FastfoodProjection(64, block=32).mix(x), x @ hadamard(32) / math.sqrt(32))


@pytest.mark.parametrize("rows", [2, 200])
def test_a_sketch_is_the_same_however_it_is_added_up(rows: int) -> None:
    """Scattered, as for few rows and on GPUs, or in stretches."""
    projection = CountSketchProjection(48)
    bits, x = hashed(1, 0, 5 * 48).view(5, 48), torch.randn(rows, 5, 48)
    random = projection.random(bits, hashed(2, 0, 5) & 0xFFFF)
    out = projection.zeros(rows)
    assert (out.numel() < 2**13) is (rows == 2)
    projection.fold(out, x, random)
    signs, _, offsets = random
    wanted = sum(torch.roll(x[:, i] * signs[i], int(offsets[i]), 1) for i in range(5))
    torch.testing.assert_close(out, wanted)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="dim is 0"):
        CountSketchProjection(0)
    with pytest.raises(UsageError, match="power of two"):
        FastfoodProjection(512, block=1000)


def test_the_table_of_fidelity_follows_the_law_and_more_numbers_keep_more() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(6, 30000, generator=generator)
    mixed = torch.randn(24, 6, generator=generator) @ common + torch.randn(24, 30000, generator=generator)
    rows = fidelity({"a": mixed[:, :10000], "b": mixed[:, 10000:]}, CountSketchProjection, (128, 512, 2048))
    assert [r.dim for r in rows] == [128, 512, 2048]
    assert all(r.error == pytest.approx(r.theory, rel=0.35) for r in rows)
    assert rows[0].correlation < rows[1].correlation < rows[2].correlation
    assert rows[2].correlation > 0.99
    with pytest.raises(UsageError, match="gradient of zero"):
        fidelity({"a": torch.zeros(4, 10)}, CountSketchProjection, (8,))


def test_rank_correlation() -> None:
    x = np.array([3.0, 1.0, 2.0, 2.0])
    assert rank_correlation(x, x**3) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    assert rank_correlation(x, np.array([1.0, 1.0, 0.0, 2.0])) == pytest.approx(0.0, abs=1e-12)
