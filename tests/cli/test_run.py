"""The verbs on the shipped tiny configs, from files to files."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.preemption import Preemption
from muybridge.backbones import load
from muybridge.backbones.base import Backbone
from muybridge.cli.checkpoints import resolve
from muybridge.errors import UsageError

from .conftest import ROOT, Command

Options = Callable[[str], list[str]]
SHORT = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]


def weights(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "latte", "unet3d", "hunyuan", "ltx", "mochi", "animatediff"])
def test_a_tiny_config_goes_from_clips_to_a_pipeline(
    name: str,
    command: Command,
    tiny_options: Options,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    recwarn: pytest.WarningsRecorder,
):
    options = [*tiny_options(name), *SHORT]
    assert command("fit", *options).code == 0
    (last,) = (tmp_path / "run").rglob("last.ckpt")
    (config,) = (tmp_path / "run").rglob("config.yaml")

    validated = command("validate", "-c", str(config), "--ckpt_path=best")
    assert validated.code == 0
    assert "val/loss" in validated.out
    assert f"ckpt_path best: {last.parent}" in validated.out

    predicted = command("predict", "-c", str(config), "--ckpt_path=last", "--trainer.limit_predict_batches=1")
    assert predicted.code == 0
    assert f"ckpt_path last: {last}" in predicted.out
    assert len(list((tmp_path / "run").rglob("predictions/*.mp4"))) == 2, "a batch of two prompts"

    exported = command("export", "-c", str(config), "--ckpt_path=last", "--out=exported")
    assert exported.code == 0
    assert exported.out.strip().endswith("exported")
    # Exported is trained, and is not what training began with.
    trained = {n.removeprefix("backbone."): w for n, w in weights(last).items()}
    assert same(trained, dict(load("exported").named_parameters()))
    assert not same(trained, dict(load(str(tiny_checkpoint(name))).named_parameters()))
    assert not [w for w in recwarn if "dirpath" in str(w.message)], "these verbs write no checkpoints"

    resumed = command("fit", *options, "--trainer.max_steps=5", "--ckpt_path=last")
    assert resumed.code == 0
    newest = max((tmp_path / "run").rglob("last.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["global_step"] == 5
    assert len(list((tmp_path / "run").rglob("last.ckpt"))) == 2


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(command: Command, tiny_options: Options, tmp_path: Path):
    options = [*tiny_options("wan"), *SHORT]

    def run(folder: str, *more: str) -> Path:
        assert command("fit", *options, f"--trainer.default_root_dir={tmp_path / folder}", *more).code == 0
        return max((tmp_path / folder).rglob("last.ckpt"), key=lambda p: p.stat().st_mtime_ns)

    whole = run("whole")
    first = run("parts", "--trainer.max_steps=2")
    assert not same(weights(whole), weights(first))
    second = run("parts", "--ckpt_path=last")
    assert second != first
    assert same(weights(whole), weights(second))


def test_the_config_of_a_run_means_that_run(command: Command, tiny_options: Options, tmp_path: Path):
    options = [*tiny_options("wan"), *SHORT, "--trainer.max_steps=2"]
    for _ in range(2):
        assert command("fit", *options).code == 0
    first, second = ((tmp_path / "run/lightning_logs" / f"version_{n}") for n in range(2))
    assert f"ckpt_path last: {second}" in command("validate", *options, "--ckpt_path=last").out
    for which in ("last", "best"):
        result = command("validate", "-c", str(first / "config.yaml"), f"--ckpt_path={which}")
        assert result.code == 0
        assert f"ckpt_path {which}: {first}" in result.out
    # What a cluster made this run leave is newer, and lies beside the runs.
    left = tmp_path / "run" / "preempted-00000002.ckpt"
    left.write_bytes((first / "checkpoints/last.ckpt").read_bytes())
    trainer = pl.Trainer(default_root_dir=tmp_path / "run", accelerator="cpu", logger=False)
    assert resolve("last", trainer, resuming=True, run=first) == str(left)
    assert resolve("last", trainer, run=first) == str(first / "checkpoints/last.ckpt")


@pytest.mark.parametrize("told", [False, True])
def test_last_is_looked_for_where_preemption_leaves_it(told: bool, tmp_path: Path):
    """In a folder of its own, beside a ModelCheckpoint that was told where to write and one that was not."""
    root, kept, left = tmp_path / "run", tmp_path / "kept", tmp_path / "left"
    saver = ModelCheckpoint(str(kept) if told else None)
    callbacks = [saver, Preemption(dirpath=str(left))]
    trainer = pl.Trainer(default_root_dir=root, accelerator="cpu", logger=False, callbacks=callbacks)
    with pytest.raises(UsageError, match=f"no checkpoint in .*{left}"):
        resolve("last", trainer)
    older = (kept if told else root / "version_0/checkpoints") / "last.ckpt"
    for age, file in enumerate((older, left / "preempted-00000004.ckpt", left / "of-another.ckpt")):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, file)
        os.utime(file, (age, age))
    assert resolve("last", trainer, resuming=True) == str(left / "preempted-00000004.ckpt")
    assert resolve("last", trainer, resuming=True, run=root / "version_0") == str(left / "preempted-00000004.ckpt")
    os.utime(older, (9, 9))
    assert resolve("last", trainer) == str(older)


def test_last_in_fit_means_the_beginning_where_there_is_none(command: Command, tiny_options: Options):
    result = command("fit", *tiny_options("wan"), *SHORT, "--trainer.max_steps=1", "--ckpt_path=last")
    assert result.code == 0
    assert "starting from the beginning" in result.out


@pytest.mark.parametrize("verb", ["validate", "predict", "export"])
@pytest.mark.parametrize("which", ["last", "best"])
def test_last_and_best_are_errors_where_there_is_none(
    verb: str, which: str, command: Command, tiny_options: Options, loads: list[Backbone]
):
    out = ["--out=x"] if verb == "export" else []
    result = command(verb, *tiny_options("wan"), f"--ckpt_path={which}", *out)
    assert result.code == 2
    assert f"ckpt_path {which}: no checkpoint in" in result.message
    assert not loads


def test_best_is_the_one_the_newest_remembers(tmp_path: Path):
    """Also after the folder was moved; an unmonitored callback has a best_model_path too, which is not one."""
    folder = tmp_path / "version_0/checkpoints"
    folder.mkdir(parents=True)
    state = {"monitor": "val/loss", "best_model_path": "/moved/from/here/good.ckpt"}
    states = {
        "ModelCheckpoint{'monitor': None}": {"monitor": None, "best_model_path": str(folder / "old.ckpt")},
        "x": state,
    }
    for age, name in enumerate(("old", "good", "last")):
        torch.save({"callbacks": states}, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (age, age))
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    assert resolve("best", trainer) == str(folder / "good.ckpt")
    assert resolve("last", trainer) == str(folder / "last.ckpt")
    (folder / "good.ckpt").unlink()
    with pytest.raises(ValueError, match="is gone"):
        resolve("best", trainer)
    assert resolve(None, trainer) is None


SAVER = "ModelCheckpoint{{'monitor': 'val/loss', 'mode': '{}', 'every_n_train_steps': 0}}"


@pytest.mark.parametrize(("mode", "which"), [("min", 1), ("max", 0)])
def test_best_is_the_best_of_all_attempts(mode: str, which: int, tmp_path: Path):
    """Every attempt has a folder of its own and knows its own best; another value is another matter."""
    scores: list[Optional[float]] = [0.5, 0.1, 0.3, None]
    kept = [tmp_path / f"version_{n}/checkpoints/good.ckpt" for n in range(4)]
    files = []
    for number, score in enumerate(scores):
        # The last one has no better one yet: it knows the path of the attempt before it, and no score.
        state = {"monitor": "val/loss", "best_model_path": str(kept[min(number, 2)])}
        state["best_model_score"] = None if score is None else torch.tensor(score)  # type: ignore[assignment]
        other = {
            "monitor": "other",
            "best_model_path": str(kept[2]),
            "best_model_score": torch.tensor(-9.0 + 99 * which),
        }
        kept[number].parent.mkdir(parents=True)
        for name in ("good", "last") if score is not None else ("last",):
            files.append(kept[number].with_stem(name))
            torch.save({"callbacks": {SAVER.format(mode): state, "another": other}}, files[-1])
            os.utime(files[-1], (len(files), len(files)))
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    assert resolve("best", trainer) == str(kept[which])
    for number in range(3):
        assert resolve("best", trainer, run=kept[number].parents[1]) == str(kept[number])
    # A run that began anew in the same folder, and has measured nothing yet.
    torch.save({"callbacks": {SAVER.format(mode): {"monitor": "val/loss", "best_model_path": ""}}}, tmp_path / "n.ckpt")
    assert resolve("best", trainer) == str(kept[which])
    (tmp_path / "n.ckpt").unlink()
    # Another run in the same folder is no attempt at this one, and one that was told to go on for longer is.
    for number, rate in enumerate((1, 1, 1, 2)):
        text = f"# muybridge 0\ntrainer: {{max_steps: {number}}}\nmodel: {{rate: {rate}}}\n"
        (tmp_path / f"version_{number}/config.yaml").write_text(text)
        last = kept[number].with_stem("last")
        os.utime(last, (50 + number, 50 + number))
    assert resolve("best", trainer) == str(kept[2]), "the one whose path it knows"
    os.utime(kept[2].with_stem("last"), (60, 60))
    assert resolve("best", trainer) == str(kept[which])
    tmp_path.joinpath("version_1").rename(tmp_path / "version_7")
    if which == 1:
        assert resolve("best", trainer) == str(tmp_path / "version_7/checkpoints/good.ckpt")
    kept[0].unlink()
    if which == 0:
        with pytest.raises(UsageError, match="is gone"):
            resolve("best", trainer)


def test_a_checkpoint_does_not_change_the_configuration(command: Command, tiny_options: Options, tmp_path: Path):
    """Lightning lets hyperparameters stored in a checkpoint win over the config and the command line."""
    (tmp_path / "my_module.py").write_text(
        "import lightning.pytorch as pl, torch\n"
        "class Remembers(pl.LightningModule):\n"
        "    def __init__(self, rate: float = 1.0):\n"
        "        super().__init__(); self.save_hyperparameters(); self.w = torch.nn.Parameter(torch.ones(1)); self.rate = rate\n"
        "    def training_step(self, batch, index): return self.w.sum() * self.rate\n"
        "    def validation_step(self, batch, index): self.log('rate', self.rate, batch_size=1)\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)\n"
    )
    (tmp_path / "job.yaml").write_text("model: {class_path: my_module.Remembers}\n")
    common = [o for o in tiny_options("wan") if not o.startswith(("--model", "-c"))]
    data = ["-c", "job.yaml", "--data=VideoData", *common, "--data.frames=9", "--data.height=64", "--data.width=64"]
    data += [
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=1",
    ]
    assert command("fit", *data, "--model.rate=2").code == 0
    result = command("validate", *data, "--model.rate=3", "--ckpt_path=last")
    assert result.code == 0
    assert "3.0" in result.out
    assert "2.0" not in result.out


def test_export_needs_no_clips_and_writes_averages(command: Command, tiny_options: Options, tmp_path: Path):
    options = [*tiny_options("wan"), *SHORT, "--trainer.callbacks+=EMA", "--trainer.callbacks.init_args.decay=0.9"]
    assert command("fit", *options).code == 0
    elsewhere = ["--data.videos=nowhere", "--data.validation=nowhere", "--ckpt_path=last"]
    assert command("export", *options, *elsewhere, "--out=averaged").code == 0
    (last,) = (tmp_path / "run").rglob("last.ckpt")
    state = weights(last)
    trained = {n.removeprefix("backbone."): w for n, w in state.items() if n.startswith("backbone.")}
    averages = {n: state[f"average.backbone__{n.replace('.', '__')}"] for n in trained}
    assert not same(trained, averages)
    assert same(averages, dict(load("averaged").named_parameters()))


def test_an_adapter_is_exported_as_its_own_files(command: Command, tiny_options: Options, tmp_path: Path):
    options = [*tiny_options("wan"), *SHORT, "--trainer.max_steps=1", "--model.adapter.rank=2"]
    assert command("fit", *options).code == 0
    result = command("export", *options, "--ckpt_path=last", "--out=adapter")
    assert result.code == 0
    assert "adapter.safetensors" in {p.name for p in (tmp_path / "adapter").iterdir()}
    assert all(Path(line).exists() for line in result.out.splitlines() if line.startswith("adapter"))
    wrong = command("export", *options, "--model.adapter=null", "--ckpt_path=last", "--out=full")
    assert wrong.code == 2
    assert "do not fit" in wrong.message


def test_an_export_refuses_to_overwrite(command: Command, tiny_options: Options, tmp_path: Path, loads: list[Backbone]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save({}, tmp_path / "run/checkpoints/a.ckpt")
    result = command("export", *tiny_options("wan"), "--ckpt_path=last", "--out=full")
    assert result.code == 2
    assert "full exists and is not empty" in result.message
    assert not loads


def test_a_sharded_folder_meets_a_strategy_that_reads_files(command: Command, tiny_options: Options, tmp_path: Path):
    (tmp_path / "sharded.ckpt").mkdir()
    torch.save({}, tmp_path / "sharded.ckpt/meta.pt")
    result = command("validate", *tiny_options("wan"), "--ckpt_path=sharded.ckpt")
    assert result.code == 2
    assert "muybridge consolidate sharded.ckpt --out" in result.message


def test_the_saved_config_holds_no_option_of_the_verb(command: Command, tiny_options: Options, tmp_path: Path):
    assert (
        command(
            "fit", *tiny_options("wan"), "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--ckpt_path=last"
        ).code
        == 0
    )
    (config,) = (tmp_path / "run").rglob("config.yaml")
    assert set(yaml.safe_load(config.read_text())) == {"seed_everything", "trainer", "model", "data"}


def start(options: list[str], cwd: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "muybridge", "fit", *options]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of its own group, as a shell starts it, so that Ctrl-C reaches its workers and not the tests.
        process_group=0,
    )


def test_ctrl_c_saves_says_how_to_go_on_and_a_run_says_where_its_files_are(
    command: Command, tiny_options: Options, tmp_path: Path
):
    """In the middle of training, with a data worker that hears it too, as in a terminal."""
    options = [*tiny_options("wan"), "--data.num_workers=1", "--trainer.val_check_interval=1"]
    process = start([*options, "--trainer.max_steps=1000000"], tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").rglob("last.ckpt")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err + out
    folder = tmp_path / "run/lightning_logs/version_0"
    assert f"run folder: {folder}" in err
    [path] = (folder / "checkpoints").glob("interrupted-*.ckpt")
    assert f"stopped by Ctrl-C: saved {path}" in err
    how = err[err.index("to go on: ") :].splitlines()[0].removeprefix("to go on: ")
    assert how.startswith("muybridge fit ")
    assert how.endswith(f" --ckpt_path {path}")
    steps = int(path.stem.removeprefix("interrupted-"))
    again = command(*shlex.split(how)[1:], f"--trainer.max_steps={steps + 1}")
    assert again.code == 0, again.err
    last = tmp_path / "run/lightning_logs/version_1/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == steps + 1


def test_a_sharded_checkpoint_becomes_a_file_and_an_export(command: Command, tiny_options: Options, tmp_path: Path):
    """Two real processes train; one reads what they left."""
    options = [*tiny_options("wan"), *SHORT, "--trainer.max_steps=2"]
    process = start([*options, "--trainer.devices=2", "--trainer.strategy=FullyShard"], tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "run").rglob("last.ckpt")
    assert folder.is_dir()

    assert command("consolidate", str(folder), "--out", "one.ckpt").code == 0
    assert command("export", *options, "--ckpt_path=last", "--out=from_folder").code == 0
    assert command("export", *options, "--ckpt_path=one.ckpt", "--out=from_file").code == 0
    trained = {n.removeprefix("backbone."): w for n, w in weights(tmp_path / "one.ckpt").items()}
    assert same(trained, dict(load("from_folder").named_parameters()))
    assert same(trained, dict(load("from_file").named_parameters()))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "nothing left behind"

    again = command("consolidate", str(folder), "--out", "one.ckpt")
    assert again.code == 2
    assert "one.ckpt exists" in again.message
    assert "muybridge consolidate" in command("validate", *options, "--ckpt_path=last").message
    assert command("validate", *options, "--ckpt_path=one.ckpt").code == 0
    assert "no sharded checkpoint" in command("consolidate", str(tmp_path), "--out", "two.ckpt").message


def test_an_error_on_several_ranks_is_said_once(tiny_options: Options, tmp_path: Path):
    """It is raised in the middle of the run, by every rank: clips that are too short are found when they are read."""
    options = [
        *tiny_options("wan"),
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.frames=17",
        "--data.num_workers=0",
    ]
    process = start(options, tmp_path)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err + out, err
    # Whichever rank is first may end the other before it has spoken.
    plain = [line for line in err.splitlines() if line.startswith("error: ")]
    marked = [line for line in err.splitlines() if line.startswith("[rank 1] error: ")]
    assert (len(plain), len(marked)) in ((1, 0), (0, 1), (1, 1)), err
    assert all("too short" in line for line in plain + marked)
    assert process.returncode != 0


def test_a_damaged_checkpoint_is_an_error_in_words(command: Command, tiny_options: Options, tmp_path: Path):
    options = [*tiny_options("wan"), *SHORT]
    assert command("fit", *options, "--trainer.max_steps=2").code == 0
    (last,) = (tmp_path / "run").rglob("last.ckpt")
    assert not list((tmp_path / "run").rglob("*.partial"))
    last.write_bytes(last.read_bytes()[:5000])
    for verb in (["fit"], ["validate"], ["export", "--out=x"]):
        result = command(verb[0], *options, *verb[1:], f"--ckpt_path={last}")
        assert result.code == 2
        assert f"checkpoint {last} is damaged: last.ckpt is cut off" in result.message
        assert "go on from another one, such as" in result.message
