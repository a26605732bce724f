"""Estimators that are networks: weights, and code where it is no library's, come from paths that the user gives."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from muybridge.errors import UsageError
from muybridge.motion.estimators import Displacement, FlowEstimator, Frames, MotionEstimator


def _file(path: str, what: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{what} weights {path} do not exist", "a file of weights", f"looked up from {Path.cwd()}")
    return file


def _load(network: nn.Module, path: str, what: str) -> nn.Module:
    """Put a file's weights into a network: all of them, or an error."""
    state = torch.load(_file(path, what), map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UsageError(f"{path} does not fit {what} ({first[:200]})", f"weights of {what}") from error
    return network.eval().requires_grad_(False)


def _digest(path: str, what: str) -> str:
    """Of a file of weights: what they are, wherever they lie."""
    digest = hashlib.blake2b(digest_size=8)
    with open(_file(path, what), "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _code(folder: str, package: str, what: str) -> Iterator[None]:
    """Let Python import a tracker's own code; its packages have names such as ``utils``, so they are forgotten afterwards."""
    root = Path(folder).expanduser()
    if not (root / package).is_dir():
        raise UsageError(
            f"{folder} is no checkout of {what}: it has no folder {package}", f"a clone of {what}'s repository"
        )
    before = set(sys.modules)
    shadowed = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("nets", "utils")}
    for name in shadowed:
        del sys.modules[name]
    sys.path.insert(0, str(root.resolve()))
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"{what}'s code at {folder} can't be imported ({error})", "what its own page says to install"
        ) from error
    finally:
        sys.path.remove(str(root.resolve()))
        for name in [n for n in sys.modules if n not in before and n.split(".")[0] in ("nets", "utils")]:
            del sys.modules[name]
        sys.modules.update(shadowed)


SMALLEST = 128
"""Pixels of a side below which the networks' pyramids of correlations run out."""


def _padded(pictures: Tensor) -> Tensor:
    """Sides of at least :data:`SMALLEST` that 8 divides; what is added on the right and below repeats the edge."""
    tall, wide = (max(SMALLEST, -(-n // 8) * 8) for n in pictures.shape[-2:])
    return nn.functional.pad(pictures, (0, wide - pictures.shape[-1], 0, tall - pictures.shape[-2]), mode="replicate")


class RAFT(FlowEstimator):
    """RAFT as torchvision has it.

    Args:
        weights: File of a state dict, such as torchvision's ``raft_large_C_T_SKHT_V2``.
        size: ``large`` or ``small``, as the weights are.
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
        occlusion: Estimate the flow both ways, and take pixels that don't come back for hidden.
        iterations: Updates of the flow.
        device: Where it runs.
    """

    def __init__(
        self,
        weights: str,
        size: Literal["large", "small"] = "large",
        camera: Literal["keep", "remove"] = "keep",
        occlusion: bool = False,
        iterations: int = 12,
        device: str = "cpu",
    ) -> None:
        super().__init__(camera, occlusion)
        self.weights, self.size, self.iterations, self.device = weights, size, iterations, device
        self._network: Any = None

    def network(self) -> nn.Module:
        """The network, loaded once."""
        if self._network is None:
            _file(self.weights, "RAFT")
            try:
                flow = importlib.import_module("torchvision.models.optical_flow")
            except (ImportError, RuntimeError) as error:  # one that was built for another torch raises the second
                raise UsageError(
                    f"RAFT needs torchvision ({error})",
                    "the torchvision that belongs to this torch",
                    "pip install torchvision",
                ) from error
            made = getattr(flow, f"raft_{self.size}")(weights=None)
            self._network = _load(made, self.weights, f"RAFT {self.size}").to(self.device)
        return self._network

    @torch.no_grad()
    def flow(self, first: np.ndarray, second: np.ndarray) -> Tensor:
        pictures = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        height, width = first.shape[:2]
        padded = _padded(pictures).to(self.device)
        found = self.network()(padded[:1], padded[1:], num_flow_updates=self.iterations)[-1]
        return found[0, :, :height, :width].float().cpu()

    def key(self) -> dict[str, Any]:
        return {**super().key(), "weights": _digest(self.weights, "RAFT")}


class CoTracker(MotionEstimator):
    """CoTracker3 (offline) from a clone of its repository: displacement from the first frame, on its grid.

    Args:
        code: A clone of facebookresearch/co-tracker.
        weights: File of weights, such as ``scaled_offline.pth``.
        step: Pixels from one tracked point to the next; between them displacement is bilinear.
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
        device: Where it runs.
    """

    reference = "first"

    def __init__(
        self,
        code: str,
        weights: str,
        step: int = 4,
        camera: Literal["keep", "remove"] = "keep",
        device: str = "cpu",
    ) -> None:
        super().__init__(camera)
        if step < 1:
            raise UsageError(f"CoTracker step is {step}", "1 or more")
        self.code, self.weights, self.step, self.device = code, weights, step, device
        self._predictor: Any = None

    def predictor(self) -> Any:
        """The predictor, loaded once."""
        if self._predictor is None:
            _file(self.weights, "CoTracker")
            with _code(self.code, "cotracker", "CoTracker"):
                made: Any = importlib.import_module("cotracker.predictor").CoTrackerPredictor(checkpoint=None)
            _load(made.model, self.weights, "CoTracker3 offline")
            self._predictor = made.to(self.device)
        return self._predictor

    @torch.no_grad()
    def estimate(self, frames: Frames) -> Displacement:
        count, height, width, _ = frames.shape
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()[None].to(self.device)
        ys = torch.linspace(0, height - 1, max(2, -(-height // self.step)))
        xs = torch.linspace(0, width - 1, max(2, -(-width // self.step)))
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        points = torch.stack([torch.zeros_like(x), x, y], -1).view(1, -1, 3).to(self.device)
        tracks, seen = self.predictor()(video, queries=points)
        way = (tracks[0].cpu() - points[0, :, 1:].cpu()).view(count, len(ys), len(xs), 2).permute(0, 3, 1, 2)
        # Points stand on the first and last row and column, so corners are aligned.
        vectors = nn.functional.interpolate(way, (height, width), mode="bilinear", align_corners=True)
        shown = seen[0].float().cpu().view(count, 1, len(ys), len(xs))
        visible = nn.functional.interpolate(shown, (height, width), mode="bilinear", align_corners=True)[:, 0]
        return Displacement(vectors, visible, visible.clone(), "first")

    def key(self) -> dict[str, Any]:
        return {**super().key(), "code": "cotracker3 offline", "weights": _digest(self.weights, "CoTracker")}


class AllTracker(MotionEstimator):
    """AllTracker from a clone of its repository: dense displacement from the first frame, on its grid.

    Args:
        code: A clone of aharley/alltracker.
        weights: File of weights, such as ``alltracker.pth``.
        size: ``full``, or ``tiny``, as the weights are.
        iterations: Updates of the flow.
        camera: ``keep`` what the camera does, or ``remove`` the affine motion that most of a frame follows.
        device: A GPU: its code puts what it computes there.
    """

    reference = "first"

    def __init__(
        self,
        code: str,
        weights: str,
        size: Literal["full", "tiny"] = "full",
        iterations: int = 4,
        camera: Literal["keep", "remove"] = "keep",
        device: str = "cuda",
    ) -> None:
        super().__init__(camera)
        if not device.startswith("cuda"):
            raise UsageError(
                f"AllTracker on {device}", "a GPU: its code puts tensors there by itself", "CoTracker, or DIS"
            )
        self.code, self.weights, self.size = code, weights, size
        self.iterations, self.device = iterations, device
        self._network: Any = None

    def network(self) -> Any:
        """The network, loaded once."""
        if self._network is None:
            _file(self.weights, "AllTracker")
            with _code(self.code, "nets", "AllTracker"):
                net: Any = importlib.import_module("nets.alltracker").Net
                kind = {"use_basicencoder": True, "no_split": True} if self.size == "tiny" else {}
                # Otherwise it fetches an encoder from the network, which the file's weights then replace.
                made = net(16, init_weights=False, **kind)
            self._network = _load(made, self.weights, f"AllTracker {self.size}").to(self.device)
        return self._network

    @torch.no_grad()
    def estimate(self, frames: Frames) -> Displacement:
        video = _padded(torch.from_numpy(frames).permute(0, 3, 1, 2).float())[None].to(self.device)
        flows, seen, _, _ = self.network().forward_sliding(video, iters=self.iterations, sw=None, is_training=False)
        flows, seen = flows.float().cpu(), seen.float().cpu()
        if flows.ndim == 4:  # of two frames it gives the second alone
            flows = torch.stack([torch.zeros_like(flows), flows], 1)
            seen = torch.stack([torch.ones_like(seen), seen], 1)
        flows, seen = (found[0, ..., : frames.shape[1], : frames.shape[2]] for found in (flows, seen))
        return Displacement(flows, seen[:, 0], seen[:, 1], "first")

    def key(self) -> dict[str, Any]:
        return {**super().key(), "code": "alltracker", "weights": _digest(self.weights, "AllTracker")}
