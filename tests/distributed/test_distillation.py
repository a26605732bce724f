"""Two ranks distil what one process distils, under DDP and FSDP2; a run goes on from either's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from support.distilling import distillation, opened, prompts
from support.jobs import LatentClips, trainer
from support.ranks import run_ranks
from support.strategies import strategy
from torch import Tensor

from callbacks.ema import EMA
from lightning_modules import Distillation
from muybridge.backbones import Causal
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.sharding import full, reshard
from muybridge.errors import UsageError
from muybridge.losses import Adversarial, DistributionMatching, MotionScoreMatching

TOLERANCE = 1e-5


def distil(path: str, kind: str, root: str, what: str, steps: int, save_to: str, ckpt_path: Optional[str]) -> Any:
    """Weights, averages and logged numbers that a run left, on global batches of two."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    size = 2 // world

    def clips(job: Distillation) -> LatentClips:
        return LatentClips(job.latent_shape(), 8, size)

    settings: dict[str, Any] = dict(losses=[DistributionMatching(), MotionScoreMatching()], student_accumulate=2)
    if what == "causal":
        settings |= dict(student=opened(path, causal=Causal(block=1)))
    if what == "adapters":
        settings |= dict(student_lora=LoRA(rank=2), critic_lora=LoRA(rank=2))
        settings |= dict(losses=[DistributionMatching(), Adversarial(every=1)])
        if world > 1:
            # torch would refuse it in its own words, and after the first turn.
            fused = distillation(path, **settings | dict(losses=[DistributionMatching(), Adversarial(every=1)]))
            with pytest.raises(UsageError, match="critic_optimizer's fused"):
                trainer(root, devices=world, strategy=strategy(kind), max_steps=1).fit(fused, datamodule=clips(fused))
        settings |= dict(critic_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-5))
    job = distillation(path, **settings)
    data: Any = clips(job) if what == "adapters" else prompts(8, size)
    run = trainer(root, devices=world, strategy=strategy(kind), max_steps=steps, callbacks=[EMA(decay=0.5)])
    run.fit(job, datamodule=data, ckpt_path=ckpt_path)
    if save_to:
        run.save_checkpoint(save_to)
    reshard(job)
    left = {name: full(tensor).detach().clone() for name, tensor in job.state_dict().items()}
    logged = {n: float(v) for n, v in run.callback_metrics.items()}
    return left, logged, (job.iterations, job.updates, job.samples_seen)


def same(found: Any, wanted: Any) -> None:
    assert found[2] == wanted[2]
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert torch.allclose(found[0][name], value, rtol=0.0, atol=TOLERANCE), name
    assert found[1] == pytest.approx(wanted[1], rel=1e-3, abs=TOLERANCE)


@pytest.mark.parametrize(("kind", "what"), [("ddp", "copies"), ("folder", "causal"), ("folder", "adapters")])
def test_two_ranks_distil_what_one_process_does(kind: str, what: str, tiny_checkpoint: Any, tmp_path: Path):
    """The causal one is cut after its second iteration, and goes on from its sharded checkpoint."""
    path, root, cut = str(tiny_checkpoint("wan")), str(tmp_path), what == "causal"
    wanted = distil(path, "one", root, what, 3, "", None)
    saved = str(tmp_path / "two.ckpt") if cut else None
    if saved:
        run_ranks(distil, path, kind, root, what, 2, saved, None)
    first, second = run_ranks(distil, path, kind, root, what, 3, "", saved)
    same(first, wanted)
    for name, value in first[0].items():
        assert torch.equal(second[0][name], value), name


def poisoned(path: str, kind: str, root: str) -> dict[str, Tensor]:
    """One rank's gradient is not a number once."""

    class Poison(DistributionMatching):
        def forward(self, step: Any) -> Tensor:
            bad = os.environ["RANK"] == "1" and job.iterations == 0
            return super().forward(step) * (float("nan") if bad else 1.0)

    job = distillation(path, losses=[Poison()], update_ratio=1)
    trainer(root, devices=2, strategy=strategy(kind), max_steps=2).fit(job, datamodule=prompts(8, 1))
    assert (job.updates, job.iterations) == (1, 2)
    reshard(job)
    return {name: full(tensor).detach().clone() for name, tensor in job.state_dict().items()}


def test_a_rank_whose_gradient_is_not_finite_makes_all_skip(tiny_checkpoint: Any, tmp_path: Path):
    first, second = run_ranks(poisoned, str(tiny_checkpoint("wan")), "folder", str(tmp_path))
    for name, value in first.items():
        assert torch.equal(second[name], value)
        assert bool(torch.isfinite(value).all()), name
