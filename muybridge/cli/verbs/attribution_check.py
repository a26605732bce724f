"""Is an attribution right? Tables of what projection and a single time do to a ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from muybridge.errors import UsageError

TRAINER = {"inference_mode": False, "logger": False, "strategy": "auto", "devices": 1, "num_nodes": 1}
"""Full gradients of many clips are held at once, in one process."""


def attribution_check(
    trainer: Any,
    model: Any,
    datamodule: Any,
    ckpt_path: Optional[str] = None,
    clips: int = 64,
    dims: list[int] = [128, 256, 512, 1024, 2048],  # noqa: B006 - printed by --print_config
    times: int = 7,
    memory_gib: float = 8.0,
    out: Optional[str] = None,
) -> None:
    """Compare the ranking of clip pairs by projected gradients with that by full ones, and by one time with that by many.

    Settings are those of callbacks.GradientCapture among the config's callbacks, as for `muybridge attribute`.

    Args:
        trainer: Says which device and precision; holds the callback.
        model: Whose gradients; its trained parameters count.
        datamodule: Its first training clips are compared.
        ckpt_path: A checkpoint to load first; the model as it is where not given.
        clips: How many clips.
        dims: Numbers of a vector.
        times: How many times, spread evenly, the one time of the callback is compared with; 0 leaves that out.
        memory_gib: Full gradients may take so much memory.
        out: A Markdown file for the tables; printed anyway.
    """
    from callbacks.gradient_capture import GradientCapture

    found = [callback for callback in trainer.callbacks if isinstance(callback, GradientCapture)]
    capture = found[0] if found else GradientCapture()
    trainer.datamodule, datamodule.trainer = datamodule, trainer
    text = trainer.run_with(
        model, lambda: _tables(trainer, model, datamodule, capture, clips, dims, times, memory_gib), ckpt_path
    )
    print(text)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n", encoding="utf-8")


def _tables(
    trainer: Any, model: Any, datamodule: Any, capture: Any, clips: int, dims: list[int], times: int, memory_gib: float
) -> str:
    import numpy as np

    from muybridge.attribution.checks import cosines, fidelity, rank_correlation
    from muybridge.attribution.projection import (
        CountSketchProjection,
        FastfoodProjection,
        NoProjection,
        SRHTProjection,
    )
    from muybridge.diffusion import Boundary

    backbone = model.sampled
    sizes = capture.sizes(trainer, backbone)
    need = clips * sum(sizes.values()) * 4 / 2**30
    if need > memory_gib:
        raise UsageError(
            f"full gradients of {clips} clips take {need:.1f} GiB",
            f"at most {memory_gib:g} GiB",
            "fewer --clips, or parameters",
        )
    time = capture.times[0].resolve(backbone.schedule)
    full = capture.collect(trainer, model, datamodule, time, clips, NoProjection())
    gradients, first = {}, 0
    for name, size in sizes.items():
        gradients[name], first = full[:, first : first + size], first + size
    lines = [
        f"{len(full)} clips, {full.shape[1]:,} parameters, timestep {time:g}",
        "",
        "| projection | D' | rank correlation | rms error of cosines | 1/√D' law |",
        "|---|---|---|---|---|",
    ]
    for kind in (FastfoodProjection, SRHTProjection, CountSketchProjection):
        for row in fidelity(gradients, kind, dims):
            lines.append(
                f"| {row.projection} | {row.dim} | {row.correlation:.3f} | {row.error:.4f} | {row.theory:.4f} |"
            )
    if times > 1:
        one = cosines(full)
        spread = [Boundary((i + 0.5) / times, "sigma").resolve(backbone.schedule) for i in range(times)]
        each = [cosines(capture.collect(trainer, model, datamodule, t, clips, NoProjection())) for t in spread]
        mean = np.mean(each, axis=0)
        said = ", ".join(f"{t:g}" for t in spread)
        lines += [
            "",
            f"One time ({time:g}) with the mean of {times} ({said}): rank correlation {rank_correlation(one, mean):.3f}",
        ]
    return "\n".join(lines)
