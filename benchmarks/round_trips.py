"""How far a clip comes back from its inverted noise, and what bfloat16 leaves of the gradient of feature matching.

    python benchmarks/round_trips.py     # tiny models of random weights, on one thread of the CPU, about a minute

Both are about rounding and step sizes, which weights of a trained model change in amount: what the numbers are good for is their
order. Writes benchmarks/results/round-trips.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from muybridge import tiny
from muybridge.backbones import Backbone, load
from muybridge.backbones.adapters import LoRA, adapter_parameters, inject
from muybridge.diffusion import inversion, keyed_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.losses import MotionFeatureMatching

ROOT = Path(__file__).parent.parent
WAYS: dict[str, tuple[int, inversion.Order, int]] = {
    # steps, order, refinements
    "plain, 5 steps": (5, "euler", 0),
    "plain, 20 steps": (20, "euler", 0),
    "2 refinements, 20 steps": (20, "euler", 2),
    "midpoint, 20 steps": (20, "midpoint", 0),
}
FAMILIES = ("wan", "mochi", "ltx", "hunyuan", "cogvideox", "unet3d", "animatediff", "latte")
JUMPS = (1.0, 20.0, 50.0)


def latents_for(backbone: Backbone, name: str) -> Tensor:
    """A clip of noise, which no network has an easy way with."""
    geometry = backbone.geometry
    frames = geometry.frames or (4 if geometry.patch[0] == 2 else 3)
    return keyed_noise((geometry.channels, frames, 8, 8), 0, name)[None]


def round_trips(backbone: Backbone) -> dict[str, float]:
    """The relative error of every way there and back."""
    clean, denoise = latents_for(backbone, "clean"), backbone.guided(backbone.encode_text(["a dog runs"]))
    found = {}
    for way, (steps, order, refinements) in WAYS.items():
        states = inversion.invert(denoise, clean, backbone.schedule, steps, order, refinements)
        back = inversion.resample(denoise, states[-1], backbone.schedule, steps, order)
        found[way] = float(f"{float(inversion.relative_error(back, clean)[0]):.2g}")
    return found


def gradient(path: Path, dtype: str, jump: float) -> Tensor:
    """The adapter's gradient under feature matching, on one step whose prediction is the same in any dtype."""
    backbone = load(str(path), dtype=dtype)  # type: ignore[arg-type]
    inject(backbone, LoRA())
    weights = adapter_parameters(backbone)
    for name, parameter in weights.items():
        parameter.data.add_(0.1 * keyed_noise(tuple(parameter.shape), 0, name))
    t, text = torch.full((1,), 900.0), backbone.encode_text(["a dog runs"])
    clean, noise = latents_for(backbone, "clean"), latents_for(backbone, "noise")
    step = denoising_step(backbone, backbone.schedule, clean, noise, t, text)
    MotionFeatureMatching(jump=jump)(step).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in weights.values() if p.grad is not None])


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    paths = {name: tiny.write(name, folder / name) for name in FAMILIES}
    errors = {}
    for path in paths.values():
        backbone = load(str(path)).requires_grad_(False)
        errors[backbone.family] = round_trips(backbone)
    cosines = {}
    for jump in JUMPS:
        exact, rounded = (gradient(paths["wan"], dtype, jump) for dtype in ("float32", "bfloat16"))
        cosines[f"{jump:g}"] = round(float(torch.cosine_similarity(exact, rounded, dim=0)), 2)
    result = {
        "torch": torch.__version__,
        "relative error of the round trip": errors,
        "cosine of the gradient in bfloat16 with that in float32, by jump": cosines,
    }
    out = ROOT / "benchmarks/results/round-trips.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))
    print("| | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for family, row in errors.items():
        print(f"| {family} | " + " | ".join(f"{row[way]:g}" for way in WAYS) + " |")


if __name__ == "__main__":
    main()
