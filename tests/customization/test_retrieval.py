"""Same-motion retrieval: precisions by hand, and maps of a real network on clips with known motion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.denoising import denoising_inputs, open_tiny

from muybridge import tiny
from muybridge.backbones.taps import AttentionTap
from muybridge.cli import main
from muybridge.customization.retrieval import (
    Key,
    as_regex,
    average_precision,
    best_layers,
    describe_record,
    retrieve,
    similarity_of,
)
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]


def test_average_precision_by_hand() -> None:
    same = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]).bool()
    perfect = same.float()
    assert average_precision(perfect, same) == pytest.approx(1.0)
    # Query 0 finds the other kind first: precisions 1/2 and 2/3; queries 1 and 3 are perfect, query 2 has no like.
    wrong = perfect.clone()
    wrong[0, 2] = 5.0
    assert average_precision(wrong, same) == pytest.approx(((1 / 2 + 2 / 3) / 2 + 2.0) / 3)
    assert average_precision(perfect, torch.eye(4).bool()) is None


def test_what_all_clips_share_says_nothing() -> None:
    vectors = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(similarity_of(vectors + 1000.0), similarity_of(vectors), atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity_of(vectors).diagonal(), torch.ones(5).double())


def test_keys_that_know_the_motion_are_told_from_those_that_do_not() -> None:
    motions = [f"motion {i % 3}" for i in range(15)]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 40, generator=generator)
    described = []
    for i in range(15):
        noise = torch.randn(3, 40, generator=generator)
        described.append(
            {
                Key("temporal", "a", 700.0): codes[i % 3] + 0.3 * noise[0],
                Key("temporal", "b", 700.0): noise[1],
                Key("cross", "c", 700.0): codes[i % 3] + 2.5 * noise[2],
                Key("temporal", "a", 100.0): noise[1],
            }
        )
    scores = retrieve(described, motions)
    chance = scores[Key("chance", "all", 0.0)]
    assert scores[Key("temporal", "a", 700.0)] > 0.95
    assert scores[Key("temporal", "b", 700.0)] < chance + 0.2
    assert scores[Key("both", "all", 700.0)] > chance + 0.2
    assert chance == pytest.approx(4 / 14, abs=0.15)
    assert best_layers(scores) == ["a"]
    assert as_regex(["blocks.0.attn1"]) == r"blocks\.0\.attn1"


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_descriptors_do_not_grow_with_the_picture(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone, samples=1)
    tap = AttentionTap(backbone, kind=("temporal", "cross"))
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, t, text))
    kinds = [describe_record(record) for record in tap.records]
    assert {k for one in kinds for k in one} == {"temporal", "cross"}
    for record, one in zip(tap.records, kinds, strict=True):
        assert record.grid is not None
        assert all(bool(vector.isfinite().all()) for vector in one.values())
        if "temporal" in one:
            assert one["temporal"].numel() <= 64 * record.grid[0] ** 2


def test_the_command_ranks_layers(
    references: Callable[[Path, int], Path], tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = references(tmp_path / "clips", 6)
    command = ["motion-layers", f"--model={tiny_checkpoint('wan')}", f"--videos={folder}", f"--out={tmp_path / 'out'}"]
    command += ["--frames=9", "--height=16", "--width=16", "--times=[700]"]
    assert main(command) == 0
    result = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert result["clips"] == 6
    assert set(result["layers"]) <= {f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)}
    rows = (tmp_path / "out/retrieval.csv").read_text().splitlines()
    assert {r.split(",")[0] for r in rows[1:]} == {
        "temporal",
        "cross",
        "both",
        "latents",
        "noisy latents",
        "pixels",
        "chance",
    }
    capsys.readouterr()
    assert main([*command, "--limit=1"]) == 2
    assert "several motions" in capsys.readouterr().err
    assert main([*command, "--times=[1000]"]) == 2


def test_clips_that_tell_nothing_are_refused() -> None:
    one = {Key("temporal", "a", 700.0): torch.randn(4)}
    with pytest.raises(UsageError, match="at least two clips"):
        retrieve([one, one], ["a", "b"])
    with pytest.raises(UsageError, match="nothing to tell apart"):
        retrieve([one, one], ["a", "a"])
