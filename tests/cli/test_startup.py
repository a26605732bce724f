"""What the verbs that train import before they have read the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import python

BARE = "import sys, json, lightning.pytorch.cli; print(json.dumps(sorted(sys.modules)))"
AFTER = """
import json, sys
from muybridge.cli import main
sys.stdout, real = sys.stderr, sys.stdout
code = main({arguments!r})
print(json.dumps([code, sorted(sys.modules)]), file=real)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What ``import lightning.pytorch.cli`` alone loads; through torchmetrics that includes a part of transformers."""
    return set(json.loads(python("-c", BARE, cwd=tmp_path_factory.mktemp("bare")).stdout))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fit", "--help"], 0),
        (["fit", "-c", "tiny/wan.yaml", "--print_config"], 0),
        (["fit", "-c", "tiny/wan.yaml", "--model.losses=[Denoisng]"], 2),
    ],
)
def test_reading_a_configuration_adds_nothing_heavy(arguments: list[str], code: int, bare: set[str], tmp_path: Path):
    result = python("-c", AFTER.format(arguments=arguments), cwd=tmp_path)
    got, loaded = json.loads(result.stdout.splitlines()[-1])
    assert got == code, result.stderr
    added = set(loaded) - bare
    heavy = {m for m in added if m.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate", "tensorboard")}
    assert not heavy
    assert not {"diffusers", "peft"} & {m.split(".")[0] for m in loaded}
    # Beside ours and the standard library: YAML, OpenCV, PyArrow and the like, which take a fraction of a second.
    assert len({m.split(".")[0] for m in added}) < 200
