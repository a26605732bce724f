"""What the verbs that train import before they have read the configuration."""

from __future__ import annotations

import json
import resource
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


def processor_seconds() -> float:
    """What child processes have used so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_reading_a_configuration_adds_nothing_heavy(tmp_path: Path):
    """Through torchmetrics, ``import lightning.pytorch.cli`` alone loads a part of transformers; we add nothing to it."""
    start = processor_seconds()
    bare = set(json.loads(python("-c", BARE, cwd=tmp_path).stdout))
    middle = processor_seconds()
    result = python("-c", AFTER, cwd=tmp_path)
    end = processor_seconds()
    codes, modules = json.loads(result.stdout.splitlines()[-1])
    assert codes == [0, 0, 2], result.stderr
    added = {m for m in modules if m.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate")} - bare
    assert not added
    # Three answers take hardly longer than the import; processor time, because wall time is that of a shared machine.
    assert end - middle < 1.5 * (middle - start)
    assert not {"diffusers", "peft"} & {m.split(".")[0] for m in modules}
