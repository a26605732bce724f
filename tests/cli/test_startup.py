"""What the verbs that train import before they have read the configuration."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import python

BARE = "import sys, json, lightning.pytorch.cli; print(json.dumps(sorted(sys.modules)))"
AFTER = """
import json, sys
from muybridge.cli import main
sys.stdout, real = sys.stderr, sys.stdout
codes = [main(arguments) for arguments in (
    ["fit", "--help"],
    ["fit", "-c", "tiny/wan.yaml", "--print_config"],
    ["fit", "-c", "tiny/wan.yaml", "--model.losses=[Denoisng]"],
)]
print(json.dumps([codes, sorted(sys.modules)]), file=real)
"""


def test_reading_a_configuration_adds_nothing_heavy(tmp_path: Path):
    """Through torchmetrics, ``import lightning.pytorch.cli`` alone loads a part of transformers; we add nothing to it."""
    bare = set(json.loads(python("-c", BARE, cwd=tmp_path).stdout))
    result = python("-c", AFTER, cwd=tmp_path)
    codes, modules = json.loads(result.stdout.splitlines()[-1])
    assert codes == [0, 0, 2], result.stderr
    added = {m for m in modules if m.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate")} - bare
    assert not added
    assert not {"diffusers", "peft"} & {m.split(".")[0] for m in modules}
