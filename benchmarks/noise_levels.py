"""Where the published motion boundaries lie, in each family's own time and in signal-to-noise ratio.

    python benchmarks/noise_levels.py

Writes docs/images/noise-levels.png and benchmarks/results/noise_levels.csv. No model is needed: the schedules are enough.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from muybridge.diffusion import Boundary, FlowSchedule, NoiseSchedule, VPSchedule

ROOT = Path(__file__).parent.parent
FAMILIES: dict[str, tuple[NoiseSchedule, float | None]] = {
    "ModelScope": (VPSchedule.from_betas(), 700.0),
    "Latte": (VPSchedule.from_betas(1e-4, 0.02, "linear"), 700.0),
    "CogVideoX-2b": (VPSchedule.from_betas(prediction="v", snr_shift=3.0, zero_terminal_snr=True), 950.0),
    "CogVideoX-5b": (VPSchedule.from_betas(prediction="v", snr_shift=1.0, zero_terminal_snr=True), 950.0),
    "Wan (shift 3)": (FlowSchedule(3.0), None),
}
"""Schedule and published boundary above which a LoRA carries motion and not appearance; none is published for flow models."""


def main() -> None:
    t = torch.arange(1.0, 999.0)
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    rows = []
    for name, (schedule, boundary) in FAMILIES.items():
        line = axes.plot(t, schedule.logsnr(t), label=name, lw=1.8)[0]
        if boundary is None:
            continue
        place = Boundary(boundary)
        level = float(schedule.logsnr(torch.tensor([boundary])))
        axes.plot([boundary], [level], "o", color=line.get_color(), ms=7)
        rows.append(
            {
                "family": name,
                "timestep": boundary,
                "logsnr": round(level, 2),
                "sigma": round(Boundary.of_time(boundary, "sigma", schedule).value, 3),
                "same place in Wan's time": round(Boundary(level, "logsnr").resolve(FlowSchedule(3.0)), 1),
                "share of sampling steps above": round(
                    Boundary.of_time(place.resolve(schedule), "fraction", schedule).value, 3
                ),
            }
        )
    axes.set(
        xlabel="time of the family (0 clean, 1000 noise)",
        ylabel="log signal-to-noise ratio",
        ylim=(-12, 8),
        xlim=(0, 1000),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, title="dots: published motion boundaries", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/noise-levels.png", dpi=130)
    out = ROOT / "benchmarks/results/noise_levels.csv"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(out.read_text())


if __name__ == "__main__":
    main()
