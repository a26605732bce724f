"""The proving ground's questions to attribution: what is asked is what the files hold, and it is asked once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from muybridge.attribution.influence import Scores
from muybridge.attribution.store import InfluenceStore
from muybridge.cli.bench.methods import Setting
from muybridge.cli.bench.questions import BY_CHANCE, LOSSES, WEIGHTED, Question, methods
from muybridge.data.selection import read_selection
from muybridge.proving_ground import MOTIONS
from muybridge.proving_ground.files import write_clips
from muybridge.proving_ground.small import SMALL

from .conftest import Command

CLIPS = 20
WORLD = replace(SMALL, motions=MOTIONS)


def question(root: Path, clips: int = CLIPS, seed: int = 0) -> Question:
    setting = Setting(root, "some/model", WORLD, clips, 0.2, 7, f"seed-{seed}/", seed)
    return Question(setting, ("compress",), "20%", 3, 4, 5, 1e-3, 0)


def test_what_it_takes_for_true_is_what_is_drawn(tmp_path: Path) -> None:
    one = question(tmp_path)
    write_clips(one.setting.folder, WORLD, 12, 0, 0.2)
    tables = {p: pq.read_table(one.setting.folder / f"{p}.parquet").to_pylist() for p in ("train", "validation")}
    for row in (r for rows in tables.values() for r in rows):
        scene = one.clips[row["id"]]
        assert (scene.motion, scene.appearance.shape) == (row["motion"], row["shape"])
        assert (row["id"] in one.candidates) is (row in tables["train"])
        assert (row["id"] in one.queries(row["motion"])) is (row in tables["validation"])
    halves = [set(one.half(number)) for number in range(4)]
    assert {len(half) for half in halves} == {len(one.candidates) // 2}
    assert len({frozenset(half) for half in halves}) == 4
    assert halves[0] != set(question(tmp_path, seed=1).half(0))
    # Every clip is in about half of many halves.
    many = np.array([[name in set(one.half(n)) for name in one.candidates] for n in range(60)])
    assert np.abs(many.mean(0) - 0.5).max() < 0.25


def test_scores_that_know_the_motion_find_all_of_it(tmp_path: Path) -> None:
    one = question(tmp_path, 100)
    queries = [name for name in one.clips if name not in one.candidates]
    same = np.array([[one.clips[n].motion == one.clips[q].motion for q in queries] for n in one.candidates])
    # A tenth of the clips has each motion, and a twentieth is looked at.
    rows = replace(one, top="5%").found({"truth": Scores(one.candidates, queries, same.astype(float))})
    assert rows["truth"]["same motion"] == 1.0
    assert rows["truth"]["NDCG of motion"] == 1.0
    assert rows["all clips"]["same motion"] == pytest.approx(same.mean())
    assert rows["truth"]["same colour"] < 0.5


def test_scores_that_know_what_training_does_foretell_it(tmp_path: Path) -> None:
    import pyarrow as pa

    one = question(tmp_path)
    queries = [name for name in one.clips if name not in one.candidates]
    truth = np.random.default_rng(0).normal(size=(len(one.candidates), len(queries)))
    one.write_halves()
    for number in range(4):
        inside = np.isin(one.candidates, (one.folder(number) / "clips.txt").read_text().split())
        values = {loss: (5.0 - inside @ truth * factor).tolist() for loss, factor in zip(LOSSES, (1, -1), strict=True)}
        pq.write_table(pa.table({"id": queries, **values}), one.folder(number) / "losses.parquet")
    scores = Scores(one.candidates, queries, truth)
    worse = replace(scores, values=-truth)
    rows = one.foretold({"truth": scores, "x, kernel λ = 1": worse, "x, kernel λ = 2": scores, WEIGHTED: scores})
    assert all(0.0 < rows[BY_CHANCE][heading] < 1.0 for heading in LOSSES.values())
    assert rows["truth"] == {LOSSES["Denoising"]: 1.0, LOSSES["MotionWeightedDenoising"]: -1.0}
    assert rows["x, kernel"] == {LOSSES["Denoising"]: 1.0, LOSSES["MotionWeightedDenoising"]: 1.0}, (
        "the better of the two"
    )


def test_gradients_are_of_what_moves_or_of_all_with_captions_or_without(tmp_path: Path) -> None:
    for captionless in (True, False):
        parts = replace(question(tmp_path), captionless=captionless).stores()[2:]
        found = [("ones" in str(p.arguments), "--trainer.callbacks.captions=false" in p.arguments) for p in parts]
        every = [(False, False), (False, True), (True, False), (True, True)]
        assert found == (every if captionless else every[::2])
        assert len({a for p in parts for a in p.arguments if "callbacks.out" in a}) == len(parts)


def test_all_selections_are_trained_on_alike(tmp_path: Path) -> None:
    one, known = question(tmp_path), {m.name: m for m in methods("20%", 1e-3)}
    asked = one.asked("compress")
    fits = {
        name: {p.arguments[0]: p for p in asked.parts(m)}["fit"].arguments for name, m in known.items() if m.trained
    }
    assert set(fits) == {"random", "magnitude", "similarity", "whole", "motion", "full"}
    for name, arguments in fits.items():
        own = {f"--trainer.default_root_dir={asked.root / name / 'run'}", f"--data.selection={asked.selection(name)}"}
        assert set(arguments) - own == set(fits["full"]) - {f"--trainer.default_root_dir={asked.root / 'full' / 'run'}"}
        assert (f"--data.selection={asked.selection(name)}" in arguments) is (name != "full")
    assert f"--data.folder={one.setting.folder}" in fits["full"]
    assert f"--data.motions={json.dumps(MOTIONS)}" in fits["full"]


def test_from_nothing_to_tables_and_not_twice(command: Command, tmp_path: Path) -> None:
    options = ["bench-attribution", "--out=b", "--seeds=1", f"--clips={CLIPS}", '--targets=["compress"]', "--updates=1"]
    options += [
        "--prompts=2",
        "--subsets=3",
        "--subset_updates=1",
        "--compared=3",
        "--dim=64",
        "--captionless=false",
        '--only=["motion"]',
    ]
    first = command(*options)
    assert first.code == 0, first.err
    text = (tmp_path / "b/results.md").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "b/results.json").read_text(encoding="utf-8"))
    assert text in first.out
    stores = sorted((tmp_path / "b/seed-0/attribution").glob("*/_manifest.json"))
    assert [file.parent.name for file in stores] == ["motion", "whole"]
    about = [InfluenceStore(file.parent).manifest for file in stores]
    assert [(a["loss"]["weights"], a["projection"]["dim"]) for a in about] == [("motion", 64), ("ones", 64)]
    assert data["about"]["candidates"] + data["about"]["queries"] == CLIPS
    for line in (
        "chance",
        "amount of motion",
        "likeness of latents",
        "motion-weighted attribution",
        "whole-video attribution",
    ):
        assert 0.0 <= data["found"][line]["same motion"]["mean"] <= 1.0
        assert set(data["foretold"][line]) == set(LOSSES.values())
    assert [entry["name"] for entry in data["given"]["compress"]] == ["real", "motion"]
    assert all(list(entry["seeds"]) == ["0"] for entry in data["given"]["compress"])
    chosen = read_selection(tmp_path / "b/seed-0/compress/selections/motion.parquet")
    assert len(chosen.ids) == round(0.1 * data["about"]["candidates"])
    assert {row["dim"] for row in data["checks"]["projection"]["fidelity"]} == {128, 256, 512, 1024, 2048}
    assert len(data["checks"]["projection"]["times"]["times"]) == 7
    assert [row["score"] for row in data["checks"]["length"]["length_bias"]] == ["dot", "dot, with 1/F", "cosine"]
    again = command(*options)
    assert again.code == 0, again.err
    assert "[part" not in again.out
    assert (tmp_path / "b/results.md").read_text(encoding="utf-8") == text
    assert command(*options, "--updates=2").code == 2


def test_what_can_be_wrong_is_said_before_anything_is_made(command: Command, tmp_path: Path) -> None:
    assert "targets are ['fly']" in command("bench-attribution", "--targets=[fly]").message
    assert "no query shows roll under seed 0" in command("bench-attribution", "--clips=20", "--seeds=1").message
    said = command("bench-attribution", "--subsets=2", "--updates=0").message
    assert "updates is 0 and subsets is 2" in said
    assert "no method 'motoin'" in command("bench-attribution", "--only=[motoin]").message
    assert not list(tmp_path.iterdir())
