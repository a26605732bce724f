"""Caches of clips that are a function of their number, made without the command."""

from __future__ import annotations

from pathlib import Path

import torch

from muybridge.backbones.base import Backbone
from muybridge.batch import Batch
from muybridge.data.cache import (
    Cache,
    add_clip,
    add_renamed,
    add_text,
    add_unconditional,
    open_column,
    todo_clips,
    todo_texts,
)
from muybridge.data.clips import Clip
from muybridge.data.content import latents_key, text_encoder_key
from muybridge.diffusion.draws import keyed_noise

SIZE = (9, 16, 16)
PREPROCESSING = {"frames": 9, "height": 16, "width": 16, "fps": 8.0}


def make_clips(folder: Path, count: int = 4) -> list[Clip]:
    """Files with a few bytes in the place of videos, and captions that repeat after three."""
    clips = []
    for i in range(count):
        path = folder / f"clip-{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"video {i}".encode())
        clips.append(Clip(id=f"clip-{i}", path=path, caption=f"a dog number {i % 3}"))
    return clips


def pixels(clip: Clip) -> torch.Tensor:
    return keyed_noise((3, *SIZE), 0, clip.id).clamp(-1, 1)[None]


def make_cache(out: Path, backbone: Backbone, clips: list[Clip], **options: int) -> Path:
    """Encode what is missing."""
    with open_column(out, "text", text_encoder_key(backbone)) as writer:
        add_unconditional(writer, backbone)
        for text in todo_texts(out, [c.caption or "" for c in clips]):
            add_text(writer, backbone, text)
    with open_column(out, "latents", latents_key(backbone), PREPROCESSING, **options) as writer:
        todo, renamed = todo_clips(out, clips)
        for place in renamed:
            add_renamed(writer, Cache(out).latents, clips[place], place)
        for place in todo:
            clip = clips[place]
            add_clip(writer, backbone, clip, place, Batch(ids=[clip.id], pixels=pixels(clip), fps=8.0))
    return out
