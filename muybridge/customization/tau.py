"""The boundary τ: above it a model settles how things move, below it how they look."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from muybridge.backbones.base import Backbone
from muybridge.diffusion.boundaries import Boundary, Unit
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError


class Known(NamedTuple):
    """What is published of a family.

    Args:
        tau: Its boundary as a timestep; ``None`` where no one has published one.
        clip: Frames, height and width that it was trained for.
        guidance: Its usual guidance scale.
    """

    tau: Optional[float]
    clip: tuple[int, int, int]
    guidance: float


KNOWN: dict[str, Known] = {
    "UNet3D": Known(700.0, (16, 256, 256), 9.0),
    "Latte": Known(700.0, (16, 512, 512), 7.5),
    "CogVideoX": Known(950.0, (49, 480, 720), 6.0),
    "Wan": Known(None, (81, 480, 832), 5.0),
    # Its usual 6 is embedded by the network; guidance of two calls a step would come on top.
    "HunyuanVideo": Known(None, (61, 720, 1280), 1.0),
    "LTX": Known(None, (121, 512, 768), 3.0),
    "Mochi": Known(None, (19, 480, 848), 4.5),
    "AnimateDiff": Known(None, (16, 512, 512), 7.5),
}
"""Boundaries are those of the timestep paper, found with 16 frames; of flow models none is published."""

SAME_LEVEL = 0.05
"""Levels of one time in one schedule differ by less, whatever its time was rounded to."""

RESULT = "probe.json"
"""Where a probe leaves what it found."""


@dataclass(frozen=True)
class Tau:
    """Where adapters begin to act: a number, or what a probe found; the family's published boundary where neither is given.

    Args:
        value: The boundary.
        unit: ``timestep``, ``sigma``, ``logsnr`` or ``fraction``, as for any boundary.
        from_probe: Folder of a finished ``muybridge probe``.
    """

    value: Optional[float] = None
    unit: Unit = "timestep"
    from_probe: Optional[str] = None

    def __post_init__(self) -> None:
        if self.value is not None and self.from_probe is not None:
            raise UsageError(
                f"tau has both a value ({self.value:g}) and from_probe ({self.from_probe})", "one of the two"
            )
        if self.value is not None:
            Boundary(self.value, self.unit)

    def resolve(self, backbone: Backbone) -> Boundary:
        """The boundary for this backbone, as one of its timesteps; refuses what is not inside its range.

        Args:
            backbone: Loaded or not.
        """
        if self.value is not None:
            found = Boundary(self.value, self.unit)
        elif self.from_probe is not None:
            found = read_tau(self.from_probe, backbone.family, backbone.schedule)
        else:
            known = KNOWN.get(backbone.family)
            if known is None or known.tau is None:
                raise UsageError(
                    f"no boundary tau is given, and none is published for {backbone.family}",
                    "tau: {value: 850}, or tau: {from_probe: FOLDER}",
                    f"run `muybridge probe --model {backbone.checkpoint.given} …` first; 0 trains and acts at all times",
                )
            found = Boundary(known.tau)
        t = found.resolve(backbone.schedule)
        if not 0.0 <= t < 999.0:
            raise UsageError(
                f"tau is {found.value:g} ({found.unit}), time {t:g} of {backbone.family}",
                "a time from 0 to below 999: the adapter acts above it, and there must be something",
                "the same number means other noise in other families; give it as a sigma or logsnr to compare",
            )
        return Boundary(t)


def read_tau(folder: str | Path, family: str, schedule: Optional[NoiseSchedule] = None) -> Boundary:
    """The boundary that a probe recommends.

    Args:
        folder: Its ``--out``.
        family: Of the model that is asking.
        schedule: Its noise schedule: models of one family may have several.
    """
    file = Path(folder) / RESULT if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise UsageError(
            f"there is no result of a probe at {folder}", f"a folder with {RESULT}", "run `muybridge probe` to its end"
        )
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        tau, made_for = result["tau"], result["family"]
        tau = None if tau is None else float(tau)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no result of a probe ({type(error).__name__}: {error})", f"a {RESULT}") from error
    if made_for != family:
        raise UsageError(
            f"{file} is of {made_for}", f"a probe of {family}", "boundaries of one family mean other noise in another"
        )
    if tau is None:
        raise UsageError(
            f"the probe in {folder} found no boundary: {result.get('reason', '')}",
            "a probe that found one",
            "give tau a value, or probe with more clips",
        )
    if schedule is not None and "logsnr" in result:
        here, there = float(schedule.logsnr(torch.tensor([tau]))), float(result["logsnr"])
        if here != there and not abs(here - there) < SAME_LEVEL:
            raise UsageError(
                f"{file} is of a model whose time {tau:g} is logSNR {there:.2f}; of this one it is {here:.2f}",
                "a probe of this very model: the same number is other noise here",
                f"probe it, or give the level itself: tau: {{value: {there:.3f}, unit: logsnr}}",
            )
    return Boundary(tau)
