"""What a file or a component of a checkpoint holds, as a short key that is the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from muybridge.backbones.base import Backbone
from muybridge.backbones.checkpoint import is_variant
from muybridge.errors import UsageError

SAMPLES, SAMPLE_BYTES = 16, 64 * 2**10


def content_key(path: str | Path) -> str:
    """Size and digest of a file.

    Files up to 1 MiB are hashed whole; of larger ones, 16 stretches of 64 KiB spread evenly from the first byte to the last.
    That notices every re-encoding and every retrained weight and costs the same for a clip as for 10 GB of weights; an edit
    of a few bytes inside a large file that keeps its size can escape it. Modification times are not used: a copy changes them.
    """
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with open(path, "rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def size_of_key(key: str) -> int:
    """The file size that a content key was made at."""
    return int(key.partition("-")[0])


def text_key(text: str) -> str:
    """Name of a text in a cache."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _component_key(folder: Path) -> str:
    """Digest of a component's configuration (without the notes that libraries leave in it) and of its weights or vocabulary."""
    digest = hashlib.blake2b(digest_size=8)
    found = [sorted(p for p in folder.glob(kind) if not is_variant(p.name)) for kind in ("*.safetensors", "*.bin")]
    weights = found[0] or found[1]
    others = [] if weights else sorted(p for p in folder.iterdir() if p.is_file() and p.name != "config.json")
    if not weights and not others:
        raise UsageError(
            f"{folder} holds no weights",
            "the encoder that a cache was made with: its files are what the cache is checked against",
            "complete the checkpoint",
        )
    config = folder / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        digest.update(json.dumps({k: v for k, v in values.items() if not k.startswith("_")}, sort_keys=True).encode())
    for file in weights or others:
        digest.update(content_key(file).encode())
    return digest.hexdigest()


def latents_key(backbone: Backbone) -> dict[str, object]:
    """All of a backbone that its latents depend on; reads files (a hub id's are fetched to be read), loads nothing."""
    return {
        "family": backbone.family,
        "vae": _component_key(backbone.checkpoint.fetch("vae") / "vae"),
        "vae_dtype": str(backbone.vae_dtype).removeprefix("torch."),
        "vae_tiling": backbone.vae_tiling,
    }


def networks_key(backbone: Backbone) -> dict[str, str]:
    """The denoising networks that a backbone would load; reads files (a hub id's are fetched to be read), loads nothing."""
    names = backbone._present_networks()
    folder = backbone.checkpoint.fetch(*names)
    return {name: _component_key(folder / name) for name in names}


def text_encoder_key(backbone: Backbone) -> dict[str, object]:
    """All of a backbone that its text embeddings depend on; reads files (a hub id's are fetched to be read), loads nothing."""
    checkpoint = backbone.checkpoint
    names = sorted(
        c for c in checkpoint.components if c.startswith(("tokenizer", "text_encoder")) and checkpoint.has(c)
    )
    folder = checkpoint.fetch(*names)
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(f"{name} {_component_key(folder / name)}".encode())
    return {
        "family": backbone.family,
        "text_encoder": digest.hexdigest(),
        "text_dtype": str(backbone.text_dtype).removeprefix("torch."),
        "max_text_length": backbone.max_text_length,
    }
