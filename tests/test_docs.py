"""What the README and the pages show is what runs: their commands and code, taken from the pages themselves."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from muybridge.backbones import load
from muybridge.cli.front import main
from muybridge.registry import BACKBONES, MODULES, VERBS

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    return [text for kind, text in found if kind == language]


def commands(page: str) -> list[list[str]]:
    """Every `muybridge …` line of a page's plain blocks, without its trailing comment."""
    lines = [line for block in blocks(page) for line in block.splitlines() if line.startswith("muybridge ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def is_tiny(command: list[str]) -> bool:
    return command[0] == "tiny" or "tiny/wan.yaml" in command


def test_every_command_of_the_readme_for_a_laptop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [c for c in commands("README.md") if is_tiny(c)]
    assert [c[0] for c in tiny] == ["tiny", "tiny", "fit", "validate", "predict", "export"]
    for command in tiny:
        assert main(command) == 0, command
    assert list((tmp_path / "runs/tiny").rglob("predictions/*.mp4"))
    assert load(str(tmp_path / "runs/tiny/exported")).family == "Wan"
    # The Python example stands after these commands and uses what they made.
    (example,) = blocks("README.md", "python")
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    assert names["video"].shape == (1, 3, 9, 16, 16)


def test_every_command_of_the_readme_for_real_models_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    real = [c for c in commands("README.md") if not is_tiny(c)]
    assert len(real) >= 4
    for command in real:
        if VERBS[command[0]].kind == "tool":
            capsys.readouterr()
            assert main([command[0], "--help"]) == 0
            known = capsys.readouterr().out
            assert all(f"{word} " in known for word in command if word.startswith("--")), command
            continue
        # Parsed and printed, not run: nothing is downloaded here.
        assert main([*command, "--print_config"]) == 0, command
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["class_path"].rsplit(".", 1)[1] in MODULES


def test_the_readme_names_every_backbone_and_the_verbs_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in BACKBONES if name not in text]
    assert not missing
    assert {c[0] for c in commands("README.md")} <= set(VERBS)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name} -> {target}")
    assert not broken


Table = list[list[str]]


def tables(text: str) -> list[Table]:
    """Heading and rows of every Markdown table."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in split]


def sections(page: str) -> list[str]:
    return re.split(r"^#+ ", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)


PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SCOREBOARD = re.compile(r"benchmarks/results/(bench-[a-z-]+\.md)")


def test_the_tables_of_scoreboards_are_what_their_commands_wrote() -> None:
    """A section with a link to a scoreboard shows rows of it, fewer of its columns perhaps; no number is typed in."""
    shown = []
    for page in PAGES:
        for section in sections(page):
            for name in dict.fromkeys(SCOREBOARD.findall(section)):
                written = [
                    (row[0], dict(zip(table[0][1:], row[1:], strict=True)))
                    for table in tables((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
                    for row in table[1:]
                ]
                for head, *rows in tables(section):
                    for row in rows:
                        wanted = dict(zip(head[1:], row[1:], strict=True))
                        assert any(title == row[0] and wanted.items() <= cells.items() for title, cells in written), (
                            f"{page} shows {row}, which {name} does not have"
                        )
                shown.append((page, name))
    assert ("README.md", "bench-motion.md") in shown


def test_a_backbone_of_the_users_own_works_as_its_page_says(
    tmp_path: Path, tiny_checkpoint: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("docs/plug-in-a-backbone.md", "python")
    # The page's pipeline is made up; the tiny Wan stands in for it.
    (tmp_path / "my_family.py").write_text(code.replace('"MyPipeline"', '"WanPipeline"'), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    from my_family import MyFamily  # type: ignore[import-not-found]

    path = str(tiny_checkpoint("wan"))  # type: ignore[operator]
    mine, ours = MyFamily(path, max_text_length=226).materialize(), load(path, max_text_length=226)
    text = mine.encode_text(["a dog"])
    noise = torch.randn(1, *mine.latent_shape(9, 16, 16), generator=torch.Generator().manual_seed(0))
    assert mine.matching(mine.motion_projections()) == ours.matching(ours.motion_projections())
    torch.testing.assert_close(mine.sample(noise, text, 2), ours.sample(noise, ours.encode_text(["a dog"]), 2))
    sys.modules.pop("my_family")


def test_a_datamodule_of_the_users_own_works_as_its_page_says(
    tmp_path: Path, tiny_checkpoint: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("docs/plug-in-a-datamodule.md", "python")
    (data,) = blocks("docs/plug-in-a-datamodule.md", "yaml")
    (tmp_path / "my_data.py").write_text(code, encoding="utf-8")
    (tmp_path / "data.yaml").write_text(data, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_checkpoint("wan")  # type: ignore[operator]
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "devices": 1,
                    "max_steps": 2,
                    "logger": False,
                    "enable_progress_bar": False,
                },
                "model": {
                    "class_path": "Finetuning",
                    "init_args": {
                        "backbone": {"class_path": "Pretrained", "init_args": {"path": str(checkpoint)}},
                        "losses": [{"class_path": "Denoising"}],
                    },
                },
            }
        ),
        encoding="utf-8",
    )
    assert main(["fit", "-c", "job.yaml", "-c", "data.yaml", "--trainer.default_root_dir", str(tmp_path / "run")]) == 0


def test_what_finetuning_exports_is_opened_by_diffusers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the code of the page, with fewer updates."""
    monkeypatch.chdir(tmp_path)
    lines = [c for c in commands("docs/finetuning.md") if is_tiny(c)]
    assert [c[0] for c in lines] == ["tiny", "fit", "export", "fit", "export"]
    for line in lines:
        short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
        assert main([*line, *(short if line[0] == "fit" else [])]) == 0, line
    (example,) = [block for block in blocks("docs/finetuning.md", "python") if "load_lora_weights" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    base = DiffusionPipeline.from_pretrained("runs/tiny/wan")
    made = {"whole": names["whole"], "adapted": names["adapted"]}
    made["base"] = base("a disc moves right", generator=torch.Generator().manual_seed(0), **names["size"]).frames
    for name, video in made.items():
        assert video.shape == (1, 9, 3, 32, 32), name
    assert not torch.equal(made["whole"], made["base"])
    assert not torch.equal(made["adapted"], made["base"])
    # What diffusers opened is what was trained.
    trained = load("runs/tiny/pipeline").networks["transformer"].state_dict()
    assert not torch.equal(trained["proj_out.weight"], base.transformer.state_dict()["proj_out.weight"])
    adapter = load_file("runs/tiny/adapter/adapter.safetensors")
    inside = {n: p for n, p in names["pipe"].transformer.named_parameters() if "lora_B" in n}
    assert len(inside) == sum("lora_B" in name for name in adapter) > 0
    for name, value in inside.items():
        plain = f"transformer.{name.replace('.default_0', '')}"
        assert torch.equal(value, adapter[plain]), name
    assert any(value.abs().sum() > 0 for value in inside.values())
