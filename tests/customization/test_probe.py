"""The probe: cells are what sampling step by step gives, beginnings are shared, boundaries are found where they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from support.denoising import denoising_inputs, open_tiny
from torch import Tensor

from muybridge.cli import main
from muybridge.customization import report
from muybridge.customization.boundary import by_clip, early, estimate, half_way, late, parting
from muybridge.customization.inverted import How
from muybridge.customization.probe import (
    Cell,
    Settings,
    marks,
    network_steps,
    probe_clip,
    renoised,
    tampered,
    target_caption,
    walked,
)
from muybridge.customization.references import Reference
from muybridge.customization.scores import ModelAlignment
from muybridge.customization.tau import KNOWN, Tau, read_tau
from muybridge.diffusion import FlowSchedule, inversion
from muybridge.errors import UsageError
from muybridge.registry import BACKBONES

Tiny = Callable[[str], Path]


class Counted:
    """A cheap network that pulls towards one value, and counts its calls."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return (z - self.value) / (t.view(-1, 1, 1, 1, 1) / 1000.0).clamp(min=1e-3)


def path_of(source: Counted, steps: int) -> list[Tensor]:
    clean = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    return inversion.invert(lambda z, t: torch.tanh(z), clean, FlowSchedule(3.0), steps)


def test_fifty_steps_and_ten_boundaries_take_eleven_hundred_network_steps() -> None:
    source, target = Counted(0.0), Counted(1.0)
    path = path_of(source, 50)
    cells = list(tampered(source, target, path, FlowSchedule(3.0), 10))
    assert len(cells) == 55
    assert source.calls + target.calls == network_steps(50, 10) == 1100
    assert network_steps(50, 10, "noise") == 275


def test_a_cell_is_the_sampling_with_swapped_words_step_by_step() -> None:
    schedule, steps = FlowSchedule(3.0), 6
    source, target = Counted(-1.0), Counted(1.0)
    path = path_of(source, steps)
    places = inversion.ladder(schedule, steps)[::-1]
    seen = []
    for start, end, found in tampered(source, target, path, schedule, 3):
        z = path[steps - start]
        for k in range(start, steps):
            z = inversion.ode_step(target if k < end else source, z, places[k], places[k + 1], schedule)
        assert torch.equal(found, z)
        seen.append((start, end))
    assert seen == [(0, 2), (0, 4), (0, 6), (2, 4), (2, 6), (4, 6)]


def test_a_sampling_s_path_is_its_places_from_clean_to_noise() -> None:
    schedule, source = FlowSchedule(3.0), Counted(0.5)
    noise = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    path = walked(source, noise, schedule, 5)
    assert source.calls == 5
    for done in range(6):
        assert torch.equal(path[5 - done], inversion.resample(Counted(0.5), noise, schedule, 5, stop=done))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_the_same_words_change_nothing_whatever_the_guidance(guidance: float, tiny_checkpoint: Tiny) -> None:
    """Guided sampling leaves the inverted path, so the cells must share its own."""
    backbone, steps = open_tiny(tiny_checkpoint("wan")), []
    pixels = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = Reference("a", "a disc | moves", pixels, 8.0)
    settings = Settings(How(4, refinements=3), 2, guidance)
    words, scorer = reference.caption, ModelAlignment(backbone, times=(500.0,))
    cells = probe_clip(backbone, reference, words, "subject", settings, scorer, lambda: steps.append(1))
    assert [(c.start, c.end) for c in cells] == [(4, 4), (0, 2), (0, 4), (2, 4)]
    assert all(c.similarity > 0.99 for c in cells)
    assert all(c.target == words for c in cells)
    assert len(steps) == 4 + network_steps(4, 2, "subject", guidance)


def test_fresh_noise_from_a_boundary_on() -> None:
    schedule = FlowSchedule(1.0)
    clean, fresh = torch.randn(2, 1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    source = Counted(0.0)
    found = {start: z for start, _, z in renoised(lambda z, t: torch.zeros_like(z), clean, fresh, schedule, 4, 4)}
    # A network that predicts no velocity leaves the noisy latents as they are.
    for start, sigma in ((0, 1.0), (1, 0.75), (3, 0.25)):
        torch.testing.assert_close(found[start], (1 - sigma) * clean + sigma * fresh)
    list(renoised(source, clean, fresh, schedule, 8, 4))
    assert source.calls == network_steps(8, 4, "noise") == 8 + 6 + 4 + 2


def grid(tau: int, swap: str = "subject", clip: str = "a", steps: int = 10) -> list[Cell]:
    """Cells of a world in which motion is settled in the steps before ``tau`` and looks in those from it on."""
    cells = []
    for start in (*range(steps), steps):
        for end in range(start + 1, steps + 1) if start < steps else (steps,):
            changed = set(range(start, end))
            before, after = set(range(tau)), set(range(tau, steps))
            look = len(changed & after) / max(len(after), 1)
            motion = 1.0 - 0.8 * len(changed & before) / max(len(before), 1)
            cells.append(
                Cell(
                    clip=clip,
                    frames=9,
                    swap=swap,
                    target="a cat | runs",
                    start=start,
                    end=end,
                    t_start=1000.0 - 100.0 * start,
                    t_end=1000.0 - 100.0 * end,
                    logsnr_start=-5.0 + start if start < steps else math.inf,
                    logsnr_end=-5.0 + end if end < steps else math.inf,
                    alignment=20.0 + 10.0 * look,
                    similarity=motion,
                    error=0.0,
                    ratio=1.0,
                )
            )
    return cells


@pytest.mark.parametrize("tau", [1, 3, 5, 9])
def test_the_boundary_is_found_where_it_is(tau: int) -> None:
    found = parting(late(grid(tau)))
    assert found.t == 1000.0 - 100.0 * tau
    assert found.clarity == pytest.approx(1.0)


def test_the_curves_begin_and_end_where_they_should() -> None:
    cells = grid(4)
    whole, untouched = (30.0, pytest.approx(0.2)), (20.0, 1.0)
    for curve, ends in ((late(cells), (whole, untouched)), (early(cells), (untouched, whole))):
        assert [(curve[i].alignment, curve[i].similarity) for i in (0, -1)] == list(ends)
        assert [p.t for p in curve] == [1000.0 - 100.0 * k for k in range(11)]


def test_motion_comes_back_half_way() -> None:
    # Six of ten steps settle the motion, evenly: half of it is settled after three.
    assert half_way(late(grid(6, "motion"))).t == pytest.approx(700.0)


def test_clips_are_averaged_and_their_spread_is_told() -> None:
    cells = [*grid(3, clip="a"), *grid(5, clip="b")]
    assert {n: e.t for n, e in by_clip(cells).items()} == {"a": 700.0, "b": 500.0}
    assert 500.0 <= (estimate(cells).t or 0.0) <= 700.0


def test_what_a_probe_recommends_is_what_a_config_takes(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result says τ in all units, of each clip, and how far these lie apart; pictures show both scales."""
    backbone = open_tiny(tiny_checkpoint("wan"))
    cells = [*grid(3, clip="a"), *grid(3, clip="b"), *grid(5, clip="c"), *grid(6, "motion", clip="a")]
    drawn: dict[str, list[tuple[str, list[str], int]]] = {}

    def note(figure: Any, path: Path) -> Path:
        drawn[path.stem] = [
            (axis.get_xlabel(), [t.get_text() for t in axis.get_xticklabels()], len(axis.lines)) for axis in figure.axes
        ]
        pyplot.close(figure)
        return path

    monkeypatch.setattr(report, "save_figure", note)
    result = report.conclude(tmp_path, cells, backbone, {"steps": 10})
    assert result == json.loads((tmp_path / report.RESULT).read_text())
    assert result["by_clip"] == {"a": 700.0, "b": 700.0, "c": 500.0}
    assert result["spread"] == pytest.approx((2.0 / 3.0 * 100.0**2 * 2.0) ** 0.5)
    assert result["range"] == [500.0, 700.0]
    assert result["tau"] == 700.0
    # σ = t/1000 in a flow family.
    assert result["sigma"] == pytest.approx(0.7)
    assert result["logsnr"] == pytest.approx(2.0 * math.log(0.3 / 0.7))
    assert [(c["swap"], c["tau"]) for c in result["cross_checks"]] == [("motion", pytest.approx(700.0))]
    assert Tau(from_probe=str(tmp_path)).resolve(backbone).value == 700.0
    heat, curves = drawn["heatmap-subject-9f"], drawn["curves-subject-9f"]
    assert [axis[0] for axis in heat[:2]] == ["tampering begins at time (logSNR)"] * 2
    assert heat[0][1][0] == "1000 (-5.0)"
    assert [axis[0] for axis in curves[2:]] == ["timestep (1000 is noise)", "logSNR"]
    # Tampered late, tampered early, and the boundary.
    assert [axis[2] for axis in curves] == [3, 3, 3, 3]
    assert report.read_cells(tmp_path / report.TABLE) == cells


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, alignment=20.0), "change nothing"),
        (lambda c: replace(c, similarity=1.0), "stays the same"),
        (
            lambda c: replace(c, alignment=20.0 + 10.0 * (c.end - c.start), similarity=1.0 - 0.1 * (c.end - c.start)),
            "no b",
        ),
    ],
)
def test_where_there_is_no_boundary_it_is_said_why(change: Callable[[Cell], Cell], said: str) -> None:
    found = estimate([change(c) for c in grid(5)])
    assert found.t is None
    assert said in found.reason


@pytest.mark.parametrize("clips", [1, 12])
def test_noise_has_no_boundary(clips: int) -> None:
    """An alignment that only wanders, however little, was once scaled to 0..1 like one that answers."""
    generator = torch.Generator().manual_seed(clips)
    found = 0
    for _ in range(200):
        cells = []
        for clip in range(clips):
            wander = torch.randn(11, generator=generator) * 1e-4
            # Motion that comes back evenly, so that it refuses nothing.
            cells += [
                replace(c, alignment=20.0 + float(wander[c.start]), similarity=1.0 - 0.08 * (c.end - c.start))
                for c in grid(5, clip=str(clip))
            ]
        found += estimate(cells).t is not None
    assert found <= 0.1 * 200


def test_an_answer_stands_above_noise() -> None:
    """A tenth of the change as noise at every boundary hides nothing."""
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(50):
        wander = torch.randn(11, generator=generator)
        noisy = [replace(c, alignment=c.alignment + float(wander[c.start])) for c in grid(5)]
        times.append(estimate(noisy).t or 0.0)
    assert sum(abs(t - 500.0) <= 100.0 for t in times) >= 45


def test_a_boundary_is_of_one_noise_schedule(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """CogVideoX 2b and 5b are one family, and time 950 is logSNR -8.6 and -7.4."""
    two, five = open_tiny(tiny_checkpoint("cogvideox")), open_tiny(tiny_checkpoint("cogvideox_rope"))
    t = torch.tensor([900.0])
    assert abs(float(two.schedule.logsnr(t) - five.schedule.logsnr(t))) > 0.5, "as the two published configurations"
    result = {"tau": 900.0, "family": "CogVideoX", "logsnr": float(two.schedule.logsnr(t))}
    (tmp_path / report.RESULT).write_text(json.dumps(result))
    assert Tau(from_probe=str(tmp_path)).resolve(two).value == 900.0
    with pytest.raises(UsageError, match=r"whose time 900 is logSNR .*; of this one it is"):
        Tau(from_probe=str(tmp_path)).resolve(five)


def test_cells_survive_their_file(tmp_path: Path) -> None:
    cells = grid(3)
    report.write_cells(tmp_path / "x.csv", cells)
    assert report.read_cells(tmp_path / "x.csv") == cells


def test_words_are_swapped() -> None:
    caption, others = "a man | runs", ["a man | sleeps", "a cat | runs"]
    assert target_caption(caption, others, "subject") == "a cat | runs"
    assert target_caption(caption, others, "motion") == "a man | sleeps"
    assert target_caption(caption, [], "subject", subject="a robot") == "a robot | runs"
    assert target_caption(caption, [], "noise") == caption
    for swap in ("subject", "motion"):
        with pytest.raises(UsageError, match=f"--{swap} WORDS"):
            target_caption(caption, [caption], swap)  # type: ignore[arg-type]


@pytest.mark.parametrize("boundaries", [1, 51])
def test_boundaries_must_fit_the_steps(boundaries: int) -> None:
    with pytest.raises(UsageError, match="from 2 to 50"):
        marks(50, boundaries)


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_probe_of_a_real_network_from_the_command(
    references: Callable[[Path, int], Path], tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = references(tmp_path / "clips", 2)
    captions = [(clips / f"clip-00{i}.txt").read_text().strip() for i in (0, 1)]
    subject = captions[0].split(" | ")[0]
    out = tmp_path / "probe"
    command = ["probe", f"--model={tiny_checkpoint('wan')}", f"--videos={clips}", f"--out={out}", "--steps=4"]
    command += ["--boundaries=2", "--refinements=1", "--frames=[9]", "--height=16", "--width=16"]
    command += ["--swaps=[subject,motion,noise]"]
    assert main(command) == 0
    cells = report.read_cells(out / "grid.csv")
    assert {(c.swap, c.clip) for c in cells} == {
        (s, c) for s in ("subject", "motion", "noise") for c in ("clip-000", "clip-001")
    }
    assert sum(c.swap == "subject" for c in cells) == 2 * (1 + 3)
    untouched = [c for c in cells if c.start == c.end]
    assert all(c.similarity == 1.0 and c.ratio == pytest.approx(1.0) for c in untouched if c.ratio)
    for name in ("heatmap-subject-9f", "heatmap-motion-9f", "curves-subject-9f", "curves-noise-9f"):
        assert (out / f"{name}.png").stat().st_size > 1000
    result = json.loads((out / "probe.json").read_text())
    assert [c["swap"] for c in result["cross_checks"]] == ["motion", "noise"]
    assert result["settings"]["how"]["steps"] == 4
    # Stopped after one clip: what is done is kept, and the same comes out.
    kept = (out / "cells/clip-000.9f.subject.csv").stat().st_mtime_ns
    (out / "cells/clip-001.9f.subject.csv").unlink()
    before = (out / "grid.csv").read_text()
    capsys.readouterr()
    assert main(command) == 0
    assert "5 of 6 grids" in capsys.readouterr().out
    assert (out / "cells/clip-000.9f.subject.csv").stat().st_mtime_ns == kept
    assert (out / "grid.csv").read_text() == before
    # Other settings do not mix, and other words neither.
    assert main([*command, "--guidance=3"]) == 2
    assert "guidance" in capsys.readouterr().err
    assert {c.target for c in cells if (c.swap, c.clip) == ("noise", "clip-000")} == {captions[0]}
    other = captions[1].split(" | ")
    assert {c.target for c in cells if (c.swap, c.clip) == ("motion", "clip-000")} == {f"{subject} | {other[1]}"}
    words = clips / "clip-001.txt"
    before = words.read_text()
    words.write_text(f"a robot | {other[1]}")
    assert main(command) == 2
    assert "made with the words" in capsys.readouterr().err
    words.write_text(before)


def test_several_lengths_are_probed_one_after_another(clips: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    command = [
        "probe",
        f"--model={tiny_checkpoint('wan')}",
        f"--videos={clips}",
        f"--out={out}",
        "--steps=2",
        "--limit=1",
    ]
    command += ["--boundaries=2", "--refinements=0", "--frames=[9,5]", "--height=16", "--width=16", "--subject=a robot"]
    assert main(command) == 0
    result = json.loads((out / "probe.json").read_text())
    assert [result["frames"], *(c["frames"] for c in result["cross_checks"])] == [9, 5]
    assert {c.frames for c in report.read_cells(out / "grid.csv")} == {9, 5}
    assert (out / "curves-subject-5f.png").is_file()


def test_the_inverted_path_is_the_source_path(tiny_checkpoint: Tiny) -> None:
    """What lets cells share their beginnings: sampling from the noise visits the states of the inversion."""
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, _, text = denoising_inputs(backbone, samples=1)
    denoise = backbone.guided(text)
    path = inversion.invert(denoise, latents, backbone.schedule, 8, refinements=4)
    for done in (2, 5, 8):
        z = inversion.resample(denoise, path[-1], backbone.schedule, 8, stop=done)
        assert float(inversion.relative_error(z, path[8 - done])) < 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--alignment=clip"], "--clip_model DIR"),
        (["--alignment=clip", "--clip_model=nowhere"], "no CLIP model at nowhere"),
        (["--alignment=reader", "--subject=a robot"], "one shape of"),
        (["--boundaries=9"], "from 2 to 4"),
        (["--frames=[17]"], "can't be used"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_probe_that_cannot_be_is_refused_before_any_weight_is_read(
    options: list[str],
    said: str,
    clips: Path,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["probe", f"--model={tiny_checkpoint('wan')}", f"--videos={clips}", f"--out={tmp_path / 'x'}"]
    command += ["--steps=4", "--boundaries=2", "--frames=[9]", "--height=16", "--width=16"]
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err


# -- tau ---------------------------------------------------------------------------------------------------------------


def test_tau_comes_from_a_value_a_probe_or_the_table(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    backbone = open_tiny(tiny_checkpoint("cogvideox"))
    assert Tau().resolve(backbone).value == 950.0
    assert Tau(600.0).resolve(backbone).value == 600.0
    assert Tau(0.0, "logsnr").resolve(backbone).value == backbone.schedule.time_of_logsnr(0.0)
    (tmp_path / "probe.json").write_text(json.dumps({"tau": 812.0, "family": "CogVideoX"}))
    assert Tau(from_probe=str(tmp_path)).resolve(backbone).value == 812.0
    with pytest.raises(UsageError, match="of CogVideoX"):
        read_tau(tmp_path, "Wan")
    (tmp_path / "probe.json").write_text(json.dumps({"tau": None, "family": "CogVideoX", "reason": "all the same"}))
    with pytest.raises(UsageError, match="all the same"):
        Tau(from_probe=str(tmp_path)).resolve(backbone)
    (tmp_path / "probe.json").write_text(json.dumps({"tau": "high", "family": "CogVideoX"}))
    with pytest.raises(UsageError, match="no result of a probe"):
        Tau(from_probe=str(tmp_path)).resolve(backbone)


def test_boundaries_are_published_of_the_papers_families_alone() -> None:
    assert {name: known.tau for name, known in KNOWN.items() if known.tau is not None} == {
        "UNet3D": 700.0,
        "Latte": 700.0,
        "CogVideoX": 950.0,
    }
    assert set(KNOWN) == set(BACKBONES)


@pytest.mark.parametrize(
    ("tau", "said"),
    [
        (lambda: Tau(1200.0), "0 to 1000"),
        (lambda: Tau(999.5), "below 999"),
        (lambda: Tau(5.0, from_probe="x"), "one of the two"),
        (lambda: Tau(from_probe="nowhere"), "no result of a probe"),
        (lambda: Tau(), "none is published for Wan"),
    ],
)
def test_a_tau_that_cannot_be_is_refused(tau: Callable[[], Tau], said: str, tiny_checkpoint: Tiny) -> None:
    from muybridge.backbones import pick_family

    described = pick_family(str(tiny_checkpoint("wan")))(path=str(tiny_checkpoint("wan")))
    with pytest.raises(UsageError, match=said):
        tau().resolve(described)
