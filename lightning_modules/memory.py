"""How much memory the weights of a distillation take, said before any are loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Optional

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.parallel import FullyShard
from muybridge.errors import UsageError

if TYPE_CHECKING:
    from lightning_modules.distillation import Distillation


def memory_of(device: torch.device) -> Optional[int]:
    """Bytes of a device's memory; ``None`` where there is no telling."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def memory_needed(job: Distillation, training: bool = True) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's moments by role, on all ranks together; activations come on top.

    Args:
        job: Its weights need not be loaded.
        training: Count gradients and moments too.
    """
    count = {
        id(b): sum(p.numel() for name in b._present_networks() for p in b.skeleton(name).parameters())
        for b in {id(b): b for b in job.roles().values()}.values()
    }
    needed = {"teacher": count[id(job.teacher)] * job.teacher.dtype.itemsize}
    for role, own in (("student", job.own_student), ("critic", job.own_critic)):
        if own is not None:
            averaged = own.dtype.itemsize if role == "student" and job.average_requested else 0
            needed[role] = count[id(own)] * ((4 if training else 1) * own.dtype.itemsize + averaged)
    return needed


def check_memory(job: Distillation) -> None:
    """Refuse a job whose weights and optimizers alone are more than the device holds, before any is loaded."""
    strategy = job.trainer.strategy
    sharded = isinstance(strategy, FullyShard)
    if sharded and strategy.cpu_offload:  # type: ignore[attr-defined]
        return
    ranks = job.trainer.world_size // strategy.replicate if sharded else 1  # type: ignore[attr-defined]
    held = memory_of(strategy.root_device)
    training = job.trainer.state.fn == TrainerFn.FITTING
    needed = memory_needed(job, training)
    total = sum(needed.values()) / ranks
    if held is None or total <= held:
        return
    parts = ", ".join(f"{role} {size / ranks / 2**30:.1f}" for role, size in needed.items())
    what = "weights, gradients and Adam" if training else "weights"
    raise UsageError(
        f"this job needs {total / 2**30:.1f} GiB on every device for {what} alone ({parts}), and"
        f" {strategy.root_device} has {held / 2**30:.1f}",
        "less than the device holds, with room for activations",
        "set student_lora and critic_lora (one copy of the weights), shard over more devices (strategy: FullyShard),"
        " set the teacher's dtype to bfloat16, or cpu_offload of FullyShard",
    )
