"""Do attention maps know motion? Clips are searched for by their maps, and found are those with the same motion, or not.

The clips' motions are known by the words of their captions. The network is given the subject alone, so that the text can't
tell the motion, and one noise for all clips, so that the noise can't either.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from muybridge.backbones.attention import AttentionRecord
from muybridge.backbones.base import Backbone
from muybridge.backbones.taps import AttentionTap
from muybridge.customization.references import Reference
from muybridge.diffusion.draws import keyed_noise
from muybridge.errors import UsageError
from muybridge.losses.frozen_attention import in_order

SIDE = 8
"""Places are averaged to at most so many along each side of the picture, so that descriptors stay small."""


class Key(NamedTuple):
    """What clips are searched by.

    Args:
        what: ``temporal``, ``cross``, ``both``, ``latents`` or ``pixels``.
        layer: Name of the attention module; ``all`` for all of them together, and for what has no layers.
        time: The noise level as a timestep; 0 for what is not noised.
    """

    what: str
    layer: str
    time: float


def _pooled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(places, …) averaged to at most SIDE x SIDE places, flat."""
    height, width = grid
    planes = x.reshape(height, width, -1).permute(2, 0, 1)
    return F.adaptive_avg_pool2d(planes, (min(height, SIDE), min(width, SIDE))).flatten()


def describe_record(record: AttentionRecord) -> dict[str, Tensor]:
    """The maps of one layer of one clip, flat: of attention over frames, of attention to text, or of both."""
    assert record.grid is not None
    frames, height, width = record.grid
    found = {}
    if record.role in ("factorised", "unified"):
        found["temporal"] = _pooled(record.same_site_map()[0].mean(1), (height, width))
    if record.role == "cross" or (record.role == "unified" and record.text is not None):
        among = record.cross_map(among_text=True)[0].mean(0).unflatten(0, (frames, height * width))
        found["cross"] = _pooled(among.transpose(0, 1), (height, width))
    return found


@torch.no_grad()
def describe(backbone: Backbone, reference: Reference, times: Sequence[float], seed: int = 0) -> dict[Key, Tensor]:
    """All descriptors of one clip: of its maps at some noise levels, and of its latents and pixels to compare with.

    Args:
        backbone: With its network loaded.
        reference: The clip; its caption's subject is the prompt.
        times: Noise levels as timesteps.
        seed: Of the one noise of all clips.
    """
    clean = backbone.encode(reference.pixels[None].to(backbone.device))
    pixels = F.adaptive_avg_pool3d(reference.pixels, (reference.pixels.shape[1], 4 * SIDE, 4 * SIDE))
    found = {Key("latents", "all", 0.0): clean.flatten().cpu(), Key("pixels", "all", 0.0): pixels.flatten()}
    text = backbone.encode_text([reference.subject])
    for time in times:
        t = backbone.schedule.snap(torch.full((1,), time, device=clean.device))
        noise = keyed_noise(tuple(clean.shape[1:]), seed, "retrieval", round(time))[None].to(clean)
        noisy = backbone.schedule.add_noise(clean, noise, t)
        tap = AttentionTap(backbone, kind=("temporal", "cross"))
        tap.run(functools.partial(backbone.denoise, noisy, t, text))
        for record in tap.records:
            for what, vector in describe_record(record).items():
                found[Key(what, record.name, time)] = vector.float().cpu()
        found[Key("noisy latents", "all", time)] = noisy.flatten().cpu()
    return found


def average_precision(similarity: Tensor, same: Tensor) -> Optional[float]:
    """Mean over queries of the average precision with which the others are ranked; None where no query has a like.

    Args:
        similarity: (N, N).
        same: (N, N), whether two clips have the same motion.
    """
    values = []
    count = len(similarity)
    for query in range(count):
        others = [i for i in range(count) if i != query]
        relevant = same[query, others]
        if not bool(relevant.any()):
            continue
        order = similarity[query, others].argsort(descending=True, stable=True)
        hits = relevant[order].double()
        precision = hits.cumsum(0) / torch.arange(1, count, dtype=torch.float64)
        values.append(float((precision * hits).sum() / hits.sum()))
    return sum(values) / len(values) if values else None


def similarity_of(vectors: Tensor) -> Tensor:
    """Cosines of clips' vectors (N, D) less their mean: what all clips share says nothing of any."""
    centred = vectors.double() - vectors.double().mean(0)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.T


def retrieve(described: Sequence[dict[Key, Tensor]], motions: Sequence[str], seed: int = 0) -> dict[Key, float]:
    """The average precision of every key; of all layers together, of temporal and cross maps together, and of chance too.

    Args:
        described: Of every clip, the same keys.
        motions: What each clip shows.
        seed: Of the random ranking that tells chance.
    """
    same = torch.tensor([[a == b for b in motions] for a in motions])
    if int(same.sum()) == len(motions):
        raise UsageError(
            f"{len(motions)} clips of {len(set(motions))} motions",
            "at least two clips of some motion",
            "give more clips",
        )
    if bool(same.all()):
        raise UsageError(f"all clips show {motions[0]!r}", "clips of several motions", "there is nothing to tell apart")
    similarities = {key: similarity_of(torch.stack([d[key] for d in described])) for key in described[0]}
    for time in sorted({key.time for key in similarities}):
        parts = {}
        for what in ("temporal", "cross"):
            layers = [s for k, s in similarities.items() if (k.what, k.time) == (what, time) and k.layer != "all"]
            if layers:
                parts[what] = torch.stack(layers).mean(0)
                similarities[Key(what, "all", time)] = parts[what]
        if len(parts) == 2:
            similarities[Key("both", "all", time)] = (parts["temporal"] + parts["cross"]) / 2.0
    generator = torch.Generator().manual_seed(seed)
    draws = [average_precision(torch.rand(same.shape, generator=generator), same) or 0.0 for _ in range(50)]
    scores = {key: average_precision(value, same) or 0.0 for key, value in similarities.items()}
    return {**scores, Key("chance", "all", 0.0): sum(draws) / len(draws)}


def best_layers(
    scores: dict[Key, float], what: str = "temporal", share: float = 0.8, t_min: float = 500.0
) -> list[str]:
    """The layers whose maps know motion nearly as well as the best one's, in the order in which they run.

    Args:
        scores: What :func:`retrieve` gave.
        what: Of which maps.
        share: How much of the best layer's gain over chance a layer must have.
        t_min: Noise levels below it do not count; those at it do.
    """
    chance = scores[Key("chance", "all", 0.0)]
    by_layer: dict[str, list[float]] = {}
    for key, score in scores.items():
        if key.what == what and key.layer != "all" and key.time >= t_min:
            by_layer.setdefault(key.layer, []).append(score)
    means = {layer: sum(values) / len(values) for layer, values in by_layer.items()}
    if not means or max(means.values()) <= chance:
        return []
    least = chance + share * (max(means.values()) - chance)
    return in_order([layer for layer, mean in means.items() if mean >= least])


def as_regex(layers: Sequence[str]) -> str:
    """A full-match regex of these layers, for ``MotionFeatureMatching``'s ``layers``."""
    return "|".join(re.escape(layer) for layer in layers)
