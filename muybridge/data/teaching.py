"""From prompts to a teacher's trajectories: one rank's share of the work, begun wherever an earlier run stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.causal import bidirectional
from muybridge.data.cache import Share
from muybridge.data.content import networks_key
from muybridge.data.trajectories import TrajectoryWriter
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_noise
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.errors import UsageError

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass
class TeacherPath:
    """How a teacher goes from noise to clean: its probability-flow ODE, without fresh noise on the way.

    Args:
        steps: Steps of the ODE.
        shift: Shift of its times; the family's own where not given. Flow families only.
        guidance: Standard guidance scale, ``u + s (c - u)``; 1 is none.
        negative_prompt: The other branch of guidance.
        seed: The starting noise is a function of this seed and the trajectory's id alone.
    """

    steps: int = 50
    shift: Optional[float] = None
    guidance: float = 6.0
    negative_prompt: str = ""
    seed: int = 0


class Counter(Protocol):
    """Told of everything that is done; see ``muybridge.progress``."""

    def advance(self, count: int = 1) -> None:
        """So many more are done."""


Watch = Callable[[str, int], AbstractContextManager[Counter]]
Texts = Callable[[Sequence[str]], Conditioning]
"""Prompts to conditioning."""


def kept_times(backbone: Backbone, path: TeacherPath, steps: Sequence[float]) -> list[float]:
    """Which states of a teacher's path are kept for a student of these steps: for each the nearest one, and the clean end.

    Args:
        backbone: The teacher; needs no weights.
        path: How it goes.
        steps: The student's falling times.
    """
    times = ode_times(backbone.schedule, path.steps, path.shift)
    kept = [min(times[:-1], key=lambda t: abs(t - step)) for step in steps]
    far = [(step, t) for step, t in zip(steps, kept, strict=True) if abs(step - t) > 1.0]
    if far:
        step, t = far[0]
        raise UsageError(
            f"the student's step {step:g} is not on the teacher's path of {path.steps} steps, whose nearest time is {t:g}",
            "steps within 1 of times that the path passes through: "
            + ", ".join(f"{t:.4g}" for t in times[:: max(len(times) // 10, 1)]),
            "change the student's steps, or the path's steps and shift (50 steps at shift 8 pass through 1000, 756.8, 521.7)",
        )
    return [*kept, 0.0]


def made_of(backbone: Backbone, path: TeacherPath, size: Size, times: Sequence[float], dtype: str) -> dict[str, Any]:
    """All that trajectories depend on, as plain values."""
    return {
        "family": backbone.family,
        "networks": networks_key(backbone),
        "text_length": backbone.max_text_length,
        **asdict(path),
        **dict(zip(("frames", "height", "width"), size, strict=True)),
        "times": [round(t, 6) for t in times],
        "network_dtype": str(backbone.dtype).removeprefix("torch."),
        "dtype": dtype,
    }


def write_trajectories(
    out: str | Path,
    backbone: Backbone,
    prompts: Mapping[str, str],
    path: TeacherPath,
    size: Size,
    times: Sequence[float],
    texts: Texts,
    unconditional: Optional[Conditioning],
    share: Share,
    watch: Watch,
    batch_size: int = 1,
    dtype: str = "float16",
    **options: Any,
) -> int:
    """Write the trajectories of this rank that a folder lacks; returns how many.

    Args:
        out: The folder.
        backbone: The teacher, loaded. A causal one is run with all its frames seeing one another.
        prompts: Prompts by id, of all ranks.
        path: How the teacher goes from noise to clean.
        size: Of the clips.
        times: Which of its times are kept, see :func:`kept_times`.
        texts: Prompts to conditioning.
        unconditional: The other branch of guidance; needed where the path has any.
        share: This rank's.
        watch: Makes a counter from a label and a number.
        batch_size: Trajectories made together.
        dtype: What the states are kept in.
        options: Further arguments of :class:`~muybridge.data.shards.ShardWriter`.
    """
    shape = backbone.latent_shape(*size)
    made = made_of(backbone, path, size, times, dtype)
    all_times = ode_times(backbone.schedule, path.steps, path.shift)
    with TrajectoryWriter(out, made, getattr(torch, dtype), **options) as writer, bidirectional(backbone):
        todo = [name for name in prompts if name in share and name not in writer.done]
        with watch("trajectories", len(todo)) as counter:
            for start in range(0, len(todo), batch_size):
                names = todo[start : start + batch_size]
                noise = torch.stack([keyed_noise(shape, path.seed, "trajectory", name) for name in names])
                conditioning = texts([prompts[name] for name in names]).to(backbone.device)
                denoise = backbone.guided(conditioning, unconditional, path.guidance)
                states: list[Tensor] = [
                    state.cpu()
                    for time, state in ode_path(denoise, noise.to(backbone.device), backbone.schedule, all_times)
                    if time in times
                ]
                for slot, name in enumerate(names):
                    writer.add(name, prompts[name], times, torch.stack([state[slot] for state in states]))
                counter.advance(len(names))
    return len(todo)
