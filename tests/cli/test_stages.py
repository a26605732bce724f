"""The stages of distillation in a row, each from the last one's result, through the command as their configs say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muybridge.backbones import Causal, load
from muybridge.data.trajectories import Trajectories

from .conftest import Command, header_commands, kill_once_saved

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
OFTEN = """
trainer:
  callbacks:
    - class_path: EMA
      init_args: {decay: 0.9}
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_last: true}
"""


def newest(root: Path) -> Path:
    return max(root.rglob("last.ckpt"), key=lambda p: p.stat().st_mtime_ns)


def weights(root: Path, prefix: str = "") -> dict[str, Tensor]:
    """Of a run's newest checkpoint, or its averages by the names of the weights."""
    state = torch.load(newest(root), weights_only=True)["state_dict"]
    return {n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix)}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def killed_and_whole(command: Command, folder: Path, name: str, *config: str) -> list[str]:
    """A run that was killed and gone on with, and one that was not, are one; its options."""
    (folder / "often.yaml").write_text(OFTEN)
    run = [*config, "-c=often.yaml", *QUIET]
    fit = ["fit", *run, f"--trainer.default_root_dir={name}"]
    kill_once_saved(folder / name, *fit, "--trainer.max_steps=1000", cwd=folder)
    saved = torch.load(newest(folder / name), weights_only=True)["global_step"]
    fit = ["fit", *run, f"--trainer.max_steps={saved + 2}"]
    for root, more in ((name, ["--ckpt_path=last"]), (f"{name}-whole", [])):
        result = command(*fit, f"--trainer.default_root_dir={root}", *more)
        assert result.code == 0, result.err
    found, wanted = weights(folder / name), weights(folder / f"{name}-whole")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), (name, key)
    return [*run, f"--trainer.default_root_dir={name}", "--ckpt_path=last"]


def test_the_proving_grounds_distillation_killed_and_gone_on_with(command: Command, tmp_path: Path) -> None:
    """Its file as it ships, on the model that ships, with motion score matching; a student's update on either side."""
    (tmp_path / "prompts.jsonl").write_text('{"id": "0", "prompt": "a red disk | falls freely"}\n')
    run = ["-c=proving_ground/distill.yaml", "--model.losses+=MotionScoreMatching", "--model.losses.weight=1.0"]
    run += ["--data.prompts=prompts.jsonl", "--data.batch_size=1", "--trainer.accelerator=cpu"]
    run += ["--model.student_learning_rate.warmup=0", "--model.critic_learning_rate.warmup=0"]
    killed_and_whole(command, tmp_path, "one", *run)
    state = torch.load(newest(tmp_path / "one"), weights_only=True)
    assert state["global_step"] >= 3
    trained = weights(tmp_path / "one", "own_student.")
    begun = load("proving-ground").state_dict()
    assert furthest({n: begun[n.replace("__", ".")] for n in trained}, trained) > 0.0, "the student was trained"


def test_three_stages_in_a_row_each_killed_and_gone_on_with(
    command: Command, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The teacher's paths, a causal student on them, the same student by matching scores, its videos and its pipeline."""
    wan = str(tiny_checkpoint("wan"))
    (tmp_path / "prompts.txt").write_text("a dog runs\na cat sleeps\n")
    stage2 = ["-c=tiny/trajectory.yaml", f"--model.student.path={wan}", "--model.student.max_text_length=16"]
    layers = ["-c=tiny/distill-stage1.yaml", "-c=tiny/distill-stage3.yaml"]
    stage3 = [*layers, f"--model.teacher.path={wan}", "--model.teacher.max_text_length=16"]
    stage3 += ["--model.student.path=causal", "--model.student.max_text_length=16"]

    def named(path: str) -> dict[str, Tensor]:
        student = load(path, max_text_length=16, causal=Causal(block=1))
        return {name.replace(".", "__"): weight for name, weight in student.named_parameters()}

    result = command("trajectories", *stage2, *QUIET, "--prompts=prompts.txt", "--out=paths", "--batch_size=2")
    assert result.code == 0, result.err

    two = killed_and_whole(command, tmp_path, "two", *stage2, "--data.path=paths")
    with pytest.warns(UserWarning, match="causal holds a causal student"):
        assert command("export", *two, "--out=causal").code == 0
    second = named("causal")
    averages = weights(tmp_path / "two", "average.backbone__")
    assert averages.keys() == second.keys()
    assert all(torch.equal(averages[name], weight) for name, weight in second.items())
    assert load("causal").steps_of(3) == [1000.0, 750.0, 500.0], "the steps are in the directory"

    three = killed_and_whole(command, tmp_path, "three", *stage3)
    trained = {n.replace(".", "__"): w for n, w in weights(tmp_path / "three", "own_student.").items()}
    assert 0.0 < furthest(trained, second) < 0.5 * furthest(trained, named(wan)), (
        "it began where the second stage ended"
    )
    assert command("sample", *three, "--prompts=prompts.txt", "--out=videos").code == 0
    assert {p.name for p in Path("videos").iterdir()} >= {"0000-a-dog-runs.mp4", "0001-a-cat-sleeps.mp4", "sheet.png"}
    assert command("export", *three, "--out=student").code == 0
    last, averages = named("student"), weights(tmp_path / "three", "average.own_student__")
    assert averages.keys() == last.keys()
    assert all(torch.equal(averages[name], weight) for name, weight in last.items())


def test_the_proving_grounds_stages_run_as_their_files_say(command: Command, tmp_path: Path) -> None:
    """Every command in the three headers, in their order, on the model that ships; fewer clips and updates."""
    names = [f"proving_ground/{name}.yaml" for name in ("distill", "stage2", "stage3")]
    commands = [arguments for name in names for arguments in header_commands(name)]
    assert [arguments[0] for arguments in commands].count("fit") == 4
    (tmp_path / "prompts.txt").write_text("a red disk | falls freely\n")
    few = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--data.batch_size=1", *QUIET]
    for arguments in commands:
        less = {"proving-ground": ["--clips=2"], "fit": few}.get(arguments[0], [])
        result = command(*arguments, *less)
        assert result.code == 0, (arguments, result.err)
    made = Path("runs/proving-ground")
    assert Trajectories(made / "paths").ids
