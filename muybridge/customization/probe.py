"""Where motion lives: words are swapped during a part of the sampling, and what that changes is measured.

A clip is inverted under its own caption. For each pair of boundaries the sampler then runs under the *target* caption between
them and under the *source* caption outside. Cells share their beginnings: the source path up to a start is the inverted path
itself, and the target path from a start is walked once for all ends. With N steps and b boundaries that takes
``Σ_i (N - i) + Σ_{i<j} (N - j)`` network steps: 1100 instead of 2750 for 50 and 10. Guided sampling leaves the inverted path, so
its source path is walked first, N steps more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.customization.inverted import How, invert_clip
from muybridge.customization.references import Reference, spoken
from muybridge.customization.scores import Alignment
from muybridge.diffusion import inversion
from muybridge.diffusion.draws import keyed_noise
from muybridge.diffusion.samplers import Denoiser
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError
from muybridge.metrics.flow import dis_flow
from muybridge.metrics.similarity import flow_agreement
from muybridge.proving_ground.captions import join_caption, split_caption

Swap = Literal["subject", "motion", "noise"]
SWAPS: tuple[Swap, ...] = ("subject", "motion", "noise")
"""What is tampered with: the words of the subject (the probe), those of the motion, or nothing but the noise."""


@dataclass(frozen=True)
class Cell:
    """What came of tampering between two boundaries.

    Args:
        clip: Id of the reference.
        frames: Frames of the clip.
        swap: What was tampered with.
        target: The caption that was put in.
        start: First tampered step, counted from noise.
        end: First step after the tampered ones; as ``start`` where nothing is tampered with.
        t_start: The time of that step.
        t_end: The time at which the tampering has ended; 0 at the end of the sampling.
        logsnr_start: Log signal-to-noise ratio there.
        logsnr_end: Likewise.
        alignment: How much the result is like the target caption.
        similarity: How much it moves like the reference, or under guidance like what guided sampling makes of its noise.
        error: Endpoint error of the flow against the reference's, as a share of the diagonal.
        ratio: Amount of motion against the reference's.
    """

    clip: str
    frames: int
    swap: str
    target: str
    start: int
    end: int
    t_start: float
    t_end: float
    logsnr_start: float
    logsnr_end: float
    alignment: float
    similarity: float
    error: float
    ratio: float

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: dict[str, str]) -> Cell:
        """From a row of a table."""
        kinds = {"str": str, "int": int, "float": float}
        said = {"target": "", **row}  # which the first tables did not say
        return cls(**{f.name: kinds[str(f.type)](said[f.name]) for f in fields(cls)})


def marks(steps: int, boundaries: int) -> list[int]:
    """``boundaries + 1`` steps from 0 (noise) to ``steps`` (clean), as evenly spread as whole numbers can be."""
    if not 2 <= boundaries <= steps:
        raise UsageError(
            f"{boundaries} boundaries of {steps} steps",
            f"from 2 to {steps}",
            "10 boundaries of 50 steps are the paper's",
        )
    return [round(k * steps / boundaries) for k in range(boundaries + 1)]


def network_steps(steps: int, boundaries: int, swap: Swap = "subject", guidance: float = 1.0) -> int:
    """Network steps of a grid, its inversion not counted."""
    at = marks(steps, boundaries)
    runs = sum(steps - i for i in at[:-1])
    if swap == "noise":
        return runs
    return runs + sum(k * (steps - j) for k, j in enumerate(at)) + (steps if guidance != 1.0 else 0)


def walked(
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    order: inversion.Order = "euler",
    on_step: Optional[Callable[[], None]] = None,
) -> list[Tensor]:
    """The latents of a sampling at every place, from clean to noise as those of an inversion."""
    path = [noise]

    def note(index: int, count: int, time: float, z: Tensor) -> None:
        path.append(z)
        if on_step is not None:
            on_step()

    inversion.resample(denoise, noise, schedule, steps, order, on_step=note)
    return path[::-1]


def tampered(
    source: Denoiser,
    target: Denoiser,
    path: Sequence[Tensor],
    schedule: NoiseSchedule,
    boundaries: int,
    order: inversion.Order = "euler",
    on_step: Optional[Callable[[], None]] = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """All cells of a grid: (first tampered step, first step after, resulting latents).

    Args:
        source: The network under the caption of the path.
        target: The network under the other caption.
        path: Latents from clean to noise, as :func:`muybridge.diffusion.inversion.invert` and :func:`walked` give them.
        schedule: The family's schedule.
        boundaries: Equal parts into which the steps are cut.
        order: As for the inversion.
        on_step: Called after each network step.
    """
    steps = len(path) - 1
    at = marks(steps, boundaries)

    def walk(denoise: Denoiser, z: Tensor, start: int, stop: int) -> Tensor:
        said = None if on_step is None else (lambda *_: on_step())
        return inversion.resample(denoise, z, schedule, steps, order, start, stop, said)

    for k, start in enumerate(at[:-1]):
        z, reached = path[steps - start], start
        for end in at[k + 1 :]:
            z, reached = walk(target, z, reached, end), end
            yield start, end, walk(source, z, end, steps) if end < steps else z


def renoised(
    source: Denoiser,
    clean: Tensor,
    fresh: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    boundaries: int,
    order: inversion.Order = "euler",
    on_step: Optional[Callable[[], None]] = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """The cross-check without words: from each boundary on, the clip's own noise is replaced by fresh noise.

    What the clip keeps is what its noisy latents still held at that time.
    """
    places = inversion.ladder(schedule, steps)[::-1]
    said = None if on_step is None else (lambda *_: on_step())
    for start in marks(steps, boundaries)[:-1]:
        z = places[start].alpha * clean + places[start].sigma * fresh
        yield start, steps, inversion.resample(source, z, schedule, steps, order, start, steps, said)


@dataclass(frozen=True)
class Settings:
    """How a probe is made: all that its numbers depend on, besides model, clips and captions.

    Args:
        how: The inversion, and the sampler's steps and order.
        boundaries: Equal parts of the steps.
        guidance: Standard guidance of the sampling.
        keep_bar: Captions are given to the text encoder with their bar.
        seed: Of the fresh noise of the swap ``noise``.
    """

    how: How = field(default_factory=How)
    boundaries: int = 10
    guidance: float = 1.0
    keep_bar: bool = False
    seed: int = 0


@torch.no_grad()
def probe_clip(
    backbone: Backbone,
    reference: Reference,
    target: str,
    swap: Swap,
    settings: Settings,
    alignment: Alignment,
    on_step: Optional[Callable[[], None]] = None,
) -> list[Cell]:
    """The grid of one clip.

    Args:
        backbone: With its network loaded.
        reference: The clip.
        target: The caption that is put in; for the swap ``noise`` the reference's own.
        swap: What the target differs in.
        settings: How.
        alignment: What says how much a clip is like the target.
        on_step: Called after each network step, those of the inversion among them.
    """
    how, schedule, caption = settings.how, backbone.schedule, reference.caption
    frames = reference.pixels.shape[1]
    clean = backbone.encode(reference.pixels[None].to(backbone.device))
    advance = None if on_step is None else (lambda *_: on_step())
    path, _ = invert_clip(backbone, clean, spoken(caption, settings.keep_bar), how, on_step=advance)

    def under(words: str) -> Denoiser:
        text = backbone.encode_text([spoken(words, settings.keep_bar)])
        return backbone.guided(text, guidance=settings.guidance)

    if settings.guidance != 1.0 and swap != "noise":
        path = walked(under(caption), path[-1], schedule, how.steps, how.order, on_step)
    places = inversion.ladder(schedule, how.steps)[::-1]
    untouched = backbone.decode(path[0])
    flow = dis_flow(untouched.cpu())

    def cell(start: int, end: int, latents: Tensor, pixels: Tensor) -> Cell:
        found = flow_agreement(dis_flow(pixels.cpu()), flow)
        a, b = places[start], places[end]
        return Cell(
            clip=reference.id,
            frames=frames,
            swap=swap,
            target=target,
            start=start,
            end=end,
            t_start=a.time,
            t_end=b.time if end < how.steps else 0.0,
            logsnr_start=_logsnr(a),
            logsnr_end=_logsnr(b),
            alignment=alignment.score(latents, pixels, target, caption),
            similarity=float(found.similarity),
            error=float(found.error),
            ratio=float(found.ratio),
        )

    cells = [cell(how.steps, how.steps, path[0], untouched)]
    if swap == "noise":
        fresh = keyed_noise(tuple(clean.shape[1:]), settings.seed, "probe", reference.id)[None].to(clean)
        results = renoised(under(caption), clean, fresh, schedule, how.steps, settings.boundaries, how.order, on_step)
    else:
        results = tampered(under(caption), under(target), path, schedule, settings.boundaries, how.order, on_step)
    for start, end, latents in results:
        cells.append(cell(start, end, latents, backbone.decode(latents)))
    return cells


def _logsnr(place: inversion.Node) -> float:
    if place.sigma == 0.0:
        return math.inf
    return 2.0 * (math.log(place.alpha) - math.log(place.sigma)) if place.alpha > 0.0 else -math.inf


def target_caption(
    caption: str, others: Sequence[str], swap: Swap, subject: Optional[str] = None, motion: Optional[str] = None
) -> str:
    """The caption that is put in: what was asked for, or the words of the first clip that has others.

    Args:
        caption: The clip's own.
        others: Captions of the other clips, those to be taken first in front.
        swap: What is to differ.
        subject: The new subject, where it is given.
        motion: The new motion, where it is given.
    """
    if swap == "noise":
        return caption
    own, place = split_caption(caption), 0 if swap == "subject" else 1
    found = (subject, motion)[place] or next(
        (words for c in others if (words := split_caption(c)[place]) != own[place]), None
    )
    if found is None or found == own[place]:
        raise UsageError(
            f"the caption {caption!r}, and no other {swap} than {own[place]!r}",
            f"--{swap} WORDS, or clips with different ones",
            f'such as --{swap} "{"a robot" if place == 0 else "jumps up and down"}"',
        )
    return join_caption(found, own[1]) if swap == "subject" else join_caption(own[0], found)
