"""What a projected gradient per clip costs: ratios to a plain forward and backward of the same batch, in the same run.

    python benchmarks/capture.py                     the toy of 4 layers, width 128, 64 tokens, and a transformer of width 256
    python benchmarks/capture.py --out FILE.md       also as a table in a file
    python benchmarks/capture.py --wan               Wan 1.3B's configuration with random weights at 81x480x832, on a GPU

Times are CPU seconds of this process (wall-clock on a GPU), the least of several rounds in which all take turns, since machines
are shared. TRAK, dattri and bergson are measured where they are installed, with the settings under which they run on this toy;
their imports don't count.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muybridge.attribution.checks import cosines, rank_correlation
from muybridge.attribution.per_sample import BatchedEngine, ParameterEngine, PerSample
from muybridge.attribution.projection import CountSketchProjection, FastfoodProjection, Projection


class Block(nn.Module):
    """A transformer block with attention written out, which every peer can differentiate."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class Toy(nn.Module):
    """Tokens to tokens."""

    def __init__(self, width: int, layers: int, channels: int = 16) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.inp(x)))

    @property
    def device(self) -> torch.device:
        """What bergson asks of a model."""
        return self.inp.weight.device

    @property
    def base_model(self) -> nn.Module:
        """Likewise."""
        return self


class Case:
    """A model and its clips."""

    def __init__(self, name: str, width: int, layers: int, tokens: int, count: int, batch: int) -> None:
        torch.manual_seed(0)
        self.name, self.batch = name, batch
        self.net = Toy(width, layers).eval()
        self.x = torch.randn(count, tokens, 16) + torch.randn(1, tokens, 16)
        self.y = torch.roll(self.x, 1, 1)
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        for _ in range(5):  # gradients of a fresh initialisation are special
            F.mse_loss(self.net(self.x[:batch]), self.y[:batch]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def batches(self, size: int) -> range:
        return range(0, len(self.x), size)

    def losses(self, first: int, size: int) -> Tensor:
        return (self.net(self.x[first : first + size]) - self.y[first : first + size]).square().flatten(1).mean(1)

    def plain(self, size: int) -> None:
        for first in self.batches(size):
            self.losses(first, size).sum().backward()
            self.net.zero_grad(set_to_none=True)

    def capture(
        self, make: Callable[[nn.Module], PerSample], projection: Projection | None, size: int
    ) -> Tensor | None:
        engine, rows = make(self.net), []
        for first in self.batches(size):
            if projection is None:
                engine.run(lambda f=first: self.losses(f, size), lambda name, gradient, start: None, size)
                continue
            out = projection.zeros(size)

            def sink(name: str, gradient: Tensor, start: int, out: Tensor = out) -> None:
                projection.add(out, name, gradient, start)

            engine.run(lambda f=first: self.losses(f, size), sink, size)
            rows.append(out)
        return torch.cat(rows) if rows else None


def seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of the fastest round of each; they take turns, since what a machine gives changes, and a first one warms up."""
    best = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                best[name] = min(best[name], time.process_time() - start)
    return best


def measure(case: Case, rounds: int, dims: tuple[int, ...]) -> list[tuple[str, float, float, str]]:
    """What is measured, milliseconds a clip, ratio to plain, rank correlation of cosines with full gradients."""
    count, rows = len(case.x), []
    full = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(case.losses(i, 1).sum(), list(case.net.parameters()))])
            for i in range(min(count, 48))
        ]
    )
    true = cosines(full)
    for size, make in ((case.batch, BatchedEngine), (1, ParameterEngine)):
        plain, bare = f"plain forward and backward, batch {size}", f"{make.__name__}, batch {size}, gradients only"
        works: dict[str, Callable[[], object]] = {
            plain: lambda s=size: case.plain(s),
            bare: lambda m=make, s=size: case.capture(m, None, s),
        }
        kept = {}
        for kind in (CountSketchProjection, FastfoodProjection):
            for dim in dims:
                projection = kind(dim)
                found = case.capture(make, projection, size)
                assert found is not None
                name = f"{make.__name__}, batch {size}, {projection.kind} {dim}"
                kept[name] = f"{rank_correlation(cosines(found[: len(full)]), true):.3f}"
                works[name] = lambda m=make, p=projection, s=size: case.capture(m, p, s)
        spent = seconds(works, rounds)
        for name, value in spent.items():
            rows.append((name, 1e3 * value / count, value / spent[plain], kept.get(name, "")))
            print(rows[-1], flush=True)
    return rows


def peers(case: Case, base: float) -> list[tuple[str, float, float, str]]:
    """TRAK, dattri and bergson, where they are installed."""
    rows = []
    count = len(case.x)
    known: tuple[tuple[str, str, Callable[[Case], Callable[[], object]]], ...] = (
        ("trak", "512", _trak),
        ("dattri", "512", _dattri),
        ("bergson", "512 of all linear layers", lambda case: _bergson(case, 512, "global")),
        ("bergson", "16x16 of each linear layer", lambda case: _bergson(case, 16, "per_module")),
    )
    for name, said, made in known:
        if importlib.util.find_spec(name) is None:
            rows.append((f"{name}: not installed", float("nan"), float("nan"), ""))
            continue
        try:
            run = made(case)
        except ImportError as error:
            rows.append((f"{name}: {error}", float("nan"), float("nan"), ""))
            continue
        start = time.process_time()
        run()
        spent = time.process_time() - start
        rows.append((f"{name}, {said}", 1e3 * spent / count, spent / base, ""))
        print(rows[-1], flush=True)
    return rows


def _trak(case: Case) -> Callable[[], object]:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Squared(AbstractModelOutput):
        def __init__(self) -> None:
            """The base class has an abstract one."""

        @staticmethod
        def get_output(model: nn.Module, weights: object, buffers: object, x: Tensor, y: Tensor) -> Tensor:
            out = torch.func.functional_call(model, (weights, buffers), (x.unsqueeze(0),))
            return (out - y.unsqueeze(0)).square().mean()

        @staticmethod
        def get_out_to_loss_grad(model: nn.Module, weights: object, buffers: object, batch: list[Tensor]) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    def work() -> None:
        size = sum(p.numel() for p in case.net.parameters())
        projector = BasicProjector(size, 512, 0, ProjectionType.rademacher, torch.device("cpu"), 128, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model=case.net,
                task=Squared(),
                train_set_size=len(case.x),
                save_dir=folder,
                device="cpu",
                projector=projector,
                proj_dim=512,
                use_half_precision=False,
                load_from_save_dir=False,
            )
            traker.load_checkpoint(case.net.state_dict(), model_id=0)
            for first in case.batches(64):
                x, y = case.x[first : first + 64], case.y[first : first + 64]
                traker.featurize(batch=[x, y], num_samples=len(x))

    return work


def _dattri(case: Case) -> Callable[[], object]:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    def loss(parameters: object, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return (torch.func.functional_call(case.net, parameters, (x.unsqueeze(0),)) - y.unsqueeze(0)).square().mean()

    def work() -> None:
        clips = DataLoader(TensorDataset(case.x, case.y), batch_size=64)
        queries = DataLoader(TensorDataset(case.x[:1], case.y[:1]), batch_size=1)
        task = AttributionTask(loss_func=loss, model=case.net, checkpoints=case.net.state_dict())
        options = {
            "proj_dim": 512,
            "proj_max_batch_size": 32,
            "proj_seed": 0,
            "device": "cpu",
            "proj_type": "rademacher",
        }
        attributor = TracInAttributor(
            task=task, weight_list=torch.ones(1), normalized_grad=True, device="cpu", projector_kwargs=options
        )
        with torch.no_grad():
            attributor.attribute(clips, queries)

    return work


def _bergson(case: Case, dim: int, target: str) -> Callable[[], object]:
    """Its collector, driven by hand: its own loop and its command know language models alone. It covers linear layers."""
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    count, tokens, _ = case.x.shape

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = Dataset.from_dict({"input_ids": [[0] * tokens] * count, "length": [tokens] * count})
            processor = GradientProcessor(projection_dim=dim, projection_target=target, include_bias=True)
            config = IndexConfig(run_path=f"{folder}/index", include_bias=True)
            # Weights are frozen, as it does itself, so that autograd leaves their gradients out; it wants one that is not.
            case.net.requires_grad_(False)
            case.net.inp.requires_grad_(True)
            try:
                collector = InMemoryCollector(model=case.net, cfg=config, processor=processor, data=rows)
                for first in case.batches(case.batch):
                    which = list(range(first, min(first + case.batch, count)))
                    with collector:
                        out = case.net(case.x[which].clone().requires_grad_())
                        losses = (out - case.y[which]).square().flatten(1).mean(1)
                        losses.sum().backward()
                        case.net.zero_grad(set_to_none=True)
                    collector.process_batch(which, losses=losses)
                collector.teardown()
            finally:
                case.net.requires_grad_(True)

    return work


def wan() -> list[tuple[str, float, float, str]]:
    """Seconds and peak memory of a clip of 81x480x832 on the configuration of Wan 2.1 1.3B, with random weights."""
    from diffusers import WanTransformer3DModel

    device = torch.device("cuda")
    torch.manual_seed(0)
    with device:
        net = WanTransformer3DModel(
            num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960
        ).bfloat16()
    net.enable_gradient_checkpointing()
    clean = torch.randn(1, 16, 21, 60, 104, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
    t = torch.full((1,), 500.0, device=device)

    def losses() -> Tensor:
        return net(clean, t, text, return_dict=False)[0].float().square().flatten(1).mean(1)

    def plain() -> None:
        losses().sum().backward()
        net.zero_grad(set_to_none=True)

    def ours(projection: Projection) -> Callable[[], object]:
        engine = ParameterEngine(net)

        def work() -> None:
            out = projection.zeros(1, device)
            engine.run(losses, lambda n, g, s: projection.add(out, n, g, s))

        return work

    rows, base = [], 0.0
    kinds: list[tuple[str, Callable[[], object]]] = [("plain forward and backward", plain)]
    kinds += [(f"{p.kind} {p.dim}", ours(p)) for p in (FastfoodProjection(4096), CountSketchProjection(4096))]
    for name, work in kinds:
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        spent = (time.perf_counter() - start) / 3
        base = base or spent
        memory = torch.cuda.max_memory_allocated() / 2**30
        rows.append((f"Wan 1.3B, 81x480x832: {name}", 1e3 * spent, spent / base, f"peak {memory:.1f} GiB"))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--only", choices=("toy", "wide"), help="one of the two models")
    parser.add_argument("--out", help="a Markdown file")
    parser.add_argument("--wan", action="store_true", help="the measurement on a GPU instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}"
    parts = []
    if arguments.wan:
        parts.append((torch.cuda.get_device_name(), wan()))
    else:
        if arguments.only != "wide":
            toy = Case("4 layers, width 128, 64 tokens", 128, 4, 64, 32, 32)
            rows = measure(toy, arguments.rounds, (512, 4096))
            parts.append((f"{toy.name}; {machine}", rows + peers(toy, rows[0][1] * len(toy.x) / 1e3)))
        if arguments.only != "toy":
            wide = Case("4 layers, width 256, 512 tokens", 256, 4, 512, 4, 4)
            parts.append((f"{wide.name}; {machine}", measure(wide, arguments.rounds, (4096,))))
    lines = [f"`{' '.join(['python benchmarks/capture.py', *sys.argv[1:]])}`", ""]
    for title, rows in parts:
        lines += [title, "", "| | ms a clip | ratio | rank correlation with full gradients |", "|---|---|---|---|"]
        lines += [f"| {name} | {ms:.2f} | {ratio:.2f} | {kept} |" for name, ms, ratio, kept in rows]
        lines.append("")
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
