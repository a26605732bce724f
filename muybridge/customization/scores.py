"""How well a clip shows what words say: by CLIP, by the proving ground's reader, or by the model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.customization.references import spoken
from muybridge.diffusion.draws import keyed_noise
from muybridge.errors import UsageError


class Alignment(ABC):
    """How much more a clip shows the target caption than the source caption. Higher is more like the target."""

    name: str

    @abstractmethod
    def score(self, latents: Tensor, pixels: Tensor, target: str, source: str) -> float:
        """One number for one clip.

        Args:
            latents: (1, C, F, H, W).
            pixels: (1, 3, F, H, W) in [-1, 1].
            target: Caption that was put in.
            source: Caption that was there.
        """


class ModelAlignment(Alignment):
    """The model's own opinion: how much better it denoises the clip under the target caption than under the source.

    ``mean (L(source) - L(target)) / mean L(source)`` at a few times and fixed noise, which is what makes a diffusion model a
    classifier. Needs no other weights, but shares the model's faults.

    Args:
        backbone: The model.
        times: Timesteps at which it is asked.
        keep_bar: Give the text encoder captions with their bar.
    """

    name = "model"

    def __init__(
        self, backbone: Backbone, times: tuple[float, ...] = (300.0, 500.0, 700.0), keep_bar: bool = False
    ) -> None:
        self.backbone, self.times, self.keep_bar = backbone, times, keep_bar
        self._text: dict[str, Any] = {}

    def _conditioning(self, caption: str) -> Any:
        if caption not in self._text:
            self._text[caption] = self.backbone.encode_text([spoken(caption, self.keep_bar)])
        return self._text[caption]

    @torch.no_grad()
    def score(self, latents: Tensor, pixels: Tensor, target: str, source: str) -> float:
        schedule, losses = self.backbone.schedule, []
        for i, time in enumerate(self.times):
            t = schedule.snap(torch.full((1,), time, device=latents.device))
            noise = keyed_noise(tuple(latents.shape[1:]), 0, "alignment", i)[None].to(latents)
            noisy, wanted = schedule.add_noise(latents, noise, t), schedule.target(latents, noise, t)
            losses.append(
                [
                    float((self.backbone.denoise(noisy, t, self._conditioning(c)).float() - wanted).square().mean())
                    for c in (source, target)
                ]
            )
        of_source, of_target = torch.tensor(losses, dtype=torch.float64).mean(0).tolist()
        return (of_source - of_target) / of_source


class ClipAlignment(Alignment):
    """CLIP score: mean over frames of the cosine of frame and target caption, times 100, as the papers report.

    Args:
        path: Directory of a CLIP model as transformers saves it (``openai/clip-vit-base-patch32`` for the papers' numbers).
        device: Where it works.
    """

    name = "clip"

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.model = CLIPModel.from_pretrained(path).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = CLIPImageProcessor.from_pretrained(path)
        self.device = device

    @torch.no_grad()
    def score(self, latents: Tensor, pixels: Tensor, target: str, source: str) -> float:
        from muybridge.video import to_frames

        tokens = self.tokenizer([spoken(target)], return_tensors="pt", truncation=True).to(self.device)
        images = self.processor(images=list(to_frames(pixels[0])), return_tensors="pt").to(self.device)
        text = _features(self.model.get_text_features(**tokens))
        frames = _features(self.model.get_image_features(**images))
        return 100.0 * float((frames @ text.T).mean())


def _features(found: Any) -> Tensor:
    # transformers 5 gives an output object where earlier ones gave the tensor.
    tensor: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return tensor / tensor.norm(dim=-1, keepdim=True)


class ReaderAlignment(Alignment):
    """On the proving ground: whether shape, colour and motion are read as the target caption says, their mean.

    Only what the two captions differ in counts, so that what stays the same adds nothing.
    """

    name = "reader"

    def __init__(self) -> None:
        from muybridge.proving_ground.reader import Reader

        self.reader = Reader.shipped()

    def score(self, latents: Tensor, pixels: Tensor, target: str, source: str) -> float:
        from muybridge.metrics.reading import asked
        from muybridge.video import to_frames

        want, had = asked(target), asked(source)
        read = self.reader.read([to_frames(pixels[0])])[0]
        different = [key for key in want if want[key] != had[key]] or list(want)
        return sum(float(getattr(read, key) == want[key]) for key in different) / len(different)


ALIGNMENTS = ("model", "clip", "reader")
"""Names of what ``muybridge probe --alignment`` takes."""


def check_alignment(name: str, clip_model: str | None, captions: Iterable[str]) -> None:
    """Refuse what a scorer of that name could not work with, before anything is loaded.

    Args:
        name: One of :data:`ALIGNMENTS`.
        clip_model: Directory of a CLIP model, where one is given.
        captions: All that it will be asked about.
    """
    if name not in ALIGNMENTS:
        raise UsageError(f"alignment is {name!r}", f"one of {', '.join(ALIGNMENTS)}")
    if name == "clip" and clip_model is None:
        raise UsageError(
            "alignment clip without a CLIP model", "--clip_model DIR", "or --alignment model, which needs none"
        )
    if name == "clip" and not (Path(str(clip_model)) / "config.json").is_file():
        raise UsageError(
            f"there is no CLIP model at {clip_model}",
            "a directory with config.json, model.safetensors, the tokenizer and preprocessor_config.json",
            "save openai/clip-vit-base-patch32 there, or take --alignment model, which needs none",
        )
    if name == "reader":
        from muybridge.metrics.reading import asked

        for caption in captions:
            asked(caption)


def make_alignment(name: str, backbone: Backbone, clip_model: str | None, keep_bar: bool) -> Alignment:
    """The scorer of that name; refuses what it lacks."""
    check_alignment(name, clip_model, ())
    if name == "clip":
        return ClipAlignment(str(clip_model), backbone.device)
    return ReaderAlignment() if name == "reader" else ModelAlignment(backbone, keep_bar=keep_bar)
