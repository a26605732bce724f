"""An influence store of a million clips: how long writing, going on, reading and scoring take, and how much memory.

    python benchmarks/store.py --out benchmarks/results/store.json
    python benchmarks/store.py --rows 100000 --dim 512

Vectors are chance, written by the writer that `muybridge attribute` uses, one at a time. Each phase is a process of its own,
whose largest memory is told; what "nothing" takes are the libraries. Times are CPU seconds, since machines are shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from muybridge.attribution.influence import influence, sweep
from muybridge.attribution.selecting import select
from muybridge.attribution.store import InfluenceStore, StoreWriter

PHASES = ("nothing", "write", "go on", "score", "score, centred", "kernel", "select")


def manifest(dim: int) -> dict[str, object]:
    """As `muybridge attribute` writes it, but for what is not there."""
    return {"model": {"digest": "none"}, "projection": {"projection": "fastfood", "dim": dim}}


def write(path: Path, rows: int, queries: int, dim: int, begin: int = 0) -> StoreWriter:
    """Rows of chance."""
    with StoreWriter(path, manifest(dim)) as writer:
        generator = torch.Generator().manual_seed(begin)
        for i in range(queries):
            writer.add(f"query-{i:08d}", "query", 0, 500.0, torch.randn(dim, generator=generator))
        for i in range(begin, rows):
            if i % 4096 == 0 or i == begin:
                block = torch.randn(4096, dim, generator=generator)
            writer.add(f"clips/{i:08d}", "train", 0, 500.0, block[i % 4096])
    return writer


def phase(name: str, path: Path, rows: int, queries: int, dim: int) -> dict[str, object]:
    """What a phase gives, beside its cost."""
    if name == "nothing":
        return {}
    if name == "write":
        return {"written": sum(write(path, rows, queries, dim).counts.values())}
    if name == "go on":
        # A run that was stopped: everything but the last thousandth is there.
        return {"written": sum(write(path, rows + rows // 1000, queries, dim).counts.values())}
    store = InfluenceStore(path)
    if name == "kernel":
        (scores,) = sweep(store, dampings=[10.0])
        return {"scored": list(scores.values.shape)}
    scores = influence(store, centre=name == "score, centred")
    if name == "select":
        return {"selected": len(select(scores, "1%"))}
    return {"scored": list(scores.values.shape), "root mean square": float(np.sqrt(np.mean(scores.values**2)))}


def child(name: str, path: Path, rows: int, queries: int, dim: int) -> None:
    """Run a phase, and print what it took."""
    torch.set_num_threads(1)
    before, start = time.process_time(), time.perf_counter()
    found = phase(name, path, rows, queries, dim)
    spent, wall = time.process_time() - before, time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        json.dumps(
            {"phase": name, "cpu_seconds": round(spent, 2), "seconds": round(wall, 2), "peak_mib": round(peak), **found}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        child(given.phase, Path(given.store), given.rows, given.queries, given.dim)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in PHASES:
            sizes = [f"--rows={given.rows}", f"--dim={given.dim}", f"--queries={given.queries}"]
            command = [sys.executable, __file__, f"--phase={name}", f"--store={folder}/store", *sizes]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
        files = list(Path(folder, "store").glob("part-*.parquet"))
        size = sum(file.stat().st_size for file in files)
    about = {
        "command": " ".join(["python benchmarks/store.py", *sys.argv[1:]]),
        "rows": given.rows,
        "dim": given.dim,
        "queries": given.queries,
        "files": len(files),
        "mib": round(size / 2**20),
        "vectors_mib": round(given.rows * given.dim * 4 / 2**20),
        "machine": f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}",
    }
    if given.out:
        Path(given.out).write_text(json.dumps({"about": about, "phases": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
