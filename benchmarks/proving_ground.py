"""How fast clips of the proving ground are drawn and written.

    python benchmarks/proving_ground.py [--clips 200]

Writes ``benchmarks/results/proving_ground.json``: clips per second of processor time on one thread; writing is by
the wall clock, since the encoder has threads of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from muybridge.proving_ground import World, draw_scene, render, render_with_truth, write_clips
from muybridge.proving_ground.laws import judge

RESULT = Path(__file__).resolve().parent / "results" / "proving_ground.json"


def measure(world: World, clips: int) -> dict[str, float]:
    """Clips per second of drawing, of drawing with truth, of writing, and of judging by law."""
    rates = {}
    for name, draw in (("drawn", render), ("drawn_with_truth", render_with_truth)):
        started = time.process_time()
        for index in range(clips):
            draw(draw_scene(world, 0, index))
        rates[name] = clips / (time.process_time() - started)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_clips(folder, world, clips)
        rates["written_wall"] = clips / (time.perf_counter() - started)
    drawn = [render(draw_scene(world, 0, index)) for index in range(20)]
    started = time.process_time()
    for frames in drawn:
        judge(frames)
    rates["judged"] = len(drawn) / (time.process_time() - started)
    return {name: round(rate, 1) for name, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    clips = parser.parse_args().clips
    rows = {}
    for size in (32, 64):
        for anti_leak in (True, False):
            name = f"{size}x{size}, 17 frames, {'no leak' if anti_leak else 'natural'}"
            rows[name] = measure(World(size=size, anti_leak=anti_leak), clips)
            print(name, rows[name])
    machine = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "command": f"python benchmarks/proving_ground.py --clips {clips}",
    }
    RESULT.write_text(json.dumps({"machine": machine, "clips_per_second": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
