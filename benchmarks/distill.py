"""What a full cycle of distillation costs beside the bare passes that it needs.

    python benchmarks/distill.py                      a small Wan with random weights, on any machine
    python benchmarks/distill.py --size long          the same on a clip of four times as many tokens
    python benchmarks/distill.py --size 1.3b          Wan 2.1 1.3B's shapes with random weights, on a GPU

A cycle is five updates of the critic and one of the student. Every pass through a network is counted while it runs (whose, how
large a batch, with gradients or without); after every cycle the same passes are timed alone, in the same process, and added up.
Reported are cycle / sum of passes (at most 1.10 is wanted), the share of a cycle that motion score matching takes (at most 1 %),
the share of the device's own rate of matrix products that a cycle achieves, and for roles as copies and as adapters on one base
the bytes of weights and the peak memory. Each way of holding the roles runs in a process of its own. Writes
benchmarks/results/distill-<size>-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "network": dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4),
        "clip": (9, 128, 128),
        "cycles": 7,
    },
    "long": {
        "network": dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4),
        "clip": (9, 256, 256),
        "cycles": 3,
    },
    "1.3b": {
        "network": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
        "clip": (81, 480, 832),
        "cycles": 3,
    },
}
"""Shapes of the network, the clip in pixels, and how many cycles are timed after one to warm up."""


def write_checkpoint(folder: Path, network: dict[str, Any]) -> Path:
    """A Wan pipeline whose network has other shapes, with random weights."""
    import torch
    from diffusers import WanTransformer3DModel

    from muybridge import tiny

    path = tiny.write("wan", folder / "wan")
    config = {**WanTransformer3DModel.load_config(path / "transformer"), **network, "rope_max_seq_len": 1024}
    torch.manual_seed(0)
    WanTransformer3DModel.from_config(config).save_pretrained(path / "transformer")
    return path


def measure(size: str, roles: str) -> dict[str, Any]:
    """One way of holding the roles, measured in this process."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import Dataset
    from torch.utils.flop_counter import FlopCounterMode

    from datamodules.base import ResumableData
    from lightning_modules import Clips, Distillation
    from muybridge.backbones import Pretrained
    from muybridge.backbones.adapters import LoRA
    from muybridge.batch import Batch
    from muybridge.diffusion import Conditioning
    from muybridge.losses import DistributionMatching, MotionScoreMatching

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shape, large = SIZES[size], size == "1.3b"
    on_gpu = torch.cuda.is_available()

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        # On a CPU with one thread, what others run meanwhile does not count.
        return time.process_time()

    class Texts(Dataset[Batch]):
        """Embeddings of no text."""

        def __len__(self) -> int:
            return 10000

        def __getitem__(self, index: int) -> Batch:
            text = Conditioning(torch.zeros(1, 512 if large else 16, 32))
            return Batch(ids=[str(index)], prompts=[""], conditioning=text)

    class Data(ResumableData):
        """A datamodule of them."""

        def train_dataset(self) -> Dataset[Batch]:
            return Texts()

    class Clock(pl.Callback):
        """Times iterations, counts what runs in each, and after every cycle times the same passes alone."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.passes: list[Counter[tuple[str, int, bool]]] = []
            self.alone: list[dict[tuple[str, int, bool], float]] = []
            self.counting = False

        def on_train_batch_start(self, *args: Any) -> None:
            self.passes.append(Counter())
            self.counting, self.start = True, now()

        def on_train_batch_end(self, *args: Any) -> None:
            self.times.append(now() - self.start)
            self.counting = False
            if len(self.times) % 5 == 0:
                # Next to the cycle in time: on a machine that others use too, an hour's passes are not another hour's.
                self.alone.append({kind: pass_alone(*kind) for kind in sorted(sum(self.passes[-5:], Counter()))})

    def pass_maker(role: Any, batch: int, grad: bool) -> Callable[[], None]:
        """One kind of pass by itself."""
        device = job.device
        z = torch.randn(batch, *job.latent_shape(), device=device)
        t, text = torch.full((batch,), 700.0, device=device), empty.expand(batch).to(device)

        def once() -> None:
            mixed = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
            with real(job, role) as backbone, mixed, torch.set_grad_enabled(grad):
                out = backbone(z, t, text)
                if grad:
                    out.float().square().mean().backward()

        return once

    def pass_alone(role: Any, batch: int, grad: bool) -> float:
        """Its seconds."""
        once, spent = pass_maker(role, batch, grad), []
        for _ in range(2 if large else 4):
            start = now()
            once()
            spent.append(now() - start)
            job.zero_grad(set_to_none=True)
        # Their mean: a cycle too holds whatever the machine's other users cost it, and nothing of that is left out of it.
        return statistics.fmean(spent[1:])

    def operations(role: Any, batch: int, grad: bool) -> int:
        """Its floating point operations in products of matrices, recomputed activations among them."""
        with FlopCounterMode(display=False) as counter:
            pass_maker(role, batch, grad)()
        job.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())

    def matrix_rate() -> float:
        """Operations a second of this device in one product of large square matrices, in the dtype of the passes."""
        size = 8192 if on_gpu else 1024
        matrix, spent = torch.randn(size, size, device=job.device, dtype=torch.bfloat16 if on_gpu else None), []
        for _ in range(6):
            start = now()
            matrix @ matrix
            spent.append(now() - start)
        return float(2.0 * size**3 / statistics.median(spent[1:]))

    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), shape["network"])
        checkpointing = large
        length = 512 if large else 16
        teacher = Pretrained(str(path), max_text_length=length, gradient_checkpointing=checkpointing)
        lora = LoRA(rank=16, targets=r".*attn[12]\.(?:to_[qkv]|to_out\.0)") if roles == "adapters" else None
        matching = MotionScoreMatching()

        def adam(parameters: Any) -> torch.optim.Optimizer:
            """As the shipped configs have it: one pass over the weights."""
            return torch.optim.AdamW(parameters, lr=2e-6, weight_decay=0.01, fused=True)

        frames, height, width = shape["clip"]
        job = Distillation(
            teacher=teacher,
            losses=[DistributionMatching(), matching],
            steps=[1000.0, 757.0, 522.0],
            student_lora=lora,
            critic_lora=lora,
            student_optimizer=adam,
            critic_optimizer=adam,
            guidance=4.5,
            clips=Clips(frames=frames, height=height, width=width),
        )
        empty = Conditioning(torch.zeros(1, length, 32))
        teacher.give_unconditional(empty)
        clock = Clock()
        run = pl.Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            max_steps=5 * (shape["cycles"] + 1),
            default_root_dir=folder,
            callbacks=[clock],
        )
        playing: list[str] = []
        real = Distillation.playing

        def watched(self: Any, role: Any) -> Any:
            playing.append(role)
            return real(self, role)

        def count(module: Any, args: Any, kwargs: Any) -> None:
            if torch._C._current_graph_task_id() == -1 and clock.counting:
                clock.passes[-1][(playing[-1], len(kwargs["hidden_states"]), torch.is_grad_enabled())] += 1

        configure = job.configure_model

        def configured() -> None:
            configure()
            for backbone in {id(b): b for b in job.roles().values()}.values():
                backbone.network.register_forward_pre_hook(count, with_kwargs=True)

        job.configure_model = configured  # type: ignore[method-assign]
        Distillation.playing = watched  # type: ignore[method-assign, assignment]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run.fit(job, datamodule=Data(num_workers=0))
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        weights = sum({p.data_ptr(): p.nbytes for p in job.parameters()}.values())

        per_iteration = clock.passes
        device = job.device
        job.to(device)
        latents = job.latent_shape()
        # Steps of the optimizers alone: beside passes over few tokens, as here, they are not small.
        steps_alone = 0.0
        for role, times in (("student", 1), ("critic", 5)):
            for parameter in job.trained(role).values():
                parameter.grad = torch.full_like(parameter, 1e-6)
            spent = []
            for _ in range(5):
                start = now()
                run.optimizers[("student", "critic").index(role)].step()
                spent.append(now() - start)
            steps_alone += times * statistics.median(spent[1:])
            job.zero_grad(set_to_none=True)
        x = torch.randn(1, *latents, device=device).requires_grad_()
        from muybridge.diffusion import ScoreStep

        step = ScoreStep(x, x.detach(), torch.full((1,), 500.0), torch.randn_like(x), torch.randn_like(x), empty)
        spent = []
        for _ in range(20):
            start = now()
            torch.autograd.grad(matching(step).mean(), x)
            spent.append(now() - start)
        ratios, cycles, bare = [], [], []
        for first in range(5, 5 * (shape["cycles"] + 1), 5):
            cycles.append(sum(clock.times[first : first + 5]))
            total: Counter[tuple[str, int, bool]] = sum(per_iteration[first : first + 5], Counter())
            bare.append(sum(clock.alone[first // 5][kind] * number for kind, number in total.items()))
            ratios.append(cycles[-1] / bare[-1])
        work = sum(operations(*kind) * number for kind, number in total.items())
        rate = matrix_rate()
        return {
            "roles": roles,
            "cycle_s": round(statistics.median(cycles), 4),
            "passes_s": round(statistics.median(bare), 4),
            "optimizer_steps_s": round(steps_alone, 4),
            "cycle_over_passes": round(statistics.median(ratios), 3),
            "cycle_over_passes_and_steps": round(
                statistics.median(c / (b + steps_alone) for c, b in zip(cycles, bare, strict=True)), 3
            ),
            "motion_score_matching_share_of_cycle": round(statistics.median(spent) / statistics.median(cycles), 5),
            "weights_mib": round(weights / 2**20, 1),
            "peak_memory_mib": round(peak / 2**20, 1),
            "peak_memory_of": "device" if on_gpu else "process (resident)",
            "teraflop_of_a_cycle": round(work / 1e12, 4),
            "matrix_teraflop_s": round(rate / 1e12, 3),
            "share_of_matrix_rate": round(work / cycles[-1] / rate, 3),
            "tokens": math.prod(latents[1:]) // 4,
            "parameters": sum(p.numel() for p in job.teacher.parameters()),
            "passes_of_a_cycle": {f"{r} batch {b} {'train' if g else 'infer'}": n for (r, b, g), n in total.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--roles", choices=["copies", "adapters"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.roles:
        print(json.dumps(measure(options.size, options.roles)))
        return
    import torch

    rows = []
    for roles in ("copies", "adapters"):
        command = [sys.executable, __file__, "--size", options.size, "--roles", roles]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    name = "gpu" if torch.cuda.is_available() else "cpu"
    result = {"device": device, "torch": torch.__version__, "rows": rows}
    file = ROOT / f"benchmarks/results/distill-{options.size}-{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
