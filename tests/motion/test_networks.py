"""What the network estimators say where weights or code are not what they should be. They run on weights that the user has."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from muybridge.errors import UsageError
from muybridge.motion import RAFT, AllTracker, CoTracker
from muybridge.motion.networks import _code, _load

FRAMES = np.zeros((2, 16, 16, 3), np.uint8)


def test_missing_weights_and_code_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    for estimator in (RAFT(str(weights)), CoTracker(str(tmp_path), str(weights))):
        with pytest.raises(UsageError, match=r"weights .*w\.pth do not exist"):
            estimator(FRAMES)
    torch.save(nn.Linear(2, 2).state_dict(), weights)
    with pytest.raises(UsageError, match="is no checkout of CoTracker: it has no folder cotracker"):
        CoTracker(str(tmp_path), str(weights))(FRAMES)
    with pytest.raises(UsageError, match="AllTracker on cpu"):
        AllTracker(str(tmp_path), str(weights), device="cpu")
    with pytest.raises(UsageError, match="step is 0"):
        CoTracker(str(tmp_path), str(weights), step=0)


def test_all_weights_are_loaded_or_none(tmp_path: Path) -> None:
    made = nn.Linear(2, 2)
    torch.save({"model": made.state_dict()}, tmp_path / "nested.pth")
    found = _load(nn.Linear(2, 2), str(tmp_path / "nested.pth"), "X")
    assert torch.equal(found.weight, made.weight)  # type: ignore[arg-type]
    torch.save({"weight": made.weight}, tmp_path / "part.pth")
    with pytest.raises(UsageError, match=r"does not fit X .*bias"):
        _load(nn.Linear(2, 2), str(tmp_path / "part.pth"), "X")


def test_a_trackers_own_packages_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "thing.py").write_text("import absent_library\n")
    path = list(sys.path)
    with pytest.raises(UsageError, match=r"can't be imported .*absent_library"), _code(str(tmp_path), "nets", "X"):
        __import__("nets.thing")
    (tmp_path / "nets" / "thing.py").write_text("value = 3\n")
    with _code(str(tmp_path), "nets", "X"):
        assert __import__("nets.thing", fromlist=["value"]).value == 3
    assert sys.path == path
    assert not [name for name in sys.modules if name.split(".")[0] == "nets"]


def test_a_cache_knows_the_weights_and_not_where_they_lie(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "c.pth").write_bytes(b"other")
    keys = [RAFT(str(tmp_path / name)).key() for name in ("a.pth", "b.pth", "c.pth")]
    assert keys[0] == keys[1] != keys[2]
