"""How long the command takes to answer, against importing Lightning's own CLI and nothing else.

    python benchmarks/startup.py [--repeats 5]

Writes ``benchmarks/results/startup.json``: for each command the median and least wall time and processor time of fresh
processes, and the packages it had loaded at the end. Processor time is the steadier number on a machine that others use.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "startup.json"

BARE = "import lightning.pytorch.cli"
FRONT = "from muybridge.cli import main; main({arguments!r})"
COMMANDS = {
    "import lightning.pytorch.cli": BARE,
    "muybridge --help": FRONT.format(arguments=["--help"]),
    "muybridge --version": FRONT.format(arguments=["--version"]),
    "muybridge list": FRONT.format(arguments=["list"]),
    "muybridge tiny --help": FRONT.format(arguments=["tiny", "--help"]),
    "muybridge fit --help": FRONT.format(arguments=["fit", "--help"]),
    "muybridge fit -c tiny/wan.yaml --print_config": FRONT.format(
        arguments=["fit", "-c", "tiny/wan.yaml", "--print_config"]
    ),
    "muybridge fit, a misspelt class": FRONT.format(
        arguments=["fit", "-c", "tiny/wan.yaml", "--model.losses=[Denoisng]"]
    ),
}
PACKAGES = ("torch", "lightning", "jsonargparse", "torchmetrics", "transformers", "diffusers", "peft")


def run(code: str) -> tuple[float, float, list[str]]:
    """Wall seconds, processor seconds and loaded packages of one fresh process."""
    tail = f"\nimport json, sys; print(json.dumps([m for m in {PACKAGES!r} if m in sys.modules]), file=sys.stderr)"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    loaded: list[str] = json.loads(result.stderr.strip().splitlines()[-1])
    return wall, cpu, loaded


def measure(repeats: int) -> dict[str, dict[str, object]]:
    """All commands in turn, several times over, so that a busy minute does not fall on one of them alone."""
    runs: dict[str, list[tuple[float, float, list[str]]]] = {name: [] for name in COMMANDS}
    for code in COMMANDS.values():
        run(code)  # compiles what has changed, and brings files into the cache
    for _ in range(repeats):
        for name, code in COMMANDS.items():
            runs[name].append(run(code))
    rows: dict[str, dict[str, object]] = {}
    for name, got in runs.items():
        walls, cpus = [g[0] for g in got], [g[1] for g in got]
        rows[name] = {
            "wall_median_s": round(statistics.median(walls), 3),
            "wall_least_s": round(min(walls), 3),
            "cpu_median_s": round(statistics.median(cpus), 3),
            "cpu_least_s": round(min(cpus), 3),
            "loaded": got[0][2],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    rows = measure(parser.parse_args().repeats)
    bare = float(str(rows["import lightning.pytorch.cli"]["cpu_least_s"]))
    for row in rows.values():
        row["cpu_to_bare_import"] = round(float(str(row["cpu_least_s"])) / bare, 3)
    versions = {
        p: importlib.metadata.version(p) for p in ("torch", "lightning", "jsonargparse", "torchmetrics", "transformers")
    }
    machine = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "versions": versions,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "commands": rows}, indent=2) + "\n", encoding="utf-8")
    width = max(map(len, rows))
    print(f"{'':<{width}}  wall s   cpu s  / bare import")
    for name, row in rows.items():
        print(
            f"{name:<{width}}  {row['wall_median_s']:6.2f}  {row['cpu_median_s']:6.2f}  {row['cpu_to_bare_import']:6.2f}"
        )


if __name__ == "__main__":
    main()
