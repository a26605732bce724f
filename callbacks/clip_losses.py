"""The loss of each held-out clip once training has ended: what data attribution is to foretell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from muybridge.backbones.base import Backbone
from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.draws import keyed_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.errors import UsageError
from muybridge.losses import Denoising, Loss


class ClipLosses(pl.Callback):
    """At the end of ``fit``, write every validation clip's losses to a Parquet file: columns ``id`` and one for each loss.

    A value is the mean over ``times`` and over draws of noise that are the same for a clip in every run. Neither training nor
    attribution sees these draws.

    Args:
        out: The .parquet file.
        losses: Which, each class once; ``Denoising`` where none is given.
        times: Noise levels; sigma 0.1, 0.3, 0.5, 0.7 and 0.9 where none is given.
        draws: Draws of noise at each.
        seed: Of these.
    """

    def __init__(
        self,
        out: str,
        losses: Optional[list[Loss]] = None,
        times: Optional[list[Boundary]] = None,
        draws: int = 2,
        seed: int = 0,
    ) -> None:
        if not out.endswith(".parquet"):
            raise UsageError(f"ClipLosses out is {out}", "a name that ends in .parquet")
        self.losses = {type(loss).__name__: loss for loss in (losses if losses is not None else [Denoising()])}
        if not self.losses or len(self.losses) < len(losses or self.losses):
            raise UsageError("ClipLosses has no losses, or two of one class", "one or more, each class once")
        if draws < 1 or (times is not None and not times):
            raise UsageError(
                f"ClipLosses draws is {draws} and times is {times}", "1 or more, and one noise level or more"
            )
        self.out, self.draws, self.seed = out, draws, seed
        self.times = list(times) if times is not None else [Boundary(s, "sigma") for s in (0.1, 0.3, 0.5, 0.7, 0.9)]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure with the averaged weights, where there are such."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not callable(getattr(datamodule, "in_order", None)):
            raise UsageError("ClipLosses without a datamodule that gives clips in order", "one with in_order(part)")
        training = {module for module in pl_module.modules() if module.training}
        pl_module.eval()
        rows: dict[str, dict[str, float]] = {}
        with torch.no_grad(), pl_module.averaged():
            for batch in datamodule.in_order("validation"):
                rows |= self._measure(trainer, pl_module, trainer.strategy.batch_to_device(batch, pl_module.device))
        for module in training:
            module.training = True
        everyone: list[Any] = [rows]
        if dist.is_initialized():
            everyone = [None] * trainer.world_size
            dist.all_gather_object(everyone, rows)
        if trainer.is_global_zero:
            self._write({name: row for part in everyone for name, row in part.items()})

    def _measure(self, trainer: pl.Trainer, module: Any, batch: Any) -> dict[str, dict[str, float]]:
        backbone: Backbone = module.sampled
        clean, text = module.clean_latents(batch, backbone), module.text(batch, backbone)
        shape, count = tuple(clean.shape[1:]), len(self.times) * self.draws
        totals = {name: torch.zeros(len(batch), dtype=torch.float64) for name in self.losses}
        for time in self.times:
            t = time.resolve(backbone.schedule)
            for draw in range(self.draws):
                keys = [(self.seed, "clip losses", name, f"{t:g}", draw) for name in batch.ids]
                noise = torch.stack([keyed_noise(shape, *key) for key in keys]).to(clean)
                with trainer.precision_plugin.forward_context():
                    times = torch.full((len(batch),), t, device=clean.device)
                    step = denoising_step(
                        backbone, backbone.schedule, clean, noise, times, text, batch.weights, batch.present
                    )
                    for name, loss in self.losses.items():
                        totals[name] += loss(step).double().cpu() / count
        there = [i for i in range(len(batch)) if batch.present is None or bool(batch.present[i])]
        return {batch.ids[i]: {name: float(values[i]) for name, values in totals.items()} for i in there}

    def _write(self, rows: dict[str, dict[str, float]]) -> None:
        import pyarrow as pa

        from muybridge.data.shards import write_part

        if not rows:
            raise UsageError("ClipLosses found no validation clips", "a datamodule with some")
        file, names = Path(self.out), sorted(rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {loss: [rows[name][loss] for name in names] for loss in self.losses}
        write_part(file, pa.table({"id": names, **columns}))
