"""Projected gradients of every clip, into a store: of a model as it is, or at chosen updates of its training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.order import TakesLong
from muybridge.attribution.names import canonical
from muybridge.attribution.per_sample import BatchedEngine, ParameterEngine, PerSample, ShardedEngine
from muybridge.attribution.projection import FastfoodProjection, Projection
from muybridge.attribution.store import OK, UPDATES, Part, Stored, StoreWriter, check_update, model_digest, names_digest
from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import shared_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.errors import UsageError
from muybridge.losses import Loss, MotionWeightedDenoising
from muybridge.whole import write_text

SOURCES: dict[Part, Literal["train", "validation"]] = {"train": "train", "query": "validation"}
"""Which clips of a datamodule are the candidates, and which are asked about."""


def _is_setting(value: Any) -> bool:
    """Whether a value of a loss can be noted: a plain one, or a list of such."""
    if isinstance(value, list | tuple):
        return all(_is_setting(v) for v in value)
    return isinstance(value, bool | int | float | str | None)


@dataclass(frozen=True)
class _Clip:
    """What one forward is of."""

    clean: Tensor
    text: Conditioning
    weights: Optional[Tensor]


class GradientCapture(TakesLong):
    r"""Store ``P ∇_θ L(θ; clip, t, ε)`` of each clip, unnormalised, for ``muybridge select``.

    Training clips of the data are the candidates, its validation clips the queries. ``muybridge attribute`` makes one pass
    without training; with ``at`` or ``every`` it is also made during ``fit``, after these updates (TracIn). Adapters, precision
    and sharding are those of the job; dropout is off. All clips of a shape see the same noise (``noise_seed``) and times.

    A pass that was stopped goes on where it was, with any number of ranks.

    Args:
        out: The store, a folder.
        loss: Of one denoising step; ``MotionWeightedDenoising`` where not given.
        times: Noise levels; timestep 500 where none is given. For flow models timestep 500 is σ = 0.5, whatever the shift.
        projection: From a gradient to a vector; ``FastfoodProjection`` of 4096 numbers where not given.
        parameters: Full-match regex of the parameters, such as ``transformer\.blocks\..*``; all that the job trains where not
            given.
        engine: ``parameter`` takes one clip at a time and covers everything; ``batched`` takes a batch at once (not sharded);
            ``sharded`` has all ranks work on the same clip.
        noise_seed: Of the one draw of noise.
        captions: False takes every clip under the empty caption: what its pixels alone say of a motion, and no word.
        dtype: What vectors are kept in.
        at: Updates of ``fit`` after which a pass is made.
        every: A pass after every so many updates of ``fit``, too.
    """

    def __init__(
        self,
        out: str = "runs/influence",
        loss: Optional[Loss] = None,
        times: Optional[list[Boundary]] = None,
        projection: Optional[Projection] = None,
        parameters: Optional[str] = None,
        engine: Literal["parameter", "batched", "sharded"] = "parameter",
        noise_seed: int = 0,
        captions: bool = True,
        dtype: Stored = "float32",
        at: Sequence[int] = (),
        every: Optional[int] = None,
    ) -> None:
        if times is not None and not times:
            raise UsageError("times is empty", "at least one noise level, such as {value: 500}")
        if engine not in ("parameter", "batched", "sharded"):
            raise UsageError(f"GradientCapture engine is {engine!r}", "parameter, batched or sharded")
        if any(a < 0 for a in at) or (every is not None and every < 1):
            raise UsageError(
                f"GradientCapture at is {list(at)} and every is {every}", "updates of 0 or more, and 1 or more"
            )
        self.out = out
        self.loss = loss if loss is not None else MotionWeightedDenoising()
        self.times = list(times) if times is not None else [Boundary(500.0)]
        self.projection = projection if projection is not None else FastfoodProjection()
        self.parameters, self.engine, self.noise_seed, self.dtype = parameters, engine, noise_seed, dtype
        self.captions = captions
        self.at, self.every = set(at), every
        self._last = -1
        self._checked = False

    # -- during fit ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what has no network to attribute to."""
        if not isinstance(getattr(pl_module, "sampled", None), Backbone):
            raise UsageError(
                f"GradientCapture was given {type(pl_module).__name__}",
                "a lightning_modules.DiffusionModule",
                "remove the callback",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A pass before the first update, where asked."""
        self._maybe(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        """A pass after one of the chosen updates."""
        self._maybe(trainer, pl_module)

    def _maybe(self, trainer: pl.Trainer, module: Any) -> None:
        updates = module.updates
        due = updates in self.at or (self.every is not None and updates > 0 and updates % self.every == 0)
        if due and updates != self._last:
            self._last = updates
            self.capture(trainer, module, getattr(trainer, "datamodule", None), step=updates, training=True)

    # -- a pass ----------------------------------------------------------------------------------------------------

    def capture(
        self,
        trainer: pl.Trainer,
        module: Any,
        datamodule: Any,
        parts: Sequence[Part] = ("train", "query"),
        step: int = 0,
        training: bool = False,
        watch: Callable[[str, int], AbstractContextManager[Any]] = lambda label, count: nullcontext(),
    ) -> dict[str, int]:
        """Go over the clips once; returns how many rows were added, by their state, on this rank.

        Args:
            trainer: Gives ranks, precision and device.
            module: The job, set up.
            datamodule: Its training clips are candidates, its validation clips queries.
            parts: Which of the two.
            step: Updates of the weights so far.
            training: Whether the weights are those of an update, which are noted beside the manifest, rather than in it.
            watch: Makes a counter from a label and a number.
        """
        if not callable(getattr(datamodule, "in_order", None)):
            raise UsageError(
                f"{type(datamodule).__name__} can't give its clips in order", "a datamodule with in_order(part)"
            )
        backbone: Backbone = module.sampled
        engine = self._make_engine(trainer, backbone)
        self.projection.prepare(engine.sizes)
        alone = isinstance(engine, ShardedEngine)
        rank = trainer.global_rank
        digest = self._digest(module)
        manifest = self._manifest(trainer, module, datamodule, engine, "of each step" if training else digest)
        if rank == 0 or not dist.is_initialized():
            # One rank makes the folder, so that the others find its manifest.
            StoreWriter(self.out, manifest, rank, self.dtype)
        trainer.strategy.barrier()
        if training:
            noted = check_update(Path(self.out), step, digest)
            trainer.strategy.barrier()
            if rank == 0:
                write_text(Path(self.out) / UPDATES, json.dumps(noted, indent=2) + "\n")
        with StoreWriter(self.out, manifest, rank, self.dtype) as writer:
            for part in parts:
                done = writer.known(part)
                trainer.strategy.barrier()
                times = [t.resolve(backbone.schedule) for t in self.times]
                complete = {i for i, s, _ in done if s == step and all((i, step, t) in done for t in times)}
                loader = datamodule.in_order(SOURCES[part], complete, together=alone)
                label = f"{part} clips" + (f" of update {step}" if step else "")
                with watch(label, len(loader)) as counter:
                    for batch in loader:
                        moved = trainer.strategy.batch_to_device(batch, module.device)
                        self._capture(trainer, module, engine, moved, writer, part, step, times)
                        if counter is not None:
                            counter.advance()
                writer.flush()
        trainer.strategy.barrier()
        lost = {state: count for state, count in writer.counts.items() if state != OK}
        if lost:
            said = " and ".join(f"{count} whose gradient is {state}" for state, count in lost.items())
            rank_zero_info(f"{self.out}: rows without a vector: {said}; they are left out of scores")
        return dict(writer.counts)

    def _make_engine(self, trainer: pl.Trainer, backbone: Backbone) -> PerSample:
        if self.engine == "sharded":
            return ShardedEngine(backbone.networks, self.parameters, trainer.global_rank, trainer.world_size)
        return (BatchedEngine if self.engine == "batched" else ParameterEngine)(backbone.networks, self.parameters)

    @staticmethod
    def _digest(module: Any) -> str:
        """Of all weights of the network, whole."""

        def add_up(sums: Tensor) -> None:
            if dist.is_initialized():
                moved = sums.to(module.device)
                dist.all_reduce(moved)
                sums.copy_(moved)

        return model_digest({canonical(n): p for n, p in module.sampled.networks.named_parameters()}, add_up)

    def _manifest(
        self, trainer: pl.Trainer, module: Any, datamodule: Any, engine: PerSample, digest: str
    ) -> dict[str, Any]:
        backbone: Backbone = module.sampled
        cache = getattr(datamodule, "cache", None)
        weights = cache.manifests["weights"]["encoder"] if cache is not None and "weights" in cache.columns else None
        settings = {k: v for k, v in vars(self.loss).items() if k[0] != "_" and k != "training" and _is_setting(v)}
        return {
            "model": {"family": backbone.family, "path": backbone.checkpoint.given, "digest": digest},
            "parameters": {
                "pattern": self.parameters,
                "count": sum(engine.sizes.values()),
                "names": names_digest(list(engine.sizes)),
            },
            "loss": {"class": type(self.loss).__name__, **settings},
            "weights": weights,
            "times": [t.resolve(backbone.schedule) for t in self.times],
            "noise_seed": self.noise_seed,
            "precision": str(trainer.precision),
            "projection": self.projection.key(),
            **({} if self.captions else {"captions": False}),
        }

    # -- a batch ---------------------------------------------------------------------------------------------------

    def _capture(
        self,
        trainer: pl.Trainer,
        module: Any,
        engine: PerSample,
        batch: Batch,
        writer: StoreWriter,
        part: Part,
        step: int,
        times: Sequence[float],
    ) -> None:
        backbone: Backbone = module.sampled
        clean, text = self._inputs(module, batch)
        noise = shared_noise(tuple(clean.shape[1:]), self.noise_seed).to(clean)
        # A sharded network runs on all ranks or on none, so there what is known is made again and not written.
        collective = any(hasattr(p, "full_tensor") for p in backbone.networks.parameters())
        there = [batch.present is None or bool(batch.present[i]) for i in range(len(batch))]
        for t in times:
            known = [(name, step, t) in writer.known(part) or not there[i] for i, name in enumerate(batch.ids)]
            wanted = [i for i in range(len(batch)) if collective or not known[i]]
            for rows in self._groups(engine, wanted):
                clip = _Clip(clean[rows], text[rows], batch.weights[rows] if batch.weights is not None else None)
                vectors = self.vectors(trainer, backbone, engine, clip, noise, t)
                if isinstance(engine, BatchedEngine) and len(rows) > 1 and not self._checked:
                    self._check(trainer, backbone, clip, noise, t, vectors)
                    self._checked = True
                if isinstance(engine, ShardedEngine):
                    if dist.is_initialized():
                        dist.all_reduce(vectors)
                    if trainer.global_rank:
                        continue
                for i, vector in zip(rows, vectors, strict=True):
                    if there[i]:
                        writer.add(batch.ids[i], part, step, t, vector)

    def _inputs(self, module: Any, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents and text of a batch's clips."""
        backbone: Backbone = module.sampled
        with torch.no_grad():
            clean, text = module.clean_latents(batch, backbone), module.text(batch, backbone)
            return clean, text if self.captions else backbone.pair_unconditional(text).to(clean.device)

    @staticmethod
    def _groups(engine: PerSample, rows: list[int]) -> Iterator[list[int]]:
        if isinstance(engine, BatchedEngine):
            yield from [rows] if rows else []
        else:
            yield from ([row] for row in rows)

    def sizes(self, trainer: pl.Trainer, backbone: Backbone) -> dict[str, int]:
        """Numbers in each parameter that is attributed to."""
        return self._make_engine(trainer, backbone).sizes

    def collect(
        self, trainer: pl.Trainer, module: Any, datamodule: Any, t: float, count: int, projection: Projection
    ) -> tuple[Tensor, list[int]]:
        """The vectors of the first training clips at one time, (clips, dim), and their latent frames; in one process, no store.

        Args:
            trainer: Gives precision and device.
            module: The job, set up.
            datamodule: Has the clips.
            t: The time.
            count: How many clips.
            projection: In the place of the callback's own.
        """
        backbone: Backbone = module.sampled
        engine = ParameterEngine(backbone.networks, self.parameters)
        projection.prepare(engine.sizes)
        found: list[Tensor] = []
        frames: list[int] = []
        for batch in datamodule.in_order("train"):
            moved = trainer.strategy.batch_to_device(batch, module.device)
            clean, text = self._inputs(module, moved)
            noise = shared_noise(tuple(clean.shape[1:]), self.noise_seed).to(clean)
            for row in range(len(batch)):
                if len(found) < count and (batch.present is None or bool(batch.present[row])):
                    weights = moved.weights[[row]] if moved.weights is not None else None
                    clip = _Clip(clean[[row]], text[[row]], weights)
                    found.append(self.vectors(trainer, backbone, engine, clip, noise, t, projection).cpu())
                    frames.append(clean.shape[2])
            if len(found) >= count:
                break
        return torch.cat(found), frames

    def _check(
        self, trainer: pl.Trainer, backbone: Backbone, clip: _Clip, noise: Tensor, t: float, vectors: Tensor
    ) -> None:
        """Hold the first and last clip of the first batch against themselves alone: what is folded into the first axis shows."""
        single = ParameterEngine(backbone.networks, self.parameters)
        for row in (0, len(vectors) - 1):
            weights = clip.weights[[row]] if clip.weights is not None else None
            alone = self.vectors(
                trainer, backbone, single, _Clip(clip.clean[[row]], clip.text[[row]], weights), noise, t
            )[0]
            error = float((vectors[row] - alone).norm() / alone.norm().clamp(min=1e-30))
            if bool(torch.isfinite(alone).all()) and bool(alone.any()) and error > 0.1:
                raise UsageError(
                    f"in a batch, {backbone.family} gives a clip's gradient {error:.0%} off what it is alone",
                    "a network whose activations keep the clips along their first axis",
                    "engine: parameter",
                )

    def vectors(
        self,
        trainer: pl.Trainer,
        backbone: Backbone,
        engine: PerSample,
        clip: _Clip,
        noise: Tensor,
        t: float,
        projection: Optional[Projection] = None,
    ) -> Tensor:
        """The projected gradients of some clips at one time, (B, dim)."""
        count, map = len(clip.clean), projection if projection is not None else self.projection
        out = map.zeros(count, clip.clean.device)

        def losses() -> Tensor:
            with trainer.precision_plugin.forward_context():
                step = denoising_step(
                    backbone,
                    backbone.schedule,
                    clip.clean,
                    noise.expand_as(clip.clean),
                    torch.full((count,), t, device=clip.clean.device),
                    clip.text,
                    clip.weights,
                )
                return self.loss(step)

        engine.run(losses, lambda name, gradient, start: map.add(out, name, gradient, start), count)
        return out
