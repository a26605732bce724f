"""Configs: what ships parses, names are found, files compose, the environment and the command line override."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from muybridge.cli import configs_dir
from muybridge.cli.files import Config
from muybridge.cli.places import find_config, shipped_configs
from muybridge.errors import UsageError
from muybridge.registry import VERBS

from .conftest import ROOT, Command, header_commands, python


def test_the_shipped_configs_are_those_of_the_checkout():
    assert configs_dir() == ROOT / "configs"
    assert {"tiny/wan.yaml", "tiny/cogvideox.yaml", "tiny/latte.yaml", "tiny/unet3d.yaml"} <= set(shipped_configs())


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_parses_as_its_header_says(name: str, command: Command):
    """The first command that uses the file; some are layers over another and parse with it alone."""
    used = [c for c in header_commands(name) if any(name in word for word in c)]
    assert used, f"the header of {name} shows a command that uses it"
    for arguments in used:
        assert VERBS[arguments[0]].kind != "tool"
        result = command(*arguments, "--print_config")
        assert result.code == 0, result.err
        assert yaml.safe_load(result.out)["model"]["class_path"]


@pytest.mark.parametrize("name", shipped_configs())
def test_what_a_config_prints_is_a_config(name: str, command: Command, tmp_path: Path):
    arguments = next(c for c in header_commands(name) if any(name in w for w in c))
    first = command(*arguments, "--print_config").out
    (tmp_path / "printed.yaml").write_text(first)
    assert command(arguments[0], "-c", "printed.yaml", "--print_config").out == first


@pytest.fixture
def tiny_wan(command: Command) -> Callable[..., dict]:
    """What the tiny config of Wan becomes with further arguments."""

    def printed(*arguments: str, first: tuple[str, ...] = ()) -> dict:
        result = command("fit", *first, "-c", "tiny/wan.yaml", *arguments, "--print_config")
        assert result.code == 0, result.err
        return yaml.safe_load(result.out)

    return printed


def test_later_files_win_and_options_win_over_files(tiny_wan: Callable[..., dict], tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 31, min_steps: 5}\nseed_everything: 7\n")
    (tmp_path / "b.yaml").write_text("trainer: {max_steps: 32}\n")
    config = tiny_wan("-c", "a.yaml", "-c", "b.yaml")
    assert (config["trainer"]["max_steps"], config["trainer"]["min_steps"], config["seed_everything"]) == (32, 5, 7)
    assert tiny_wan("-c", "a.yaml", "--trainer.max_steps=33", "-c", "b.yaml")["trainer"]["max_steps"] == 32
    assert tiny_wan("-c", "a.yaml", "-c", "b.yaml", "--trainer.max_steps=33")["trainer"]["max_steps"] == 33


def test_the_other_spellings_of_c(tiny_wan: Callable[..., dict], tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 31}\n")
    for given in (["-ca.yaml"], ["-c=a.yaml"], ["--config=a.yaml"], ["--config", "a.yaml"]):
        assert tiny_wan(*given)["trainer"]["max_steps"] == 31


def test_another_class_drops_the_arguments_of_the_old(tiny_wan: Callable[..., dict], tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}}}\n"
    )
    optimizer = tiny_wan("-c", "a.yaml")["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert optimizer["init_args"]["lr"] == 0.5
    assert "betas" not in optimizer["init_args"]


def test_a_list_is_replaced_and_plus_appends(tiny_wan: Callable[..., dict], tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer: {callbacks: [EMA]}\n")
    (tmp_path / "b.yaml").write_text("trainer: {callbacks+: [EMA]}\n")

    def names(*arguments: str) -> list[str]:
        return [c["class_path"].rsplit(".", 1)[-1] for c in tiny_wan(*arguments)["trainer"]["callbacks"]]

    assert names() == ["ModelCheckpoint", "Samples"]
    assert names("-c", "a.yaml") == ["EMA"]
    assert names("-c", "b.yaml") == ["ModelCheckpoint", "Samples", "EMA"]
    assert names("--trainer.callbacks+=EMA") == ["ModelCheckpoint", "Samples", "EMA"]


def test_the_environment_wins_over_files_and_options_over_both(
    tiny_wan: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MUYBRIDGE_FIT__TRAINER__MIN_STEPS", "9")
    monkeypatch.setenv("MUYBRIDGE_FIT__TRAINER__MAX_STEPS", "10")
    monkeypatch.setenv("MUYBRIDGE_FIT__MODEL__INIT_ARGS__CAPTION_DROPOUT", "0.25")
    monkeypatch.setenv("MUYBRIDGE_PREDICT__TRAINER__MIN_STEPS", "5")
    monkeypatch.setenv("MUYBRIDGE_ROOT", "somebody's own")
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 7}\n")
    config = tiny_wan("-c", "a.yaml")
    assert (config["trainer"]["min_steps"], config["trainer"]["max_steps"]) == (9, 10)
    assert config["model"]["init_args"]["caption_dropout"] == 0.25
    assert tiny_wan("--trainer.min_steps=3")["trainer"]["min_steps"] == 3


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("MUYBRIDGE_FIT__TRAINER__MAX_STPES", "did you mean MUYBRIDGE_FIT__TRAINER__MAX_STEPS?"),
        ("MUYBRIDGE_FTI__TRAINER__MAX_STEPS", "there is no such verb"),
        ("MUYBRIDGE_FIT__MODEL__INIT_ARGS__CAPTION_DROPUOT", "did you mean --model.caption_dropout?"),
        ("MUYBRIDGE_DEBG", "did you mean MUYBRIDGE_DEBUG?"),
    ],
)
def test_a_misspelt_variable_is_named(variable: str, said: str, command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "1")
    result = command("fit", "-c", "tiny/wan.yaml", "--print_config")
    assert result.code == 2
    assert variable in result.message
    assert said in result.message


def test_the_environment_names_a_config(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUYBRIDGE_FIT__CONFIG", "tiny/wan.yaml")
    result = command("fit", "--trainer.min_steps=3", "--print_config")
    assert result.code == 0, result.err
    trainer = yaml.safe_load(result.out)["trainer"]
    assert (trainer["min_steps"], trainer["max_steps"]) == (3, 20)


def test_the_seed_is_set_where_nothing_says_so(tiny_wan: Callable[..., dict]):
    assert tiny_wan()["seed_everything"] == 0


def test_the_users_file_goes_before_a_shipped_one(command: Command, tmp_path: Path):
    (tmp_path / "tiny").mkdir()
    text = (ROOT / "configs/tiny/wan.yaml").read_text().replace("max_steps: 20", "max_steps: 21")
    (tmp_path / "tiny/wan.yaml").write_text(text)
    result = command("fit", "-c", "tiny/wan.yaml", "--print_config")
    assert yaml.safe_load(result.out)["trainer"]["max_steps"] == 21
    assert "config tiny/wan.yaml:" not in result.err


def test_a_shipped_file_is_named_when_it_is_taken(command: Command):
    for given in ("tiny/wan.yaml", "configs/tiny/wan.yaml"):
        result = command("fit", "-c", given, "--print_config")
        assert f"config {given}: {ROOT / 'configs/tiny/wan.yaml'}" in result.err


def test_an_absolute_path_is_only_itself(tmp_path: Path):
    with pytest.raises(UsageError, match="does not exist"):
        find_config(str(tmp_path / "tiny/wan.yaml"))


def test_configs_are_found_in_a_wheel_too(tmp_path: Path):
    """The layout that pyproject.toml's force-include makes: configs inside the package."""
    assert '"configs" = "muybridge/configs"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "muybridge", site / "muybridge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", site / "muybridge/configs")
    for room in ("lightning_modules", "datamodules", "callbacks"):
        shutil.copytree(ROOT / room, site / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "work").mkdir()
    code = "from muybridge.cli import configs_dir; print(configs_dir())"
    result = python("-c", code, cwd=tmp_path / "work", PYTHONPATH=str(site))
    assert result.stdout.strip() == str(site / "muybridge/configs")
    listed = python("-m", "muybridge", "list", "configs", cwd=tmp_path / "work", PYTHONPATH=str(site))
    assert "tiny/wan.yaml" in listed.stdout


def test_a_word_is_found_under_its_keys_alone(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  class_path: A\n  init_args:\n    x: 1\n    parts:\n      - class_path: B\n        init_args:\n          x: 2\n"
    )
    config = Config(file)
    assert config.find(["model"], "x").endswith("line 4")
    assert config.find(["model", "parts"], "x").endswith("line 8")
    assert config.find(["model", "parts"], "B").endswith("line 6")
    assert config.find([], "model").endswith("line 1")
    assert config.find(["data"], "x") == ""
