"""Latents and text embeddings encoded once, for every later run."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from muybridge.cli.leaving import leaving_at_sigterm
from muybridge.errors import UsageError
from muybridge.motion import MotionEstimator, MotionWeights

TRAINER = {"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "plugins": None}
"""Every rank works by itself: nothing is exchanged, so that one that dies takes no other with it."""


@dataclass(frozen=True)
class Job:
    """What a rank is to do; travels to other processes.

    Args:
        backbone: Encodes.
        datamodule: Knows the clips and texts.
        texts: Further texts.
        negative_prompts: Unconditional branches beside the empty one.
        out: The cache.
        dtype: What latents are kept in.
        shard_mib: Size of a shard.
        device: Kind of device.
        motion: Estimates the motion of clips, where their weights are wanted.
        weights: What it becomes.
    """

    backbone: Any
    datamodule: Any
    texts: list[str]
    negative_prompts: list[str]
    out: str
    dtype: str
    shard_mib: float
    device: str
    motion: Any = None
    weights: Any = None


def cache(
    trainer: Any,
    model: Any,
    datamodule: Any,
    out: str,
    prompts: Optional[str] = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shard_mib: float = 512.0,
    devices: int = 1,
    verify: bool = False,
    motion: Optional[MotionEstimator] = None,
    weights: MotionWeights = MotionWeights(),  # noqa: B008 - immutable, and printed by --print_config
) -> None:
    """Encode latents and text embeddings once; later runs then load neither VAE nor text encoder.

    Run it again after it was stopped, or after the clips changed: it encodes what is missing. Under torchrun or srun the ranks
    share the work.

    Args:
        trainer: Says which kind of device.
        model: Its backbone encodes.
        datamodule: What is encoded: the clips of VideoData, the prompts of PromptData or TrajectoryData.
        out: The cache, a new folder or one that is to be completed.
        prompts: A file of further texts to embed, such as those sampled during training (those of the config are anyway).
        dtype: What latents are kept in; float32 gives training exactly what encoding on the fly gives.
        shard_mib: Size of a file in MiB.
        devices: Processes on this machine, each with its own device.
        verify: Read the finished cache back whole, and compare with the checksums of what was written.
        motion: Add motion weights by this estimator, such as DIS, for losses that count what moves.
        weights: How displacement becomes weights.
    """
    from datamodules.prompts import read_prompts
    from muybridge.data.cache import Share

    if not callable(getattr(datamodule, "to_cache", None)):
        raise UsageError(
            f"{type(datamodule).__name__} has nothing to cache",
            "VideoData, PromptData or TrajectoryData, or one of yours with to_cache()",
        )
    if devices < 1 or shard_mib <= 0:
        raise UsageError(f"devices is {devices} and shard_mib is {shard_mib}", "at least 1, and above 0")
    rank, world, local = launched()
    target = Path(out)
    if target.is_dir() and any(target.iterdir()) and not ((target / "latents").is_dir() or (target / "text").is_dir()):
        raise UsageError(
            f"{out} exists, is not empty and is no cache",
            "a new folder, or a cache to go on with",
            "choose another --out",
        )
    if world > 1 and devices > 1:
        raise UsageError(
            f"--devices {devices} under a launcher that started {world} ranks", "one of the two", "leave --devices out"
        )
    sampling = getattr(model, "sampling", None)
    texts = [p for callback in trainer.callbacks for p in getattr(callback, "prompts", ())]
    job = Job(
        backbone=model.sampled,
        datamodule=datamodule,
        texts=[*texts, *(read_prompts(prompts)[1] if prompts is not None else ())],
        negative_prompts=[sampling.negative_prompt] if sampling is not None and sampling.negative_prompt else [],
        out=out,
        dtype=dtype,
        shard_mib=shard_mib,
        device=trainer.strategy.root_device.type,
        motion=motion,
        weights=weights,
    )
    if devices == 1:
        encode(job, Share(rank, world), local)
    else:
        spread(job, devices)
    if rank == 0:
        report(out, verify, alone=world == 1)


def launched() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as torchrun or srun tell them."""
    names = [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")]
    for triple in names:
        values = [os.environ.get(name, "") for name in triple]
        if all(v.isdigit() for v in values):
            rank, world, local = map(int, values)
            return rank, world, local
    return 0, 1, 0


def encode(job: Job, share: Any, local: int) -> None:
    """One rank's work."""
    import torch

    from muybridge.backbones.base import ALL_COMPONENTS
    from muybridge.data.encoding import encode_clips, encode_texts, weigh_clips
    from muybridge.progress import Progress

    backbone, first = job.backbone, share.rank == 0
    # A config for training from this cache may already say that the denoiser is all it loads.
    backbone.components = ALL_COMPONENTS
    device = torch.device(job.device, local) if job.device == "cuda" else torch.device(job.device)
    backbone.idle_device = device
    job.datamodule.setup("fit")
    material = job.datamodule.to_cache()
    label = f" (rank 0 of {share.world})" if share.world > 1 else ""
    shard_bytes = int(job.shard_mib * 2**20)
    parts = [(Path(job.out), material.clips, [*job.texts, *material.texts])]
    if material.validation is not None:
        parts.append((Path(job.out) / "validation", material.validation, []))
    for size in getattr(job.datamodule, "clip_sizes", ()):
        backbone.check_clip(*size)
    with leaving_at_sigterm():
        for out, source, extra in parts:
            captions = [clip.caption or "" for clip in source.clips] if source is not None else []

            def watch(what: str, count: int, out: Path = out) -> Progress:
                return Progress(f"{out.name}: {what}{label}", count, show=first)

            encode_texts(out, backbone, [*captions, *extra], job.negative_prompts, share, watch, shard_bytes)
        backbone.release("text_encoder")
        for out, source, _ in parts:
            if source is None:
                continue

            def watch(what: str, count: int, out: Path = out) -> Progress:
                return Progress(f"{out.name}: {what}{label}", count, show=first)

            policy = Policy(out, source, share, job.datamodule)
            encode_clips(
                out,
                backbone,
                source,
                share,
                functools.partial(read, workers=job.datamodule.num_workers),
                watch,
                getattr(torch, job.dtype),
                policy.bad,
                shard_bytes,
            )
            if job.motion is not None:
                reader = functools.partial(read, workers=job.datamodule.num_workers)
                weigh_clips(out, backbone, source, job.motion, job.weights, share, reader, watch, shard_bytes)


class Policy:
    """What is done about clips that can't be read: as in training, they are noted and skipped, up to a share.

    Args:
        out: The cache; the list of bad clips lies in it.
        source: All clips.
        share: This rank's.
        datamodule: Has ``on_error`` and ``max_bad_fraction``.
    """

    def __init__(self, out: Path, source: Any, share: Any, datamodule: Any) -> None:
        from muybridge.data.account import FILE, read

        self.file = out / FILE
        self.on_error = getattr(datamodule, "on_error", "skip")
        self.fraction = getattr(datamodule, "max_bad_fraction", 1.0)
        self.total = sum(clip.id in share for clip in source.clips)
        self.reasons: dict[str, str] = {}
        self._noted = {(entry.get("id"), entry.get("reason")) for entry in read(self.file)}

    def bad(self, clip: Any, why: str) -> None:
        """Note a clip; stop where it is one too many of all that this rank is to encode."""
        from datamodules.bad_videos import refuse_one
        from muybridge.data.account import Account, append, line, refuse

        self.reasons[clip.id] = why
        if (clip.id, why) not in self._noted:
            append(self.file, [line(clip.id, str(clip.path), why)])
        if self.on_error == "raise":
            raise refuse_one(clip.id, str(clip.path), why)
        account = Account(self.total, len(self.reasons), self.reasons)
        if account.too_many(self.fraction):
            raise refuse(account, self.fraction, str(self.file))


def read(source: Any, places: list[int], workers: int) -> Iterable[Any]:
    """The batches at some places, decoded ahead by worker processes."""
    from torch.utils.data import DataLoader, Subset

    from datamodules.sampling import outlive_notice

    return DataLoader(Subset(source, places), batch_size=None, num_workers=workers, worker_init_fn=outlive_notice)


def _rank(job: Job, rank: int, world: int) -> None:
    from muybridge.cli.front import USAGE
    from muybridge.data.cache import Share

    try:
        encode(job, Share(rank, world), rank)
    except UsageError as error:
        print(f"[rank {rank}] error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def spread(job: Job, count: int) -> None:
    """The work on several processes; the first that fails ends the others, which write what they have."""
    # Not fork: a process that has used a GPU can't be forked.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    processes = [context.Process(target=_rank, args=(job, rank, count)) for rank in range(count)]
    for process in processes:
        process.start()
    failed: list[int] = []
    try:
        waiting = list(processes)
        while waiting and not failed:
            multiprocessing.connection.wait([p.sentinel for p in waiting])
            waiting = [p for p in processes if p.exitcode is None]
            failed = [p.exitcode for p in processes if p.exitcode]
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()
    if failed:
        raise SystemExit(failed[0] if failed[0] > 0 else 128 - failed[0])


def report(out: str, verify: bool, alone: bool) -> None:
    """Say what a cache holds now."""
    from muybridge.data.cache import Cache

    for path in (Path(out), Path(out) / "validation"):
        if not path.is_dir():
            continue
        made = Cache(path)
        held = [f"{len(made.ids)} clips"] if "latents" in made.columns else []
        held += [f"{len(made.texts)} texts"] if "text" in made.columns else []
        held += [f"{len(made.weights)} motion weights"] if "weights" in made.columns else []
        size = sum(f.stat().st_size for name in made.columns for f in (path / name).glob("*.safetensors"))
        print(
            f"{path}: {', '.join(held)}, {size / 2**20:.1f} MiB"
            + ("" if alone else " so far (other ranks may still be at work)")
        )
        bad = made.bad if "latents" in made.columns else {}
        for name, why in list(bad.items())[:5]:
            print(f"  skipped {name}: {why}")
        if len(bad) > 5:
            print(f"  skipped {len(bad) - 5} more")
        if verify:
            wrong = made.verify()
            if wrong:
                name, why = next(iter(wrong.items()))
                raise UsageError(
                    f"{len(wrong)} rows of {path} are not as they were written, first {name}: {why}",
                    "rows whose checksums agree",
                    "the disk or a copy of it is damaged: remove the shards these rows are in, and run this again",
                )
            print("  every row is as it was written")
