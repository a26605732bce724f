"""The demo and the scoreboard: the same verbs on an untrained model, and what they say of known tables."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from muybridge.cli.bench.comparison import FIGURES
from muybridge.cli.bench.methods import METHODS, Method, Setting, pick
from muybridge.cli.bench.scoreboard import Scoreboard, shown
from muybridge.data.selection import read_selection
from muybridge.errors import UsageError
from muybridge.proving_ground import draw_scene, look_of, motion_of, render
from muybridge.proving_ground.files import write_clips
from muybridge.proving_ground.pipeline import untrained
from muybridge.proving_ground.score_files import read_scores, write_scores
from muybridge.proving_ground.scoring import Scores, read_clips
from muybridge.proving_ground.small import SMALL, as_options
from muybridge.video import read_frames

from .conftest import ROOT, Command

CLIPS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pipeline that ships, before its training."""
    folder = tmp_path_factory.mktemp("model")
    untrained().save_pretrained(str(folder), safe_serialization=True)
    return str(folder)


def test_the_demo_runs_from_nothing_and_not_twice(command: Command, tmp_path: Path, model: str):
    options = ["demo", "--out=demo", "--updates=1", f"--clips={CLIPS}", f"--model={model}"]
    first = command(*options)
    assert first.code == 0, first.err
    assert [p.name for p in tmp_path.iterdir()] == ["demo"], "nothing outside of its folder"
    report = tmp_path / "demo/report.html"
    assert first.out.rstrip().endswith(f"report: {report}")
    page = report.read_text(encoding="utf-8")
    prompts = [json.loads(line) for line in (tmp_path / "demo/clips/validation_prompts.jsonl").read_text().splitlines()]
    motions = len({motion_of(line["prompt"]) for line in prompts})
    # A clip of every method; reference, before and after of two prompts; a query and four clips.
    assert page.count("<video ") == 6 * motions + 3 * 2 + 5 * motions > 36
    assert "DMD + MSM (λ = 1, shared), 4 steps" in page
    # Every part is a command that can be run alone, and is said on the page too.
    said = [line.strip() for line in first.out.splitlines() if line.startswith("  muybridge ")]
    assert [shlex.split(line)[1] for line in said].count("judge") == 6 + 2 + 1
    assert [shlex.split(line)[1] for line in said].count("fit") == 2 + 1
    assert all(shlex.quote(line.split()[-1]).strip("'") in page for line in said)

    scores = {m: read_scores(tmp_path / f"demo/{m}/scores.json") for m in ("real", "teacher-50", "dmd")}
    assert {len(s.rows) for s in scores.values()} == {CLIPS // 5}
    assert scores["real"].summary["motion"].value == 1.0
    assert scores["teacher-50"].summary["motion"].value < 0.5, "it has learned nothing"

    taught = read_scores(tmp_path / "demo/customization/customized.json")
    assert {row.asked_motion for row in taught.rows} == {"roll"}, "which the world of the model has not"
    (reference,) = {row.reference for row in taught.rows}
    assert reference is not None
    for row in taught.rows:
        assert not {row.asked_shape, row.asked_colour} & set(look_of(reference)), "any look of the reference is a leak"
    assert all(row.leak_shape is not None for row in taught.rows)
    chosen = read_selection(tmp_path / "demo/attribution/selection.parquet")
    assert len(chosen.ids) == round(0.2 * 0.8 * CLIPS)
    finetuned = read_scores(tmp_path / "demo/finetuned-50/scores.json")
    assert len(finetuned.rows) == CLIPS // 5
    trained = yaml.safe_load(
        next((tmp_path / "demo/finetuned-50/run").rglob("config.yaml")).read_text(encoding="utf-8")
    )
    data = trained["data"]["init_args"]
    assert (data["selection"], data["cache"]) == ("demo/attribution/selection.parquet", "demo/attribution/cache")
    assert page.count("finetuned on the selection") == 1

    again = command(*options)
    assert again.code == 0
    assert "24 of 24 parts" in again.out
    assert "[part" not in again.out
    assert report.read_text(encoding="utf-8") == page
    assert command(*options, "--updates=2").code == 2


def test_the_scoreboard_takes_up_where_it_was(command: Command, tmp_path: Path, model: str):
    options = ["bench-motion", "--out=board", f"--model={model}", f"--clips={CLIPS}", "--updates=1"]
    mine = Method("mine", "mine, 1 step", "proving_ground/finetune.yaml", ("--model.sampling.steps=1",))
    more = "--more=" + json.dumps(
        [{"name": mine.name, "title": mine.title, "config": mine.config, "overrides": mine.overrides}]
    )
    assert command(*options, "--seeds=1", '--only=["mine"]', more).code == 0
    result = command(*options, "--seeds=2", '--only=["teacher-4", "mine"]', more)
    assert result.code == 0, result.err
    assert "4 of 12 parts are in board already" in result.out
    data = json.loads((tmp_path / "board/results.json").read_text(encoding="utf-8"))
    said = shlex.split(data["about"]["command"])
    assert command(*said[1:], "--out=board").code == 0, "which is all done"
    assert [entry["name"] for entry in data["methods"]] == ["real", "teacher-4", "mine"]
    for entry in data["methods"]:
        assert set(entry["seeds"]) == {"0", "1"}
        assert set(entry["mean"]) == {*FIGURES, "distance", *(["seconds"] if entry["config"] else [])}
        motion = [seed["motion"]["value"] for seed in entry["seeds"].values()]
        assert entry["mean"]["motion"] == pytest.approx(sum(motion) / 2)
        assert entry["spread"]["amount"] > 0.0, "seeds have other clips and other noise"
    assert data["methods"][0]["mean"]["distance"] < data["methods"][1]["mean"]["distance"]
    table = (tmp_path / "board/results.md").read_text(encoding="utf-8")
    assert "| real clips | 1.000 ± 0.000 |" in table
    assert table.count("| 2 |") == 3


def test_mean_and_spread():
    assert shown([0.5, 0.7, 0.6]) == "0.600 ± 0.100"
    assert shown([0.5]) == "0.500"
    assert shown([]) == "–"


def test_the_board_says_what_is_not_there_yet(tmp_path: Path):
    settings = [Setting(tmp_path / f"seed-{s}", "x", SMALL, CLIPS, 0.2, 1, f"seed-{s}/", s) for s in range(2)]
    markdown, _ = Scoreboard(settings, pick(["real", "dmd"]), "muybridge x").write(tmp_path)
    assert f"| DMD, 4 steps |{' – |' * (len(FIGURES) + 2)} 0 |" in markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["finetuned-4", "msm-own-2"])
def test_a_method_is_its_config_and_what_is_changed(name: str, command: Command, tmp_path: Path):
    (method,) = pick([name])
    setting = Setting(tmp_path / "s", "some/model", SMALL, 50, 0.2, 7, seed=3)
    parts = {part.arguments[0]: part for part in setting.parts(method)}
    assert list(parts) == ["fit", "sample", "judge"]
    printed = command(*parts["fit"].arguments, "--print_config")
    assert printed.code == 0, printed.err
    config = yaml.safe_load(printed.out)
    assert config["seed_everything"] == 3
    arguments = config["model"]["init_args"]
    role = "teacher" if name.startswith("msm") else "backbone"
    assert arguments[role]["init_args"]["path"] == "some/model"
    assert config["trainer"]["max_steps"] == 7
    assert arguments["seed"] == 3
    if name == "msm-own-2":
        losses = [(loss["class_path"].split(".")[-1], loss["init_args"].get("weight")) for loss in arguments["losses"]]
        assert losses == [("DistributionMatching", None), ("MotionScoreMatching", 2.0)]
        assert arguments["losses"][1]["init_args"]["normalizer"] == "own"
    else:
        assert arguments["sampling"]["steps"] == 4


def test_a_student_before_distillation_is_sampled_like_one_after_it(command: Command, tmp_path: Path):
    (before, after) = pick(["undistilled", "dmd"])
    setting = Setting(tmp_path / "s", "some/model", SMALL, 50, 0.2, 7)
    printed = [yaml.safe_load(command(*setting.parts(m)[0].arguments, "--print_config").out) for m in (before, after)]
    sampling, steps = printed[0]["model"]["init_args"]["sampling"], printed[1]["model"]["init_args"]["steps"]
    assert sampling["steps"] == steps
    assert sampling["guidance"] == 1.0


def test_methods_are_picked_by_name():
    assert [m.name for m in pick(["dmd", "real"])] == ["real", "dmd"]
    assert len({m.name for m in METHODS}) == len(METHODS)
    with pytest.raises(UsageError, match="no method 'dme'"):
        pick(["dme"])
    with pytest.raises(UsageError, match="each once"):
        pick(["dmd", "dmd"])


def test_all_configs_speak_of_one_world():
    for name in ("teacher", "finetune", "autoencoder"):
        data = yaml.safe_load((ROOT / f"configs/proving_ground/{name}.yaml").read_text(encoding="utf-8"))["data"][
            "init_args"
        ]
        assert (data["size"], data["frames"], data["anti_leak"]) == (32, 9, False)
        assert (data["scale"], data["pace"]) == (SMALL.scale, SMALL.pace)
        for kind in ("motions", "shapes", "textures", "backgrounds"):
            assert tuple(data[kind]) == getattr(SMALL, kind), (name, kind)
    for name in ("distill", "customize"):
        header = (ROOT / f"configs/proving_ground/{name}.yaml").read_text(encoding="utf-8")
        (line,) = re.findall(r"^#\s+muybridge proving-ground (.*)$", header, re.MULTILINE)
        said = as_options(SMALL if name == "distill" else replace(SMALL, motions=("roll",)))
        assert set(said) <= set(shlex.split(line))


def test_a_folder_of_clips_is_judged_as_its_prompts_say(command: Command, tmp_path: Path):
    write_clips(tmp_path / "w", SMALL, 12, validation=0.5)
    by_table = command("judge", "--videos=w/validation.parquet", "--out=a.json")
    by_prompts = command(
        "judge", "--videos=w", "--prompts=w/validation_prompts.jsonl", "--against=a.json", "--out=b.json"
    )
    assert (by_table.code, by_prompts.code) == (0, 0), by_prompts.err
    a, b = read_scores(tmp_path / "a.json"), read_scores(tmp_path / "b.json")
    assert a.rows == b.rows
    assert [row.caption for row in a.rows] == [
        json.loads(line)["prompt"] for line in (tmp_path / "w/validation_prompts.jsonl").read_text().splitlines()
    ]
    assert re.search(r"distance +0\.000", by_prompts.out), "to themselves"
    (tmp_path / "more.jsonl").write_text('{"id": "clips/999999", "prompt": "a red disk | falls freely"}\n')
    missing = command("judge", "--videos=w", "--prompts=more.jsonl")
    assert missing.code == 2
    assert "1 of 1 clips of more.jsonl are not in w, such as 999999.mp4" in missing.message
    (tmp_path / "broken.json").write_text("{}")
    assert command("judge", "--videos=w/validation.parquet", "--against=broken.json").code == 2


def test_a_table_comes_back_from_its_file(tmp_path: Path):
    rows = write_clips(tmp_path / "w", SMALL, 4, validation=0.5)
    clips = [read_frames(tmp_path / f"w/clips/{s.name}.mp4", range(s.frames)) for s in rows]
    scores = read_clips(clips, [s.caption for s in rows], ["a red disk | falls freely"] * 4)
    back: Scores = read_scores(write_scores(tmp_path / "s.json", scores))
    assert back.rows == scores.rows
    assert back.summary == scores.summary
    assert back.distance(scores) == pytest.approx(0.0, abs=1e-3)


def test_what_motion_score_matching_changes_is_told_clip_by_clip(tmp_path: Path):
    settings = [Setting(tmp_path / f"seed-{s}", "x", SMALL, CLIPS, 0.2, 1, f"seed-{s}/", s) for s in range(2)]
    methods = pick(["real", "dmd", "msm-own-1", "msm-own-2"])
    for setting in settings:
        scenes = [draw_scene(SMALL, setting.seed, i, True) for i in range(6)]
        captions = [scene.caption for scene in scenes]
        clips = [render(scene) for scene in scenes]
        frozen = [np.repeat(clip[:1], len(clip), 0) for clip in clips]
        for method, shown_clips in (("real", clips), ("dmd", frozen), ("msm-own-1", frozen[:3] + clips[3:])):
            write_scores(setting.root / method / "scores.json", read_clips(shown_clips, captions))
    board = Scoreboard(settings, methods, "muybridge x")
    (change,) = board.changes()
    assert (change["name"], change["motion"]["value"], change["motion"]["clips"]) == ("msm-own-1", 0.5, 12)
    assert 0.0 < change["motion"]["low"] < 0.5 < change["motion"]["high"] < 1.0
    assert change["amount"]["value"] > 0.0, "what is frozen does not move"
    markdown, _ = board.write(tmp_path)
    assert "| DMD + MSM (λ = 1, own), 4 steps | +0.500 [" in markdown.read_text(encoding="utf-8")
    write_scores(settings[0].root / "dmd" / "scores.json", read_clips(frozen[::-1], captions[::-1]))
    with pytest.raises(ValueError, match="different captions"):
        Scoreboard(settings, methods, "muybridge x").changes()
