"""Motions taught from single clips: the same verbs on an untrained model, and what the tables say of known scores."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from muybridge.cli.bench.lessons import PROBED, TOLD, WORD, Lesson, Probing, claims, lessons, methods, other_subjects
from muybridge.cli.bench.lessons_board import FIGURES, LessonsBoard
from muybridge.cli.bench.methods import pick
from muybridge.proving_ground import MOTIONS, look_of, motion_of, split_caption
from muybridge.proving_ground.pipeline import untrained, vocabulary
from muybridge.proving_ground.scene import draw_scene
from muybridge.proving_ground.score_files import write_scores
from muybridge.proving_ground.scoring import Row, Scores
from muybridge.proving_ground.small import SMALL

from .conftest import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pipeline that ships, before its training."""
    folder = tmp_path_factory.mktemp("model")
    untrained().save_pretrained(str(folder), safe_serialization=True)
    return str(folder)


def test_a_motion_is_taught_judged_and_not_twice(command: Command, tmp_path: Path, model: str) -> None:
    options = ["bench-customize", "--out=b", f"--model={model}", "--seeds=1", "--references=1", "--updates=1"]
    options += ["--prompts=2", "--motions=[roll]", "--probed=0", "--taus=[700]"]
    assert command(*options, "--only=[base]").code == 0
    result = command(*options, "--only=[base,vo-700]")
    assert result.code == 0, result.err
    assert "3 of 6 parts are in b already" in result.out
    data = json.loads((tmp_path / "b/results.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in data["methods"]] == ["base", "vo-700"]
    for entry in data["methods"]:
        assert list(entry["seeds"]) == ["0"]
        assert set(entry["mean"]) == set(FIGURES) - {"known"}, "nobody knows how to roll"
    text = (tmp_path / "b/results.md").read_text(encoding="utf-8")
    assert text.count("| 1 |") == 2
    assert (tmp_path / "b/results.png").stat().st_size > 10_000
    # Asked for by the word that was taught, and judged by what it means.
    here = tmp_path / "b/seed-0/roll-0"
    given, truth = (_prompts(here / name) for name in ("prompts.jsonl", "truth.jsonl"))
    assert [split_caption(p)[1] for p in given] == [WORD, WORD]
    assert [motion_of(p) for p in truth] == ["roll", "roll"]
    assert [split_caption(p)[0] for p in given] == [split_caption(p)[0] for p in truth]
    again = command(*shlex.split(data["about"]["command"])[1:], "--out=b")
    assert again.code == 0, again.err
    assert "[part" not in again.out
    assert (tmp_path / "b/results.md").read_text(encoding="utf-8") == text
    assert command(*options, "--updates=2").code == 2


def _prompts(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_word_is_new_and_the_subjects_are_others() -> None:
    assert WORD not in vocabulary()
    for motion in MOTIONS:
        caption = draw_scene(replace(SMALL, motions=(motion,)), 0, 0).caption
        looks = [look_of(f"{subject} | rolls") for subject in other_subjects(SMALL, caption, 12)]
        assert len(set(looks)) == 12
        assert not {word for look in looks for word in look} & set(look_of(caption))


@pytest.mark.parametrize("name", ["plain", "vo", "vo-600", PROBED, "qk", "matching"])
def test_methods_are_what_their_titles_say(name: str, command: Command, tmp_path: Path) -> None:
    (method,) = pick([name], methods([600.0], tmp_path / "probe"))
    fit = _lesson(tmp_path).parts(method)[0]
    printed = command(*fit.arguments, "--print_config")
    assert printed.code == 0, printed.err
    config = yaml.safe_load(printed.out)
    arguments = config["model"]["init_args"]
    adapter, tau = arguments["adapter"], arguments["tau"]
    assert adapter["projections"] == {"qk": ["q", "k"], "matching": ["q", "k", "v", "o"]}.get(name, ["v", "o"])
    assert (adapter["targets"] is not None) is (name == "plain")
    assert tau["value"] == {"vo-600": 600.0, "matching": 500.0, PROBED: None}.get(name, 0.0)
    assert (tau["from_probe"] is not None) is (name == PROBED)
    losses = [loss["class_path"].split(".")[-1] for loss in arguments["losses"]]
    assert losses == ["MotionFeatureMatching" if name == "matching" else "Denoising"]
    # Under the usual epsilon the small gradients of maps would move nothing.
    assert (arguments["optimizer"]["init_args"]["eps"] < 1e-12) is (name == "matching")
    assert arguments["optimizer"]["init_args"]["lr"] == 1e-2
    assert config["data"]["init_args"]["caption"].endswith(f" | {WORD}")
    assert arguments["keep_bar"]


def _lesson(root: Path, motion: str = "roll", seed: int = 0) -> Lesson:
    return lessons(root, "some/model", SMALL, seed, [motion], 1, 2, 5)[0]


def test_clips_are_the_same_under_every_seed_and_others_for_every_reference(tmp_path: Path) -> None:
    one, two = (lessons(tmp_path, "x", SMALL, seed, MOTIONS, 3, 2, 5) for seed in range(2))
    assert [a.caption for a in one] == [b.caption for b in two]
    assert [a.draw().arguments[3] for a in one[:3]] == ["--seed=0", "--seed=1", "--seed=2"]
    assert len({part.name for lesson in (*one, *two) for part in (lesson.draw(),)}) == 60
    assert one[0].asked(methods()[1]) == one[0].truth != one[0].asked(methods()[0])
    assert methods()[1].name == TOLD


def test_the_probe_is_one_of_the_models_own_world(command: Command, tmp_path: Path, model: str) -> None:
    probing = Probing(tmp_path / "b", model, SMALL, clips=2, steps=2)
    for part in probing.parts():
        result = command(*part.arguments)
        assert result.code == 0, result.err
    found = probing.found()
    assert found["clips"] == 2
    assert found["tau"] is not None or found["reason"]


# -- tables ------------------------------------------------------------------------------------------------------------


def _scores(lesson: Lesson, motion: bool, leak: bool) -> Scores:
    rows = []
    for caption in lesson.wanted:
        shape, colour = look_of(caption)
        row = Row(
            caption,
            lesson.motion,
            shape,
            colour,
            lesson.motion if motion else "other",
            "disk",
            colour,
            None,
            1.0,
            0,
            0,
            0,
        )
        rows.append(replace(row, reference=lesson.caption, excess_shape=float(leak), excess_colour=0.0))
    return Scores(tuple(rows), np.zeros((len(rows), 4), np.float32))


def test_the_table_is_the_mean_over_lessons_and_says_nothing_of_half_a_seed(tmp_path: Path) -> None:
    chosen = pick(["vo", "vo-600"], methods([600.0]))
    by_seed = [lessons(tmp_path, "x", SMALL, seed, ["roll", "spin"], 1, 2, 5) for seed in range(2)]
    vo, above = chosen
    # Value and output: rolls under both seeds, spins under the second alone, and leaks the shape. Above τ: all, without a leak.
    for seed, some in enumerate(by_seed):
        for lesson in some:
            right = lesson.motion == "roll" or seed == 1
            write_scores(lesson.scores(vo), _scores(lesson, right, True))
            if (seed, lesson.motion) != (1, "spin"):
                write_scores(lesson.scores(above), _scores(lesson, True, False))
    board = LessonsBoard(by_seed, chosen, "muybridge x", {"tau": None, "reason": "why", "clips": 3})
    markdown, data = board.write(tmp_path)
    plain, bounded = json.loads(data.read_text(encoding="utf-8"))["methods"]
    assert plain["mean"]["motion"] == pytest.approx(0.75)
    assert plain["spread"]["motion"] == pytest.approx(0.5 / 2**0.5)
    assert (plain["mean"]["known"], plain["mean"]["new"]) == (0.5, 1.0)
    assert (plain["mean"]["leak_shape"], plain["mean"]["leak"]) == (1.0, 0.5)
    assert plain["by_motion"] == {"roll": 1.0, "spin": 0.5}
    assert list(bounded["seeds"]) == ["0"]
    (first,) = json.loads(data.read_text(encoding="utf-8"))["claims"]
    # Lessons that both have done: of seed 0.
    assert first["motion"]["value"] == pytest.approx(0.5)
    assert first["leak"]["value"] == pytest.approx(-0.5)
    assert first["motion"]["clips"] == 2
    text = markdown.read_text(encoding="utf-8")
    assert "The probe of 3 clips finds no boundary: why." in text
    assert "| value and output, all times | 0.750 ± 0.354 |" in text
    # Another seed teaches from the same clips: there are no more of them to be sure of.
    for lesson in by_seed[1]:
        write_scores(lesson.scores(above), _scores(lesson, True, False))
    again = LessonsBoard(by_seed, chosen, "muybridge x").difference(above, vo, "motion")
    assert again is not None
    assert (again.value, again.clips) == (pytest.approx(0.25), 2)


def test_claims_are_of_what_is_compared() -> None:
    chosen = pick(["vo", "vo-600", "qk", "plain"], methods([600.0]))
    assert [(one.name, other.name) for _, one, other in claims(chosen)] == [
        ("vo-600", "vo"),
        ("vo-600", "plain"),
        ("vo", "qk"),
    ]
    # Feature matching acts above a time: a method without that boundary shows what both do.
    chosen = pick(["vo", "vo-500", "matching"], methods([500.0]))
    assert [(one.name, other.name) for _, one, other in claims(chosen) if one.name == "matching"] == [
        ("matching", "vo"),
        ("matching", "vo-500"),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--motions=[fly]"], "motions are ['fly']"),
        (["--prompts=0"], "0 prompts"),
        (["--taus=[1000]"], "times above 0 and below 999"),
        (["--only=[vo-300]"], "no method 'vo-300'"),
        (['--more=[{"name": "vo", "title": "x"}]'], "called like another"),
        (["--model=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    options: list[str], said: str, command: Command, tmp_path: Path
) -> None:
    result = command("bench-customize", *options)
    assert result.code == 2
    assert said in result.message
    assert not list(tmp_path.iterdir())
