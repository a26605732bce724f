"""One process, DDP and FSDP2 train the same thing; checkpoints go from any of them to any other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.counting import QUIET, Numbers, Some
from support.jobs import finetuning, latents_for, trainer
from support.ranks import run_ranks
from support.strategies import Left, run, strategy
from torch import Tensor, nn

from callbacks.ema import EMA
from lightning_modules.parallel import FullyShard, check_plain, consolidate, load_plain, rename_parameters
from muybridge.backbones.adapters import LoRA
from muybridge.backbones.sharding import full
from muybridge.diffusion import DenoisingStep
from muybridge.errors import UsageError
from muybridge.losses import Denoising

Tiny = Callable[[str], Path]
TOLERANCE = 1e-5


def train(path: str, kind: str, root: str, lora: bool = False, ema: bool = True, **options: Any) -> Left:
    """The plain job with an average; on ranks, what :func:`run_ranks` runs."""
    job = {"adapter": LoRA(rank=2)} if lora else {}
    return run(path, kind, root, job=job, callbacks=(EMA(decay=0.9),) if ema else (), **options)


def on_ranks(path: str, kind: str, root: str, options: dict[str, Any]) -> Left:
    return train(path, kind, root, **options)


def start(path: Path, kind: str, root: Path, world: int = 2, **options: Any) -> Left:
    """A run under a strategy; ranks must agree on everything."""
    if kind == "one":
        return train(str(path), kind, str(root), **options)
    first, *others = run_ranks(on_ranks, str(path), kind, str(root), options, world=world)
    for other in others:
        assert other.losses == first.losses
        assert other.norms == first.norms
        same(other.weights, first.weights, 0.0)
    return first  # type: ignore[no-any-return]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=0.0, atol=tolerance), name


def same_run(found: Left, wanted: Left, tolerance: float = TOLERANCE) -> None:
    """The last steps of both agree, and all that they left."""
    count = len(found.losses)
    assert count > 0
    assert found.losses == pytest.approx(wanted.losses[-count:], abs=tolerance)
    assert found.norms == pytest.approx(wanted.norms[-count:], abs=tolerance)
    assert found.validation == pytest.approx(wanted.validation, abs=tolerance)
    assert found.updates == wanted.updates
    same(found.weights, wanted.weights, tolerance)
    same(found.averages, wanted.averages, tolerance)
    same(found.moments, wanted.moments, tolerance)


@pytest.fixture(scope="module")
def wan(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("wan")


@pytest.fixture(scope="module")
def wanted(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Left]:
    """Five updates on one process, never interrupted: of all weights, and of an adapter."""
    root = tmp_path_factory.mktemp("one")
    return {lora: start(wan, "one", root, lora=lora, validate=True) for lora in (False, True)}


@pytest.fixture(scope="module")
def saved(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint after three updates, by the strategy and the number of ranks that wrote it."""
    made: dict[tuple[str, int, bool], Path] = {}

    def get(kind: str, world: int = 2, lora: bool = False) -> Path:
        key = (kind, world, lora)
        if key not in made:
            path = tmp_path_factory.mktemp("saved") / "three.ckpt"
            start(wan, kind, path.parent, world, lora=lora, steps=3, save_after=3, save_to=str(path))
            made[key] = path
        return made[key]

    return get


class Scaled(Denoising):
    """A loss with one learned number, whose gradient differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, step: DenoisingStep) -> Tensor:
        return super().forward(step) * self.scale.square()


def learned(path: str, kind: str, root: str, clip: Optional[float]) -> Left:
    return run(path, kind, root, job={"losses": [Scaled()]}, gradient_clip_val=clip)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_what_a_loss_learns_of_its_own_is_the_same_on_all_ranks(
    clip: Optional[float], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    wanted = learned(path, "one", str(tmp_path / "one"), clip)
    assert min(wanted.norms) > 0.05, "clipping does something"
    for kind in ("ddp", "folder"):
        for found in run_ranks(learned, path, kind, str(tmp_path / kind), clip):
            assert found.weights["losses.0.scale"] != 0.5
            same_run(found, wanted)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("ddp", False), ("folder", False), ("replicas", False), ("offload", False), ("ddp", True), ("folder", True)],
)
def test_every_strategy_trains_what_one_process_trains(
    kind: str, lora: bool, wan: Path, wanted: dict[bool, Left], tmp_path: Path
) -> None:
    found = start(wan, kind, tmp_path, lora=lora, validate=True)
    assert len(found.losses) == 5
    same_run(found, wanted[lora])


@pytest.mark.parametrize("kind", ["one", "folder"])
def test_accumulation_trains_what_one_large_batch_trains(
    kind: str, wan: Path, wanted: dict[bool, Left], tmp_path: Path
) -> None:
    batch = 2 if kind == "one" else 1
    found = start(wan, kind, tmp_path, validate=True, data=dict(batch_size=batch), accumulate_grad_batches=2)
    same(found.weights, wanted[False].weights)
    same(found.averages, wanted[False].averages)
    assert found.updates == 5


def clipped(path: str, kind: str, root: str) -> Left:
    return run(path, kind, root, steps=3, gradient_clip_val=0.5)


def test_gradients_are_clipped_by_their_whole_norm(wan: Path, tmp_path: Path) -> None:
    one = clipped(str(wan), "one", str(tmp_path))
    assert min(one.norms) > 0.5
    for found in run_ranks(clipped, str(wan), "folder", str(tmp_path)):
        same(found.weights, one.weights)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_one_process_resumes_bit_for_bit(
    wan: Path, wanted: dict[bool, Left], saved: Callable[..., Path], tmp_path: Path
) -> None:
    for lora in (False, True):
        found = start(wan, "one", tmp_path, lora=lora, validate=True, ckpt_path=str(saved("one", 1, lora)))
        same_run(found, wanted[lora], 0.0)


@pytest.mark.parametrize(
    ("written", "resumed", "lora"),
    [
        (("folder", 2), ("folder", 2), False),
        (("folder", 1), ("folder", 2), False),
        (("folder", 2), ("folder", 1), True),
        (("file", 2), ("one", 1), True),
        (("one", 1), ("folder", 2), True),
    ],
    ids=str,
)
def test_any_strategy_goes_on_from_any_other(
    written: tuple[str, int],
    resumed: tuple[str, int],
    lora: bool,
    wan: Path,
    wanted: dict[bool, Left],
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = str(saved(*written, lora))
    found = start(wan, resumed[0], tmp_path, resumed[1], lora=lora, validate=True, ckpt_path=path)
    assert len(found.losses) == 2
    same_run(found, wanted[lora])


def test_a_loader_made_before_the_checkpoint_is_read_begins_at_the_right_place(wan: Path, tmp_path: Path) -> None:
    """A schedule that needs the length of a run of epochs makes Lightning ask for the loader while it sets up."""
    epochs: dict[str, Any] = dict(steps=-1, max_epochs=2, ema=False, data=dict(num_workers=2))
    path = str(tmp_path / "six.ckpt")
    whole = start(wan, "folder", tmp_path, **epochs, save_after=6, save_to=path)
    assert len(whole.losses) == 8
    same_run(start(wan, "folder", tmp_path, **epochs, ckpt_path=path), whole)


@pytest.mark.parametrize("lora", [False, True])
def test_a_folder_consolidates_to_what_one_process_would_have_written(
    lora: bool, wan: Path, wanted: dict[bool, Left], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("folder", 2, lora)
    file = consolidate(folder, tmp_path / "one.ckpt")
    opened, plain = (torch.load(f, weights_only=True) for f in (file, saved("one", 1, lora)))
    assert opened.keys() == plain.keys()
    same(opened["state_dict"], plain["state_dict"])
    [mine], [theirs] = opened["optimizer_states"], plain["optimizer_states"]
    assert mine["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        same(mine["state"][index], state)
    assert [p.name for p in tmp_path.iterdir()] == ["one.ckpt"]
    same_run(start(wan, "one", tmp_path, lora=lora, validate=True, ckpt_path=str(file)), wanted[lora])


@pytest.mark.parametrize("kind", ["one", "folder"])
def test_frozen_weights_are_in_no_checkpoint(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved(kind, 1 if kind == "one" else 2, True)
    names = load_plain(path if kind == "one" else consolidate(path, tmp_path / "c.ckpt"))["state_dict"].keys()
    weights = [n for n in names if not n.startswith("average.")]
    assert weights
    assert all("lora_" in name for name in weights)
    assert len(names) == 2 * len(weights)


def refused(path: str, root: str, ckpt_path: str) -> str:
    with pytest.raises(UsageError) as caught:
        train(path, "folder", root, ema=False, ckpt_path=ckpt_path)
    return str(caught.value)


def test_a_checkpoint_of_other_settings_is_refused_in_words(
    wan: Path, saved: Callable[..., Path], tmp_path: Path
) -> None:
    for ckpt in (saved("folder"), saved("one", 1)):
        for message in run_ranks(refused, str(wan), str(tmp_path), str(ckpt)):
            assert "add or remove callbacks.EMA" in message


def validated(path: str, kind: str, root: str, ckpt_path: str) -> float:
    module = finetuning(path)
    runner = trainer(root, devices=int(os.environ.get("WORLD_SIZE", 1)), strategy=strategy(kind), callbacks=[EMA()])
    data = latents_for(module, batch_size=2 if kind == "one" else 1)
    [result] = runner.validate(module, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    return float(result["val/loss"])


def test_a_sharded_checkpoint_validates_as_the_file_does(wan: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    one = validated(str(wan), "one", str(tmp_path), str(saved("one", 1)))
    assert run_ranks(validated, str(wan), "folder", str(tmp_path), str(saved("folder"))) == pytest.approx(
        [one] * 2, abs=1e-5
    )


def both_experts(path: str, root: str) -> str:
    with pytest.raises(UsageError) as caught:
        run(path, "folder", root)
    return str(caught.value)


def test_experts_that_ranks_would_run_at_different_times_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    for message in run_ranks(both_experts, str(tiny_checkpoint("wan22")), str(tmp_path)):
        assert "one expert a run on several ranks" in message


# -- two optimizers ----------------------------------------------------------------------------------------------------


class Half(nn.Module):
    """A network with a layer that is first used late in a run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, late: bool) -> Tensor:
        return self.used(self.late(x) if late else x)


class Pair(pl.LightningModule):
    """Two networks with an optimizer each; the first one's waits before its first step."""

    def __init__(self, wait: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.wait = wait
        torch.manual_seed(0)
        self.first, self.second = Half(), Half()
        self.rows = torch.randn(16, 4)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.trainer.strategy, FullyShard) and not isinstance(self.first, FSDPModule):
            for network in (self.first, self.second):
                fully_shard(network, mesh=self.trainer.strategy.mesh)

    def training_step(self, batch: Some, batch_idx: int) -> None:
        x = self.rows[batch.numbers]
        first, second = self.optimizers()  # type: ignore[attr-defined]
        for network, optimizer in ((self.second, second), (self.first, first)):
            if optimizer is first and batch_idx < self.wait:
                continue
            optimizer.zero_grad()
            self.manual_backward(network(x, batch_idx > 4).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.first.parameters(), lr=0.1), torch.optim.AdamW(self.second.parameters(), lr=0.2)


class SaveAfter(pl.Callback):
    """Save when so many batches are done."""

    def __init__(self, batches: tuple[int, ...], path: str) -> None:
        self.batches, self.path = batches, path

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if 0 in self.batches:
            trainer.save_checkpoint(f"{self.path}-0")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 in self.batches:
            trainer.save_checkpoint(f"{self.path}-{batch_idx + 1}")


def pair(kind: str, save: tuple[int, ...], path: str, ckpt_path: Optional[str]) -> dict[str, Tensor]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = Pair(wait=2)
    watch = SaveAfter(save, path)
    runner = pl.Trainer(**QUIET, devices=world, strategy=strategy(kind), max_epochs=1, callbacks=[watch])
    runner.fit(module, datamodule=Numbers(16, batch_size=2 // world), ckpt_path=ckpt_path)
    return {n: full(p).detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_saving_does_not_change_a_run_even_before_an_optimizers_first_step(kind: str, tmp_path: Path) -> None:
    wanted = pair("one", (), "", None)
    for found in run_ranks(pair, kind, (0, 1, 3), str(tmp_path / "c"), None):
        same(found, wanted)
    for step in (1, 3):
        for found in run_ranks(pair, kind, (), "", str(tmp_path / f"c-{step}")):
            same(found, wanted)


def test_two_optimizers_go_from_ddp_to_shards(tmp_path: Path) -> None:
    wanted = pair("one", (), "", None)
    run_ranks(pair, "one", (3,), str(tmp_path / "c"), None, world=1)
    for found in run_ranks(pair, "folder", (), "", str(tmp_path / "c-3")):
        same(found, wanted)


def test_parameters_are_renamed_by_their_order_and_another_number_is_refused() -> None:
    state = {"state": {7: "a", 3: "b"}, "param_groups": [{"lr": 1, "params": [3]}, {"lr": 2, "params": [7]}]}
    assert rename_parameters(state, ["x", "y"]) == {
        "state": {"y": "a", "x": "b"},
        "param_groups": [{"lr": 1, "params": ["x"]}, {"lr": 2, "params": ["y"]}],
    }
    with pytest.raises(UsageError, match="2 parameters and this job's 3"):
        rename_parameters(state, ["x", "y", "z"])


# -- files -------------------------------------------------------------------------------------------------------------


class Careless(pl.Callback):
    """Keeps an object in its state that torch will not load without being told to trust it."""

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("somewhere")}


def careless(path: str, root: str, trust: bool) -> str:
    def fit(steps: int, ckpt_path: Optional[str]) -> int:
        module = finetuning(path)
        runner = trainer(
            root,
            devices=2,
            strategy=FullyShard(trust_checkpoints=trust),
            max_steps=steps,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[Careless(), ModelCheckpoint(root, filename="c", every_n_train_steps=1)],
        )
        runner.fit(module, datamodule=latents_for(module, batch_size=1), ckpt_path=ckpt_path)
        return module.updates

    try:
        fit(1, None)
    except UsageError as error:
        return str(error)
    return f"went on to {fit(2, f'{root}/c.ckpt')}"


def test_what_could_not_be_loaded_again_is_refused_when_saved(wan: Path, tmp_path: Path) -> None:
    for message in run_ranks(careless, str(wan), str(tmp_path), False):
        assert "'callbacks' holds an object" in message
        assert "Path" in message
        assert "trust_checkpoints" in message
    assert list(tmp_path.iterdir()) == []


def test_trusted_checkpoints_may_hold_anything(wan: Path, tmp_path: Path) -> None:
    assert run_ranks(careless, str(wan), str(tmp_path), True) == ["went on to 2"] * 2


def test_plain_metadata_passes() -> None:
    check_plain({"hyper_parameters": {"lr": 1e-3, "names": ["a"], "on": True, "none": None}, "value": torch.zeros(2)})


class Killed(BaseException):
    """The end of a process."""


def overwrite(path: str, root: str) -> list[str]:
    """Save twice under one name, and be killed between the parts of the second save."""
    import lightning_modules.parallel as parallel

    module = finetuning(path)
    watch = SaveAfter((1,), f"{root}/c")
    runner = trainer(root, devices=2, strategy=FullyShard(), max_steps=2, limit_val_batches=0, callbacks=[watch])
    runner.fit(module, datamodule=latents_for(module, batch_size=1))

    base = parallel.ModelParallelStrategy
    whole = base.save_checkpoint

    def partly(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        whole(self, checkpoint, filepath, storage_options)
        (Path(filepath) / "meta.pt").unlink(missing_ok=True)
        raise Killed

    base.save_checkpoint = partly  # type: ignore[method-assign]
    with pytest.raises(Killed):
        runner.save_checkpoint(f"{root}/c-1")
    base.save_checkpoint = whole  # type: ignore[method-assign]
    return sorted(p.name for p in Path(root).iterdir())


def test_a_save_cut_short_leaves_the_old_checkpoint_whole(wan: Path, tmp_path: Path) -> None:
    for names in run_ranks(overwrite, str(wan), str(tmp_path)):
        assert names == [".c-1.partial", "c-1"]
    out = consolidate(tmp_path / "c-1", tmp_path / "one.ckpt")
    assert load_plain(out)["muybridge"]["updates"] == 1
    with pytest.raises(UsageError, match="no sharded checkpoint"):
        consolidate(tmp_path / ".c-1.partial", tmp_path / "two.ckpt")
    assert not (tmp_path / "two.ckpt").exists()


def uneven(root: str) -> str:
    with pytest.raises(UsageError) as caught:
        pl.Trainer(**QUIET, devices=2, strategy=FullyShard(replicate=3)).fit(Pair(0), datamodule=Numbers(4))
    return str(caught.value)


def test_groups_must_divide_the_ranks(tmp_path: Path) -> None:
    for message in run_ranks(uneven, str(tmp_path)):
        assert "replicate is 3 on 2 ranks" in message
