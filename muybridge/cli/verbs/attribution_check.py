"""Is an attribution right? Tables of what projection, a single time and the length of clips do to a ranking."""

from __future__ import annotations

import json
from dataclasses import asdict
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

    Settings are those of callbacks.GradientCapture among the config's callbacks, as for `muybridge attribute`. Where clips have
    several lengths (data.buckets), also what length does to scores, with and without the factor 1/F.

    Args:
        trainer: Says which device and precision; holds the callback.
        model: Whose gradients; its trained parameters count.
        datamodule: Its first training clips are compared.
        ckpt_path: A checkpoint to load first; the model as it is where not given.
        clips: How many clips.
        dims: Numbers of a vector; none leaves projections out.
        times: How many times, spread evenly, the one time of the callback is compared with; 0 leaves that out.
        memory_gib: Full gradients may take so much memory.
        out: A Markdown file for the tables, which are printed anyway; the numbers go to a .json file beside it.
    """
    from callbacks.gradient_capture import GradientCapture

    found = [callback for callback in trainer.callbacks if isinstance(callback, GradientCapture)]
    capture = found[0] if found else GradientCapture()
    trainer.datamodule, datamodule.trainer = datamodule, trainer
    data = trainer.run_with(
        model, lambda: _measured(trainer, model, datamodule, capture, clips, dims, times, memory_gib), ckpt_path
    )
    text = markdown(data)
    print(text)
    if out is not None:
        file = Path(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
        file.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _measured(
    trainer: Any, model: Any, datamodule: Any, capture: Any, clips: int, dims: list[int], times: int, memory_gib: float
) -> dict[str, Any]:
    import numpy as np

    from muybridge.attribution.checks import cosines, fidelity, length_bias, rank_correlation
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
    full, frames = capture.collect(trainer, model, datamodule, time, clips, NoProjection())
    gradients, first = {}, 0
    for name, size in sizes.items():
        gradients[name], first = full[:, first : first + size], first + size
    kinds = (FastfoodProjection, SRHTProjection, CountSketchProjection)
    data: dict[str, Any] = {
        "clips": len(full),
        "parameters": full.shape[1],
        "time": time,
        "fidelity": [asdict(row) for kind in kinds if dims for row in fidelity(gradients, kind, dims)],
    }
    if len(set(frames)) > 1:
        products = (full.double() @ full.double().T).numpy()
        data["length_bias"] = [
            asdict(row) for row in length_bias(products, frames, getattr(capture.loss, "per_frame", False))
        ]
    if times > 1:
        one = cosines(full)
        spread = [Boundary((i + 0.5) / times, "sigma").resolve(backbone.schedule) for i in range(times)]
        each = [cosines(capture.collect(trainer, model, datamodule, t, clips, NoProjection())[0]) for t in spread]
        data["times"] = {"times": spread, "correlation": rank_correlation(one, np.mean(each, axis=0))}
    return data


def markdown(data: dict[str, Any]) -> str:
    """The tables of what was measured."""
    lines = [f"{data['clips']} clips, {data['parameters']:,} parameters, timestep {data['time']:g}"]
    if data["fidelity"]:
        lines += [
            "",
            "| projection | D' | rank correlation | rms error of cosines | 1/√D' law |",
            "|---|---|---|---|---|",
        ]
    for row in data["fidelity"]:
        said = f"{row['correlation']:.3f} | {row['error']:.4f} | {row['theory']:.4f}"
        lines.append(f"| {row['projection']} | {row['dim']} | {said} |")
    if "times" in data:
        said = ", ".join(f"{t:g}" for t in data["times"]["times"])
        count, kept = len(data["times"]["times"]), data["times"]["correlation"]
        lines += ["", f"One time ({data['time']:g}) with the mean of {count} ({said}): rank correlation {kept:.3f}"]
    if "length_bias" in data:
        lines += [
            "",
            "| score | rank correlation of length and mean score | share of the best tenth of its own length | by chance |",
            "|---|---|---|---|",
        ]
        for row in data["length_bias"]:
            lines.append(f"| {row['score']} | {row['lengths']:.3f} | {row['alike']:.3f} | {row['chance']:.3f} |")
    return "\n".join(lines)
