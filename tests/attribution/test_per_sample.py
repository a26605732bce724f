"""Every engine gives, parameter by parameter, what autograd gives for one clip at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.backbones import small_call
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muybridge import backbones
from muybridge.attribution.names import canonical, chosen_parameters
from muybridge.attribution.per_sample import ShardedEngine, per_sample_gradients
from muybridge.backbones.adapters import LoRA, inject
from muybridge.backbones.base import Backbone
from muybridge.backbones.sharding import shard
from muybridge.errors import UsageError
from muybridge.tiny import MAKERS

Tiny = Callable[[str], Path]
COUNT = 3


def opened(path: Path, lora: bool = False, **options: Any) -> Backbone:
    backbone = backbones.load(str(path), **options)
    # Rounding of a small gradient must not hide a wrong one; where a network computes in float32 anyway, some is left.
    backbone.networks.double()
    backbone.dtype = torch.float64
    if lora:
        inject(backbone, LoRA(rank=2))
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for p in backbone.parameters() if p.requires_grad):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    else:
        backbone.networks.requires_grad_(True)
    return backbone


def losses_of(backbone: Backbone, *which: int) -> Callable[[], Tensor]:
    """The loss of some of three clips; each also has a target of its own."""
    latents, t, text = small_call(backbone, COUNT)
    latents = latents.double()
    goal = torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = list(which)
    t = t + 100.0 * torch.arange(COUNT)

    def forward() -> Tensor:
        output = backbone(latents[rows], t[rows], text[rows])[:, : latents.shape[1]].double()
        return (output - goal[rows]).square().flatten(1).mean(1)

    return forward


def by_autograd(backbone: Backbone, pattern: str | None = None) -> dict[str, Tensor]:
    """One clip at a time, (B, numel)."""
    chosen = chosen_parameters(backbone.networks, pattern)
    rows = []
    for i in range(COUNT):
        found = torch.autograd.grad(losses_of(backbone, i)().sum(), list(chosen.values()), allow_unused=True)
        rows.append([g if g is not None else torch.zeros_like(p) for g, p in zip(found, chosen.values(), strict=True)])
    return {n: torch.stack([r[k].flatten() for r in rows]) for k, n in enumerate(chosen)}


def off(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> dict[str, float]:
    """How far each parameter's gradient is off, 1 being as far as it may be."""
    assert found.keys() == wanted.keys()
    # Where all of a gradient is rounding (a bias before a norm), it is measured by the largest of the model.
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted.values())
    return {
        name: float((found[name] - g).abs().max()) / (tolerance * max(float(g.abs().max()), floor))
        for name, g in wanted.items()
    }


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(off(found, wanted).values())


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert not {name: value for name, value in off(found, wanted).items() if not value <= 1.0}


def one_at_a_time(backbone: Backbone, pattern: str | None = None) -> dict[str, Tensor]:
    parts = [per_sample_gradients(backbone.networks, losses_of(backbone, i), pattern) for i in range(COUNT)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_is_exact(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = opened(tiny_checkpoint(name))
    wanted = by_autograd(backbone)
    assert sum(bool(g.any()) for g in wanted.values()) > 0.4 * len(wanted), "the test must reach the weights"
    close(one_at_a_time(backbone), wanted)
    together = losses_of(backbone, *range(COUNT))
    close(per_sample_gradients(backbone.networks, together, engine="batched", count=COUNT), wanted)
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["wan"])
@pytest.mark.parametrize("engine", ["parameter", "batched"])
def test_adapters_checkpointing_and_a_choice_of_parameters(name: str, engine: Any, tiny_checkpoint: Tiny) -> None:
    backbone = opened(tiny_checkpoint(name), lora=True, gradient_checkpointing=True)
    pattern = r".*lora_B.*"
    wanted = by_autograd(backbone, pattern)
    assert all("lora_B" in n for n in wanted)
    found = (
        one_at_a_time(backbone, pattern)
        if engine == "parameter"
        else per_sample_gradients(backbone.networks, losses_of(backbone, 0, 1, 2), pattern, "batched", COUNT)
    )
    close(found, wanted)
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == {
        n for n, _ in backbone.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("name", ["wan"])
def test_recomputed_activations_give_the_same(name: str, tiny_checkpoint: Tiny) -> None:
    wanted = by_autograd(opened(tiny_checkpoint(name)))
    backbone = opened(tiny_checkpoint(name), gradient_checkpointing=True)
    close(one_at_a_time(backbone), wanted)
    close(per_sample_gradients(backbone.networks, losses_of(backbone, 0, 1, 2), engine="batched", count=COUNT), wanted)


class Odd(nn.Module):
    """Every kind of parameter, some used twice, some by way of a cast or a function."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.project = nn.Conv3d(2, 8, (1, 2, 2), stride=(1, 2, 2), bias=True)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.plane = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.group, self.rms = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8)
        self.twice = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(3, 8))
        self.frequency = nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.words.weight

    def block(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.twice(self.norm(torch.tanh(self.twice(x)))))

    def forward(self, clip: Tensor, words: Tensor, recompute: bool = False) -> Tensor:
        x = self.project(clip)
        batch, _, frames, _, _ = x.shape
        x = x.transpose(1, 2).flatten(0, 1)
        x = self.group(self.plane(x)).unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        shift, gain, gate = (self.table[None] + x.mean(1, keepdim=True)).chunk(3, dim=1)
        x = x * (1 + gain) + shift
        turn = torch.cos(torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequency.to(x.dtype))
        x = self.rms(x * turn + 0.1 * x * turn) * gate
        x = checkpoint(self.block, x, use_reentrant=False) if recompute else self.block(x)
        x = x + self.words(words).mean(1, keepdim=True) / self.scale
        return self.out(self.drop(x))


@pytest.mark.parametrize("engine", ["parameter", "batched", "sharded"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_kind_of_parameter(engine: Any, recompute: bool) -> None:
    torch.manual_seed(0)
    net = Odd().double().eval()
    clips, words = torch.randn(5, 2, 3, 4, 4).double(), torch.randint(0, 7, (5, 5))

    def losses(rows: slice) -> Tensor:
        return net(clips[rows], words[rows], recompute).square().flatten(1).mean(1)

    chosen = chosen_parameters(net)
    assert "out.weight" not in chosen, "tied: once, under its first name"
    rows = [torch.autograd.grad(losses(slice(i, i + 1)).sum(), list(chosen.values())) for i in range(5)]
    wanted = {n: torch.stack([r[k].flatten() for r in rows]) for k, n in enumerate(chosen)}
    net.train()  # and nothing is dropped all the same
    if engine == "batched":
        found = per_sample_gradients(net, lambda: losses(slice(None)), engine="batched", count=5)
        with pytest.raises(UsageError, match=r"frequency meets a tensor of shape .* that may or may not hold 4 clips"):
            per_sample_gradients(net, lambda: losses(slice(4)), engine="batched", count=4)
    else:
        parts = [per_sample_gradients(net, lambda i=i: losses(slice(i, i + 1)), engine=engine) for i in range(5)]  # type: ignore[misc]
        found = {n: torch.cat([part[n] for part in parts]) for n in chosen}
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_bfloat16_gives_the_gradients_of_bfloat16(tiny_checkpoint: Tiny) -> None:
    backbone = opened(tiny_checkpoint("wan"))
    exact = by_autograd(backbone)
    backbone.networks.float()
    backbone.dtype = torch.float32

    def under(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward()

        return run

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        joined = [torch.cat([x[n].double() for n in exact], 1) for x in (a, b)]
        return torch.nn.functional.cosine_similarity(*joined)

    parts = [per_sample_gradients(backbone.networks, under(losses_of(backbone, i))) for i in range(COUNT)]
    alone = {n: torch.cat([p[n] for p in parts]) for n in exact}
    together = per_sample_gradients(
        backbone.networks, under(losses_of(backbone, 0, 1, 2)), engine="batched", count=COUNT
    )
    assert distance(alone, exact).min() > 0.99
    assert distance(together, alone).min() > 0.999


def test_training_is_left_as_it_was(tiny_checkpoint: Tiny) -> None:
    backbone = opened(tiny_checkpoint("wan"))
    backbone.train()
    losses_of(backbone, 0)().sum().backward()
    held = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    for engine, rows in (("parameter", [1]), ("batched", [0, 1, 2])):
        per_sample_gradients(
            backbone.networks,
            losses_of(backbone, *rows),
            r".*attn1.*",
            engine=engine,
            count=len(rows),  # type: ignore[arg-type]
        )
    assert all(m.training for m in backbone.modules())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in backbone.parameters())
    assert {n for n, p in backbone.named_parameters() if p.grad is not None} == set(held)
    assert all(torch.equal(p.grad, held[n]) for n, p in backbone.named_parameters() if n in held)


def test_the_sharded_engine_gives_every_coordinate_once() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(5, 3), torch.randn(1, 5)

    def losses() -> Tensor:
        return net(x).square().mean(1)

    wanted = per_sample_gradients(net, losses)
    found = {n: torch.zeros_like(g) for n, g in wanted.items()}
    for rank in range(4):

        def sink(name: str, piece: Tensor, start: int) -> None:
            found[name][:, start : start + piece.shape[1]] += piece

        ShardedEngine(net, None, rank, 4).run(losses, sink)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def off_on_shards(paths: list[str]) -> dict[str, tuple[float, float]]:
    """By how much each gradient of FSDP2's two engines is off, of the tolerance that is allowed, at its worst in each family."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    rank, mesh, found = dist.get_rank(), init_device_mesh("cpu", (2,)), {}
    for path in paths:
        backbone = opened(Path(path))
        chosen = chosen_parameters(backbone.networks)

        grads = torch.autograd.grad(losses_of(backbone, rank)().sum(), list(chosen.values()), allow_unused=True)
        pairs = zip(grads, chosen.items(), strict=True)
        wanted = {n: (g if g is not None else torch.zeros_like(p)).flatten()[None] for g, (n, p) in pairs}
        parts = {n: torch.zeros_like(g) for n, g in wanted.items()}
        shard(backbone, mesh, reshard_after_forward=False)
        with torch.no_grad():
            losses_of(backbone, 0)()  # leaves weights gathered, as validation would
        own = per_sample_gradients(backbone.networks, losses_of(backbone, rank))

        def sink(name: str, piece: Tensor, start: int, parts: dict[str, Tensor] = parts) -> None:
            parts[name][:, start : start + piece.shape[1]] += piece

        ShardedEngine(backbone.networks, None, rank, 2).run(losses_of(backbone, 0), sink)
        first = {name: gradient.clone() for name, gradient in wanted.items()}
        for name in wanted:
            dist.all_reduce(parts[name])
            dist.broadcast(first[name], 0)
        found[Path(path).name] = (worst(own, wanted), worst(parts, first))
    return found


def test_two_shards_are_exact_in_every_family(tiny_checkpoint: Tiny) -> None:
    """Each rank's own clip where weights are gathered, and one clip of which each rank gives away its shard."""
    for ranks in run_ranks(off_on_shards, [str(tiny_checkpoint(name)) for name in MAKERS]):
        assert len(ranks) == len(MAKERS)
        assert all(max(pair) <= 1.0 for pair in ranks.values()), ranks


class Strange(nn.Module):
    """A parameter in a product that says nothing of clips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.first(x), self.weight)


def test_what_an_engine_cannot_cover_is_named() -> None:
    net, x = Strange(), torch.randn(2, 4)
    with pytest.raises(UsageError, match=r"weight meets an activation in matmul.*\n.*\n.*engine: parameter"):
        per_sample_gradients(net, lambda: net(x).square().mean(1), engine="batched", count=2)
    assert type(net.weight) is nn.Parameter, "and the module is whole again"
    with pytest.raises(UsageError, match="given 2 clips"):
        per_sample_gradients(net, lambda: net(x).square().mean(1), count=2)
    with pytest.raises(UsageError, match="one number per clip"):
        per_sample_gradients(net, lambda: net(x).square().mean(1))
    with pytest.raises(UsageError, match="does not depend on"):
        per_sample_gradients(net, lambda: torch.ones(1))
    with pytest.raises(UsageError, match=r"such as first\.weight"):
        chosen_parameters(net, "weight2|rst")
    net.weight.requires_grad_(False)
    with pytest.raises(UsageError, match="1 that are frozen, such as weight"):
        chosen_parameters(net, ".*weight")


def test_names_are_those_without_wrappers() -> None:
    name = "transformer.blocks.0.module.weight"
    assert canonical(f"module._orig_mod.{name.replace('.0.', '.0._checkpoint_wrapped_module.')}") == name
    assert canonical(name) == name
