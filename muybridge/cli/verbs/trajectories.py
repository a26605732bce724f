"""A teacher's trajectories written once, for a student to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Optional

from muybridge.cli.verbs.cache import launched, leaving_at_sigterm
from muybridge.errors import UsageError

TRAINER = {"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "plugins": None}
"""Every rank works by itself: nothing is exchanged, so that one that dies takes no other with it."""


def trajectories(
    trainer: Any,
    model: Any,
    out: str,
    prompts: str,
    cache: Optional[str] = None,
    batch_size: int = 1,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    shard_mib: float = 256.0,
) -> None:
    """Write the paths of a teacher from noise to clean, for training a student with TrajectoryData.

    Run it again after it was stopped: it writes what is missing. Under torchrun or srun the ranks share the prompts. The noise
    of a trajectory depends on the config's seed and the prompt's id alone.

    Args:
        trainer: Says which kind of device.
        model: A TrajectoryDistillation: its teacher, path and steps.
        out: The folder, a new one or one that is to be completed.
        prompts: A text file with one prompt a line, or a JSONL file with ``prompt`` (and ``id``) in every line.
        cache: A cache that holds the prompts' embeddings, so that no text encoder is loaded.
        batch_size: Trajectories made together.
        dtype: What the states are kept in.
        shard_mib: Size of a file in MiB.
    """
    import torch

    from datamodules.prompts import read_prompts
    from lightning_modules.trajectory import TrajectoryDistillation
    from muybridge.data.cache import Cache, Share
    from muybridge.data.teaching import kept_times, write_trajectories
    from muybridge.data.trajectories import Trajectories
    from muybridge.diffusion.conditioning import Conditioning
    from muybridge.progress import Progress

    if not isinstance(model, TrajectoryDistillation):
        raise UsageError(
            f"{type(model).__name__} has no teacher's path", "the job TrajectoryDistillation", "see docs/causal.md"
        )
    if batch_size < 1 or shard_mib <= 0:
        raise UsageError(f"batch_size is {batch_size} and shard_mib is {shard_mib}", "at least 1, and above 0")
    ids, texts = read_prompts(prompts)
    teacher, path = model.teacher, model.path
    embedded = Cache(cache) if cache is not None else None
    if embedded is not None:
        embedded.check_backbone(teacher)
        embedded.check_texts(texts)
    if path.guidance != 1.0 and embedded is not None:
        teacher.give_unconditional(embedded.unconditional(path.negative_prompt), path.negative_prompt)
    elif embedded is None and "text_encoder" not in teacher.components:
        raise UsageError(
            f"the teacher was given components {list(teacher.components)} and no cache of the prompts",
            "text_encoder among them, or --cache",
            "`muybridge cache` embeds a file of prompts",
        )
    rank, world, local = launched()
    times = kept_times(teacher, path, model.steps)
    kind = trainer.strategy.root_device.type
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if "denoiser" not in teacher.components:
        raise UsageError(f"the teacher was given components {list(teacher.components)}", "denoiser among them")
    teacher.materialize().requires_grad_(False).to(device)

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        if embedded is not None:
            return Conditioning.cat([embedded.text(p) for p in prompts])
        return teacher.encode_text(prompts)

    label = f" (rank 0 of {world})" if world > 1 else ""
    with leaving_at_sigterm(), torch.no_grad():
        unconditional = teacher.unconditional(path.negative_prompt).to(device) if path.guidance != 1.0 else None
        write_trajectories(
            out,
            teacher,
            dict(zip(ids, texts, strict=True)),
            path,
            model.size,
            times,
            conditioning,
            unconditional,
            Share(rank, world),
            lambda what, count: Progress(what + label, count, show=rank == 0),
            batch_size,
            dtype,
            shard_bytes=int(shard_mib * 2**20),
        )
    if rank == 0:
        made = Trajectories(out)
        print(
            f"{out}: {len(made.ids)} trajectories at times {', '.join(f'{t:g}' for t in times)}"
            + ("" if world == 1 else " so far (other ranks may still be at work)")
        )
