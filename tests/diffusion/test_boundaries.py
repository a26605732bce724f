"""A noise level in any unit names the same place, in every family."""

from __future__ import annotations

import math

import pytest
import torch
from support.schedules import SCHEDULES

from muybridge.diffusion import Boundary
from muybridge.errors import UsageError

UNITS = ("timestep", "sigma", "logsnr", "fraction")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trip(name: str, unit: str) -> None:
    schedule = SCHEDULES[name]
    for t in (0.0, 1.0, 137.0, 500.0, 700.0, 950.0, 999.0):
        assert Boundary.of_time(t, unit, schedule).resolve(schedule) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("unit", "value"), [("sigma", 0.77), ("sigma", 0.2), ("logsnr", -2.4), ("logsnr", 1.5)])
def test_sigma_and_logsnr_are_the_same_ratio_in_every_family(name: str, unit: str, value: float) -> None:
    schedule = SCHEDULES[name]
    wanted = value if unit == "logsnr" else 2 * math.log((1 - value) / value)
    t = torch.tensor(Boundary(value, unit).resolve(schedule), dtype=torch.float64)
    # A table's entries are this far apart at most here.
    assert schedule.logsnr(t).item() == pytest.approx(wanted, abs=0.02)


def test_published_correspondences() -> None:
    flow = SCHEDULES["flow"]
    assert Boundary(-2.4, "logsnr").resolve(flow) == pytest.approx(768.5, abs=0.1)
    assert Boundary(-5.0, "logsnr").resolve(flow) == pytest.approx(924.1, abs=0.1)
    assert Boundary(-7.4, "logsnr").resolve(flow) == pytest.approx(975.9, abs=0.1)
    assert Boundary(-2.41, "logsnr").resolve(SCHEDULES["modelscope"]) == 700
    assert Boundary(-4.97, "logsnr").resolve(SCHEDULES["latte"]) == 700
    assert Boundary(-7.44, "logsnr").resolve(SCHEDULES["cogvideox_5b"]) == 950
    assert Boundary(-8.59, "logsnr").resolve(SCHEDULES["cogvideox_2b"]) == 950
    # Under a shift of 3, times from 700 on take 56 per cent of the steps.
    assert Boundary.of_time(700.0, "fraction", type(flow)(3.0)).value == pytest.approx(0.5625, abs=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends(name: str) -> None:
    schedule = SCHEDULES[name]
    top = float(schedule.snap(torch.tensor(1000.0)))
    for noise in (Boundary(1.0, "sigma"), Boundary(-math.inf, "logsnr"), Boundary(0.0, "fraction")):
        assert noise.resolve(schedule) == top
    for clean in (Boundary(0.0, "sigma"), Boundary(math.inf, "logsnr"), Boundary(1.0, "fraction")):
        assert clean.resolve(schedule) == pytest.approx(0.0, abs=1e-200)
    for unit in UNITS:
        assert schedule.snap(torch.tensor(Boundary.of_time(1000.0, unit, schedule).resolve(schedule))).item() == top


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_noise_is_a_later_time(name: str) -> None:
    schedule = SCHEDULES[name]
    for unit, values in (
        ("sigma", (0.1, 0.4, 0.8, 0.95)),
        ("logsnr", (4.0, 0.0, -3.0, -6.0)),
        ("fraction", (0.9, 0.5, 0.2, 0.05)),
    ):
        times = [Boundary(value, unit).resolve(schedule) for value in values]
        assert times == sorted(times)
        assert len(set(times)) == 4


@pytest.mark.parametrize(
    ("value", "unit"),
    [(1.2, "sigma"), (-1.0, "timestep"), (1001.0, "timestep"), (2.0, "fraction"), (math.nan, "logsnr")],
)
def test_outside_the_scale_is_refused(value: float, unit: str) -> None:
    with pytest.raises(UsageError, match="boundary"):
        Boundary(value, unit)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(UsageError, match="'snr'"):
        Boundary(1.0, "snr")
