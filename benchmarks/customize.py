"""What a step of customization costs, against the bare forward and backward of the same model with the same adapter.

    python benchmarks/customize.py                 # a small Wan on the CPU, about a minute
    python benchmarks/customize.py --size 1.3b     # Wan 2.1 1.3B's own shape with random weights; wants a GPU

Every way takes turns with the bare pass, and the fastest round of each counts. On the CPU that is one thread's processor time,
which a busy machine hardly changes. Memory is what the GPU reports at its peak, and on the CPU the bytes that the step keeps for
its backward pass. Writes benchmarks/results/customize-<size>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from muybridge import tiny
from muybridge.backbones import Backbone, load
from muybridge.backbones.adapters import LoRA, inject
from muybridge.backbones.gates import _GateHook
from muybridge.diffusion import Boundary, keyed_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.losses import (
    AppearanceDebiased,
    AttentionMotionFlow,
    Denoising,
    FrameResidual,
    Loss,
    MotionFeatureMatching,
    MotionFeatures,
    SpaceTimeFeatures,
    TemporalHighPass,
)

ROOT = Path(__file__).parent.parent
SIZES = {
    # heads, size of a head, layers, feed-forward; latent frames, height, width
    "small": ((6, 32, 6, 768), (5, 16, 16)),
    "1.3b": ((12, 128, 30, 8960), (21, 60, 104)),
}


def build(size: str, device: torch.device) -> Backbone:
    """A Wan of that size with random weights."""
    from diffusers import WanTransformer3DModel

    (heads, head, layers, feed), _ = SIZES[size]
    folder = tiny.write("wan", Path(tempfile.mkdtemp()) / "wan")
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        num_layers=layers,
        ffn_dim=feed,
        text_dim=32,
        freq_dim=256,
        in_channels=16,
        out_channels=16,
    )
    network.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(folder / "transformer")
    kind = "bfloat16" if device.type == "cuda" else "float32"
    return load(str(folder), dtype=kind, gradient_checkpointing=device.type == "cuda").to(device)  # type: ignore


class Step:
    """One training step under a loss, or the bare pass under none.

    Args:
        backbone: With its adapter.
        loss: The loss.
        shape: Of the latents.
    """

    def __init__(self, backbone: Backbone, loss: Loss | None, shape: tuple[int, ...]) -> None:
        self.backbone, self.loss = backbone, loss
        device = backbone.device
        self.clean, self.noise = (keyed_noise(shape, 0, name)[None].to(device) for name in ("clean", "noise"))
        self.t = torch.full((1,), 900.0, device=device)
        self.text = backbone.encode_text(["a robot runs to the left"]).to(device)

    def __call__(self) -> None:
        backbone = self.backbone
        for parameter in backbone.parameters():
            parameter.grad = None
        if self.loss is None:
            value = (backbone.denoise(self.clean, self.t, self.text).float() - self.noise).square().mean()
        else:
            step = denoising_step(backbone, backbone.schedule, self.clean, self.noise, self.t, self.text)
            value = self.loss(step).mean()
        value.backward()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    if device.type != "cuda":
        started = time.process_time()
        function()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def bytes_held(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the GPU; on the CPU what is kept for the backward pass, each storage once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


def compare(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The fastest round of each, taken in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for function in ways.values():
        function()
    for _ in range(rounds):
        for name, function in ways.items():
            best[name] = min(best[name], seconds(function, device))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    backbone = build(options.size, device)
    shape = (16, *SIZES[options.size][1])
    losses: dict[str, Loss | None] = {
        "bare forward and backward": None,
        "Denoising": Denoising(),
        "TemporalHighPass": TemporalHighPass(),
        "AppearanceDebiased": AppearanceDebiased(),
        "FrameResidual": FrameResidual(),
        "MotionFeatureMatching, half of the layers": MotionFeatureMatching(),
        "MotionFeatureMatching, all layers": MotionFeatureMatching(depth=1.0),
        "SpaceTimeFeatures": SpaceTimeFeatures(),
        "MotionFeatures": MotionFeatures(),
        "AttentionMotionFlow": AttentionMotionFlow(),
    }
    inject(backbone, LoRA(t_min=Boundary(700.0)))
    steps = {name: Step(backbone, loss, shape) for name, loss in losses.items()}
    times = compare(steps, options.rounds, device)
    memory = {name: bytes_held(step, device) for name, step in steps.items()}
    bare = "bare forward and backward"
    rows = [
        {
            "way": name,
            "seconds": round(times[name], 4),
            "time against bare": round(times[name] / times[bare], 3),
            "MiB": round(memory[name] / 2**20, 1),
            "memory against bare": round(memory[name] / memory[bare], 3),
        }
        for name in steps
    ]

    # The gate: a sampling step above tau with it and without it, and below tau against the base model's.
    plain = steps[bare]

    def sample(network: Backbone, t: float) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> object:
            return network.denoise(plain.clean, torch.full((1,), t, device=device), plain.text)

        return call

    open_, untouched = build(options.size, device), build(options.size, device).requires_grad_(False)
    inject(open_, LoRA())
    gate = compare(
        {
            "above tau, gated": sample(backbone, 900.0),
            "above tau, no gate": sample(open_, 900.0),
            "below tau, gated": sample(backbone, 300.0),
            "base model": sample(untouched, 300.0),
        },
        3 * options.rounds,
        device,
    )
    # Differences of a whole step drown in its own; the gate's work by itself does not.
    hook = _GateHook(None, 700.0, 1000.0, backbone._scheduler_time)
    alone = {}
    for name, t in (("open", 900.0), ("closed", 300.0)):
        label = torch.full((1,), t, device=device)

        def work(label: Tensor = label) -> None:
            for _ in range(20):
                hook.before(backbone.network, (), {"timestep": label})
                hook.after(backbone.network, (), None)

        alone[name] = compare({name: work}, 3 * options.rounds, device)[name] / 20
    step_time = min(gate.values())
    result = {
        "model": f"Wan, {options.size}: (heads, size, layers, feed-forward) {SIZES[options.size][0]}, latents {shape}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU, one thread",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "steps": rows,
        "sampling step, seconds": {name: round(value, 5) for name, value in gate.items()},
        "gate by itself, seconds": {name: round(value, 7) for name, value in alone.items()},
        "gate, share of a sampling step": {name: round(value / step_time, 5) for name, value in alone.items()},
    }
    out = Path(options.out) / f"customize-{options.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(out.read_text())


if __name__ == "__main__":
    main()
