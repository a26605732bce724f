"""What the network estimators say where weights or code are not what they should be. They run on weights that the user has."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


# Stand-ins for the networks' own code, with the calls it has: what the estimators make of their answers is exact then.

SHEAR = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(2))


class CoTrackerPredictor(nn.Module):
    def __init__(self, checkpoint):
        assert checkpoint is None
        super().__init__()
        self.model = Model()

    def forward(self, video, queries):
        t = torch.arange(video.shape[1]).view(1, -1, 1, 1)
        x, y = queries[..., 1:2], queries[..., 2:3]
        way = torch.cat([self.model.rate[0] * y, self.model.rate[1] * x], -1)
        seen = (y < 8)[:, None, :, 0].expand(-1, video.shape[1], -1)
        return queries[:, None, :, 1:] + t * way[:, None], seen
"""

SLIDING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, window, init_weights=True, use_basicencoder=False, no_split=False):
        super().__init__()
        if init_weights:
            raise OSError("it would fetch an encoder")
        assert use_basicencoder == no_split
        self.rate = nn.Parameter(torch.zeros(2))

    def forward_sliding(self, images, iters, sw, is_training):
        _, count, _, height, width = images.shape
        assert height >= 128 and width >= 128 and height % 8 == width % 8 == 0
        t = torch.arange(count).view(-1, 1, 1, 1)
        flows = (t * self.rate.view(1, 2, 1, 1)).expand(-1, -1, height, width)[None]
        seen = torch.stack([torch.full((count, height, width), v) for v in (0.75, 0.25)], 1)[None]
        if count == 2:  # as it does
            flows, seen = flows[:, 1], seen[:, 1]
        return flows, seen, None, None
"""


def test_points_that_are_tracked_become_displacement_of_every_pixel(tmp_path: Path) -> None:
    """A shear is linear, which bilinear displacement between points gives exactly."""
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "predictor.py").write_text(SHEAR)
    torch.save({"rate": torch.tensor([0.5, -0.25])}, tmp_path / "w.pth")
    found = CoTracker(str(tmp_path), str(tmp_path / "w.pth"), step=3)(np.zeros((4, 17, 14, 3), np.uint8))
    t, y, x = torch.meshgrid(torch.arange(4.0), torch.arange(17.0), torch.arange(14.0), indexing="ij")
    torch.testing.assert_close(found.vectors, torch.stack([0.5 * t * y, -0.25 * t * x], 1), rtol=1e-5, atol=1e-5)
    assert found.reference == "first"
    assert found.visibility.shape == (4, 17, 14)
    assert bool((found.visibility[:, :6] == 1).all())
    assert bool((found.visibility[:, 12:] == 0).all())


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("count", [2, 5])
def test_dense_tracks_are_those_of_the_clip_and_nothing_is_fetched(count: int, size: Any, tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "alltracker.py").write_text(SLIDING)
    torch.save({"model": {"rate": torch.tensor([1.5, -2.0])}}, tmp_path / "w.pth")
    tracker = AllTracker(str(tmp_path), str(tmp_path / "w.pth"), size=size)
    tracker.device = "cpu"  # where this stand-in, unlike the real code, can run
    found = tracker(np.zeros((count, 30, 21, 3), np.uint8))
    t = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, -1, 30, 21)
    torch.testing.assert_close(found.vectors, torch.cat([1.5 * t, -2.0 * t], 1))
    assert torch.all(found.visibility[1:] == 0.75)
    assert torch.all(found.confidence[1:] == 0.25)
    assert found.reference == "first"


def test_flow_is_that_of_the_picture_and_not_of_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.zeros(1))

        def forward(self, first: torch.Tensor, second: torch.Tensor, num_flow_updates: int) -> list[torch.Tensor]:
            assert first.shape == second.shape == (1, 3, 128, 136)
            assert first.min() >= -1.0
            assert first.max() <= 1.0
            shown = self.rate * torch.cat([second.mean(1, True), first.mean(1, True)], 1)
            return [shown * 0] * (num_flow_updates - 1) + [shown]

    package = ModuleType("torchvision.models.optical_flow")
    vars(package)["raft_small"] = lambda weights: Raft()
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    torch.save({"rate": torch.tensor([2.0])}, tmp_path / "w.pth")
    frames = np.random.default_rng(0).integers(0, 256, (2, 100, 130, 1), np.uint8).repeat(3, 3)
    found = RAFT(str(tmp_path / "w.pth"), size="small").flow(frames[0], frames[1])
    wanted = 2.0 * (torch.from_numpy(frames[::-1, ..., 0].copy()).float() / 127.5 - 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
