"""The numbers of docs/customization.md are those of the files that it names, and what is promised of them holds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = (ROOT / "docs/customization.md").read_text(encoding="utf-8")


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose header begins so, without that header."""
    lines = PAGE[PAGE.index(first) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_what_a_step_costs() -> None:
    """A plain loss at most 1.05 times the bare pass, and the gate below a hundredth of a sampling step."""
    found = result("customize-small.json")
    by_way = {row["way"]: row for row in found["steps"]}
    assert by_way["Denoising"]["time against bare"] <= 1.05
    assert by_way["Denoising"]["memory against bare"] <= 1.05
    assert all(share < 0.01 for share in found["gate, share of a sampling step"].values())
    table = rows("| loss | time | memory |")
    assert [row[0] for row in table] == [way for way in by_way if way != "bare forward and backward"]
    for way, time, memory in table:
        measured = by_way[way]
        assert float(time.rstrip("x")) == pytest.approx(measured["time against bare"], abs=0.006)
        assert float(memory.rstrip("x")) == pytest.approx(measured["memory against bare"], abs=0.006)
    for share in found["gate, share of a sampling step"].values():
        assert f"{share:.2%}" in PAGE


def test_published_boundaries_in_signal_to_noise() -> None:
    with (RESULTS / "noise_levels.csv").open(newline="", encoding="utf-8") as file:
        levels = {row["family"]: (row["timestep"], f"{float(row['logsnr']):.1f}") for row in csv.DictReader(file)}
    said = {row[0]: row[1:] for row in rows("| family | published τ |")}
    assert said["ModelScope"] == ["700", f"logSNR {levels['ModelScope'][1]}"]
    assert said["Latte"] == ["700", f"logSNR {levels['Latte'][1]}"]
    both = f"logSNR {levels['CogVideoX-2b'][1]} (2b), {levels['CogVideoX-5b'][1]} (5b)"
    assert said["CogVideoX"] == ["950", both]
    for name, family in (("ModelScope", "ModelScope"), ("Latte", "Latte"), ("CogVideoX-2b", "CogVideoX")):
        assert float(levels[name][0]) == float(said[family][0])


def test_round_trips() -> None:
    found = result("round-trips.json")
    errors = found["relative error of the round trip"]
    table = rows("| | plain, 5 steps |")
    assert [row[0] for row in table] == list(errors)
    for family, *values in table:
        assert [float(value) for value in values] == list(errors[family].values())
        few, many, refined, _ = errors[family].values()
        assert refined < many < few, family
    jumps = found["cosine of the gradient in bfloat16 with that in float32, by jump"]
    said = ", ".join(f"{value:.2f} at {jump}" for jump, value in jumps.items())
    assert said in " ".join(PAGE.split())


def test_maps_know_motion() -> None:
    found = result("motion-layers.json")
    table = rows("| average precision, t |")
    names = {
        "maps over frames": "temporal",
        "maps to the text": "cross",
        "both": "both",
        "noisy latents": "noisy latents",
    }
    assert [row[0] for row in table] == list(names)
    for name, *values in table:
        assert values == [f"{value:.3f}" for value in found[names[name]].values()]
    said = f"Clean latents have {found['latents']['0.0']:.3f}, pixels {found['pixels']['0.0']:.3f}, chance {found['chance']:.3f}"
    assert said in PAGE
    for t in ("100.0", "300.0", "500.0", "700.0"):
        assert found["temporal"][t] > 2 * found["latents"]["0.0"]
