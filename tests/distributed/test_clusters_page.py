"""What docs/clusters.md and configs/slurm show is what the command takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules import FullyShard
from muybridge.cli.front import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_strategys_settings_are_those_of_the_page_and_their_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
    (tmp_path / "sharded.yaml").write_text(block, encoding="utf-8")
    config = printed(["fit", "-c", "finetune/wan-1.3b.yaml", "-c", "sharded.yaml"], capsys)
    shown = config["trainer"]["strategy"]
    assert shown["class_path"] == "lightning_modules.parallel.FullyShard"
    default = FullyShard()
    for name, value in yaml.safe_load(block)["trainer"]["strategy"]["init_args"].items():
        assert shown["init_args"][name] == value
        assert (
            getattr(default, {"save_distributed_checkpoint": "_save_distributed_checkpoint"}.get(name, name)) == value
        )


def test_the_short_name_is_the_strategy() -> None:
    from lightning.pytorch import Trainer

    built = Trainer(strategy="fully_shard", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert isinstance(built.strategy, FullyShard)


@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_job_script_runs_a_command_that_parses(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script itself runs, with a command in place of srun that writes down what it was to start."""
    monkeypatch.chdir(tmp_path)
    line = next(x for x in PAGE.splitlines() if x.startswith("sbatch") and f"{script}.sbatch" in x)
    arguments = shlex.split(line)
    after = arguments[arguments.index(f"configs/slurm/{script}.sbatch") + 1 :]
    for name, body in (
        ("srun", 'import sys; open("started", "w").write("\\0".join(sys.argv[1:]))'),
        ("scontrol", 'print("n1"); print("n2")'),
    ):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = dict(SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4", SLURM_JOB_NAME="dog", SLURM_JOB_NODELIST="n[1-2]")
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(ROOT / f"configs/slurm/{script}.sbatch"), *after], env=environment, check=True)
    option, program, *command = (tmp_path / "started").read_text(encoding="utf-8").split("\0")
    assert (option, program) == ("--kill-on-bad-exit=1", "muybridge")
    config = printed(command, capsys)
    assert config["ckpt_path"] == "last"
    trainer = config["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"]), trainer["default_root_dir"]) == (2, 4, "runs/dog")
    assert "callbacks.Preemption" in {c["class_path"] for c in trainer["callbacks"]}
