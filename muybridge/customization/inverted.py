"""Inverted noise on disk, with what made it: a file that says of which clip, model, prompt and steps it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.diffusion import inversion
from muybridge.diffusion.samplers import OnStep
from muybridge.errors import UsageError
from muybridge.permissions import as_usual
from muybridge.whole import whole

KEY = "muybridge_inversion"
"""Our entry in the file's header."""


@dataclass(frozen=True)
class How:
    """How an inversion is made.

    Args:
        steps: Places on the way.
        order: ``euler`` or ``midpoint``.
        refinements: Fixed-point iterations of each Euler step.
        guidance: Standard guidance; 1 is none, and all published inversions use none.
    """

    steps: int = 50
    order: inversion.Order = "euler"
    refinements: int = 2
    guidance: float = 1.0


@dataclass(frozen=True)
class Inverted:
    """The noise of one clip.

    Args:
        noise: (C, F, H, W).
        clean: The clip's latents.
        about: What made it: clip and its file, model, family, prompt, steps, order, refinements, guidance, size, frames per
            second, dtype, error of the round trip.
    """

    noise: Tensor
    clean: Tensor
    about: dict[str, Any]


@torch.no_grad()
def invert_clip(
    backbone: Backbone, clean: Tensor, prompt: str, how: How, check: bool = False, on_step: OnStep | None = None
) -> tuple[list[Tensor], float | None]:
    """The latents of one clip on its way to noise, and the relative error of coming back where asked.

    Args:
        backbone: With its network loaded.
        clean: Latents (1, C, F, H, W).
        prompt: As the text encoder is given it.
        how: Steps, order, refinements, guidance.
        check: Sample back, and compare.
        on_step: Called after each step.
    """
    text = backbone.encode_text([prompt])
    denoise = backbone.guided(text, guidance=how.guidance)
    schedule = backbone.schedule
    states = inversion.invert(denoise, clean, schedule, how.steps, how.order, how.refinements, on_step)
    if not bool(torch.isfinite(states[-1]).all()):
        raise UsageError(
            f"the inversion of {prompt!r} diverged",
            "guidance 1, and more steps",
            f"it was made with guidance {how.guidance:g} and {how.steps} steps",
        )
    if not check:
        return states, None
    back = inversion.resample(denoise, states[-1], schedule, how.steps, how.order, on_step=on_step)
    return states, float(inversion.relative_error(back, clean)[0])


def write_inverted(path: str | Path, found: Inverted) -> Path:
    """A safetensors file, with what it says in its header."""
    from safetensors.torch import save_file

    tensors = {"noise": found.noise.contiguous().cpu(), "clean": found.clean.contiguous().cpu()}
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", KEY: json.dumps(found.about)})
        as_usual(partial)
    return Path(path)


def read_inverted(path: str | Path, backbone: Backbone | None = None) -> Inverted:
    """Read a file of ``muybridge invert``; refuses one of another family.

    Args:
        path: A ``.safetensors`` file.
        backbone: What the noise is for.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no inverted noise at {path}", "a .safetensors file that `muybridge invert` wrote")
    try:
        with safe_open(file, "pt") as opened:
            header = dict(opened.metadata() or {})
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} can't be read as safetensors ({error})", "a whole file") from error
    if KEY not in header or set(tensors) != {"noise", "clean"}:
        raise UsageError(f"{path} was not written by `muybridge invert`", "inverted noise")
    found = Inverted(tensors["noise"], tensors["clean"], json.loads(header[KEY]))
    if backbone is not None and found.about["family"] != backbone.family:
        raise UsageError(f"{path} is noise of {found.about['family']}", f"noise of {backbone.family}")
    return found


def about(
    backbone: Backbone, clip: str, prompt: str, how: How, size: tuple[int, int, int], **more: Any
) -> dict[str, Any]:
    """What made an inversion, as plain values."""
    import muybridge

    return {
        "version": muybridge.__version__,
        "model": backbone.checkpoint.given,
        "family": backbone.family,
        "clip": clip,
        "prompt": prompt,
        **asdict(how),
        "frames": size[0],
        "height": size[1],
        "width": size[2],
        **more,
    }


def refuse_other(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse to keep a file that was made otherwise than it would be now."""
    made = read_inverted(path).about
    other = [key for key in wanted if key != "version" and made.get(key) != wanted[key]]
    if other:
        raise UsageError(
            f"{path} is there and was made with {other[0]} {made.get(other[0])!r}",
            f"{wanted[other[0]]!r}, as is asked for now",
            "choose another --out, or remove the file",
        )
