"""The average is the recursion it says it is, and evaluation uses it and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.counting import Recorder
from support.jobs import finetuning, latents_for, sgd, trainer
from support.ranks import run_ranks
from support.strategies import strategy
from torch import Tensor, nn

from callbacks.ema import EMA
from lightning_modules import Finetuning
from muybridge.averaging import WeightAverage, warm_decay
from muybridge.backbones.sharding import full, reshard
from muybridge.errors import UsageError
from muybridge.losses import Denoising

Tiny = Callable[[str], Path]


def copy(module: Any) -> dict[str, Tensor]:
    reshard(module)
    return {n: full(p).detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def averages(module: Any) -> dict[str, Tensor]:
    found = {n: full(b).clone() for n, b in module.average.named_buffers()}
    return {n: found[n.replace(".", "__")] for n in copy(module)}


class History(pl.Callback):
    """The weights after each update, and at each validation."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        if pl_module.updates > len(self.weights):
            self.weights.append(copy(pl_module))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        self.validated.append(copy(pl_module))


def fit(path: Path, root: Path, ema: EMA, *more: pl.Callback, **settings: Any) -> tuple[Any, History]:
    module, history = finetuning(path), History()
    data = latents_for(module, count=8)
    trainer(root, **{"max_steps": 4, "callbacks": [ema, *more, history], **settings}).fit(module, datamodule=data)
    return module, history


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (dict(decay=0.9, warmup=False), {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9}),
        (dict(decay=0.9), {1: 0.1, 2: 2 / 11, 3: 3 / 12, 4: 4 / 13}),
        (dict(decay=0.15), {1: 0.1, 2: 0.15, 3: 0.15, 4: 0.15}),
        (dict(decay=0.5, start=2, warmup=False), {1: 0.0, 2: 0.0, 3: 0.5, 4: 0.5}),
        (dict(decay=0.5, every=2, warmup=False), {2: 0.5, 4: 0.5}),
        (dict(decay=0.9, start=1, every=3), {1: 0.0, 4: 0.1}),
    ],
    ids=["plain", "warm-up", "capped", "start", "every", "all"],
)
def test_the_average_is_the_recursion(
    options: dict[str, Any], steps: dict[int, float], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    module = finetuning(tiny_checkpoint("wan"))
    module.configure_model()
    wanted = copy(module)
    module, history = fit(tiny_checkpoint("wan"), tmp_path, EMA(**options), limit_val_batches=0)
    for update, decay in steps.items():
        wanted = {n: decay * a + (1 - decay) * history.weights[update - 1][n] for n, a in wanted.items()}
    found = averages(module)
    for name, average in wanted.items():
        assert torch.allclose(found[name], average, atol=1e-6), name
    assert any(not torch.equal(found[n], history.weights[-1][n]) for n in found)


def test_a_micro_batch_without_an_update_is_no_step(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)
    fit(tiny_checkpoint("wan"), tmp_path, ema, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    assert ema.steps == 2
    assert ema.state_dict() == {"steps": 2}


@pytest.mark.parametrize("use", [True, False])
def test_validation_sees_the_average_and_training_does_not(use: bool, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    module, history = fit(tiny_checkpoint("wan"), tmp_path, EMA(decay=0.9, use_for_validation=use))
    assert len(history.validated) > 0
    seen, last = history.validated[-1], history.weights[-1]
    wanted = averages(module) if use else last
    assert all(torch.equal(seen[n], wanted[n]) for n in seen)
    assert all(torch.equal(w, last[n]) for n, w in copy(module).items())


class Fails(pl.Callback):
    def on_validation_batch_end(self, *rest: Any) -> None:
        raise ZeroDivisionError("in validation")


def test_weights_come_back_after_an_error_in_validation(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    module, history = finetuning(tiny_checkpoint("wan")), History()
    runner = trainer(tmp_path, max_steps=4, callbacks=[EMA(decay=0.9), Fails(), history])
    with pytest.raises(ZeroDivisionError):
        runner.fit(module, datamodule=latents_for(module))
    assert history.weights
    assert all(torch.equal(w, history.weights[-1][n]) for n, w in copy(module).items())
    assert not module.average.swapped_in


class Saves(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_averages_are_never_saved_as_weights(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="averages are in the place of the weights"):
        fit(tiny_checkpoint("wan"), tmp_path, EMA(decay=0.9), Saves(tmp_path / "c.ckpt"))
    assert not (tmp_path / "c.ckpt").exists()


def evaluate(path: str, root: str) -> tuple[bool, bool, bool]:
    """Swap around a forward without gradients on shards: weights before and after, and what was in place."""
    module, history = finetuning(path), History()
    runner = trainer(root, devices=2, strategy=strategy("folder"), max_steps=2, callbacks=[EMA(decay=0.9), history])
    runner.fit(module, datamodule=latents_for(module, count=4, batch_size=1))
    kept, wanted = copy(module), averages(module)
    runner.validate(module, datamodule=latents_for(module, count=4, batch_size=1), verbose=False)
    seen, after = history.validated[-1], copy(module)
    return (
        all(torch.equal(seen[n], wanted[n]) for n in wanted),
        all(torch.equal(after[n], kept[n]) for n in kept),
        any(not torch.equal(seen[n], kept[n]) for n in kept),
    )


def test_shards_are_swapped_and_brought_back_exactly(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    assert run_ranks(evaluate, str(tiny_checkpoint("wan")), str(tmp_path)) == [(True, True, True)] * 2


# -- the container alone -----------------------------------------------------------------------------------------------


class Apart(Finetuning):
    """Its ranks load different weights, which DDP makes those of the first."""

    def prepare(self) -> None:
        super().prepare()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.1 * self.trainer.global_rank


class Sent(pl.Callback):
    """What DDP keeps equal between ranks beside the gradients."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        ddp: Any = trainer.strategy.model
        self.names, self.ignored = sorted(ddp.named_module_buffers), sorted(ddp.parameters_to_ignore)


def averaged_apart(path: str, root: str) -> tuple[dict[str, Tensor], list[str], list[str], list[str]]:
    sent, plain = Sent(), finetuning(path)
    module = Apart(backbone=plain.backbone, losses=[Denoising()], optimizer=sgd, sampling=plain.sampling)
    callbacks = [EMA(decay=0.9), sent]
    settings: dict[str, Any] = dict(max_steps=3, devices=2, strategy=strategy("ddp"), limit_val_batches=0)
    trainer(root, callbacks=callbacks, **settings).fit(module, datamodule=latents_for(plain, count=8))
    return averages(module), sent.names, sent.ignored, sorted(f"average.{n}" for n, _ in module.average.named_buffers())


def test_ranks_keep_equal_averages_without_sending_them(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    ranks = run_ranks(averaged_apart, str(tiny_checkpoint("wan")), str(tmp_path))
    for found, sent, ignored, names in ranks:
        assert names
        assert ignored == names
        assert not set(sent).intersection(names)
        for name, average in found.items():
            assert torch.equal(average, ranks[0][0][name]), name


def test_averages_of_low_precision_weights_are_kept_in_float32_and_move() -> None:
    network = nn.Linear(4, 4).to(torch.bfloat16)
    average = WeightAverage(network)
    holder = nn.ModuleDict({"network": network, "average": average}).to(torch.bfloat16)
    assert {b.dtype for b in holder.buffers()} == {torch.float32}
    start = average.weight.clone()
    network.weight.data += 1.0
    for _ in range(100):
        average.update(network, 0.999)
    moved = (average.weight - start) / (network.weight.float() - start)
    assert torch.allclose(moved, torch.full_like(moved, 1 - 0.999**100), rtol=1e-2)


def test_swapping_loses_nothing_on_either_side() -> None:
    network = nn.Linear(4, 4).to(torch.bfloat16)
    average = WeightAverage(network)
    average.weight += 0.001
    weight, mean = network.weight.detach().clone(), average.weight.clone()
    with average.swapped(network), average.swapped(network):
        assert torch.equal(network.weight, mean.to(torch.bfloat16))
        with pytest.raises(RuntimeError, match="leave swapped"):
            average.update(network, 0.5)
    assert torch.equal(network.weight, weight)
    assert torch.equal(average.weight, mean)


def test_only_trained_parameters_have_averages() -> None:
    network = nn.Linear(4, 4)
    network.bias.requires_grad_(False)
    assert [name for name, _ in WeightAverage(network).named_buffers()] == ["weight"]


def test_the_decay_warms_up_to_its_limit() -> None:
    assert [warm_decay(0.999, n) for n in (0, 90, 10_000)] == [0.1, 0.91, 0.999]
    assert warm_decay(0.999, 0, warmup=False) == 0.999


@pytest.mark.parametrize("options", [dict(decay=1.0), dict(decay=-0.1), dict(every=0), dict(start=-1)])
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EMA(**options)


def test_a_module_without_room_for_an_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EMA was given Recorder"):
        trainer(tmp_path, max_steps=1, callbacks=[EMA()]).fit(Recorder(), [torch.zeros(1)])
