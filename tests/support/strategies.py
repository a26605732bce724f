"""One run of the plain job under any strategy, and what it left: the measure by which strategies are compared."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.jobs import finetuning, latents_for, trainer
from torch import Tensor

from lightning_modules import FullyShard
from muybridge.backbones.sharding import full, reshard


@dataclass
class Left:
    """What a run left on this rank, whole tensors throughout."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


class Watch(pl.Callback):
    """Collects the numbers of each update; may save once."""

    def __init__(self, save_after: int = 0, path: str = "") -> None:
        self.left, self.save_after, self.path = Left(), save_after, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        if pl_module.updates == self.left.updates:
            return
        self.left.updates = pl_module.updates
        metrics = trainer.callback_metrics
        self.left.losses.append(float(metrics["train/loss"]))
        self.left.norms.append(float(metrics["train/grad_norm"]))
        if self.save_after and pl_module.updates == self.save_after:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.left.validation.append(float(trainer.callback_metrics["val/loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        left = self.left
        reshard(pl_module)
        for name, tensor in pl_module.state_dict().items():
            into = left.averages if name.startswith("average.") else left.weights
            into[name] = full(tensor).detach().clone()
        names = {id(p): n for n, p in pl_module.named_parameters()}
        optimizer: Any = trainer.optimizers[0]
        for parameter, state in getattr(optimizer, "_optimizer", optimizer).state.items():
            for key, value in state.items():
                left.moments[f"{names[id(parameter)]}/{key}"] = full(value).detach().clone()


def steady(parameters: Any) -> torch.optim.Optimizer:
    """Adam with an epsilon above rounding: where a gradient is next to nothing, its sign would be an accident."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def strategy(name: str) -> Any:
    """A strategy by a short name; gloo throughout."""
    return {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "folder": lambda: FullyShard(),
        "file": lambda: FullyShard(save_distributed_checkpoint=False),
        "replicas": lambda: FullyShard(replicate=2),
        "offload": lambda: FullyShard(cpu_offload=True),
    }[name]()


def run(
    path: str,
    kind: str,
    root: str,
    *,
    steps: int = 5,
    save_after: int = 0,
    save_to: str = "",
    ckpt_path: Optional[str] = None,
    validate: bool = False,
    job: Optional[dict[str, Any]] = None,
    data: Optional[dict[str, Any]] = None,
    callbacks: tuple[Any, ...] = (),
    **settings: Any,
) -> Left:
    """Train the plain job on global batches of four clips, whatever the number of ranks."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = finetuning(path, **{"optimizer": steady, **(job or {})})
    clips = latents_for(module, **{"count": 16, "batch_size": 4 // world, **(data or {})})
    watch = Watch(save_after, save_to)
    runner = trainer(
        root,
        devices=world,
        strategy=strategy(kind),
        max_steps=steps,
        limit_val_batches=1.0 if validate else 0,
        callbacks=[*callbacks, watch],
        **settings,
    )
    runner.fit(module, datamodule=clips, ckpt_path=ckpt_path)
    return watch.left
