"""Models that come with the package, by the name that a backbone's path may be."""

from __future__ import annotations

from pathlib import Path

import muybridge
from muybridge.errors import UsageError
from muybridge.registry import MODELS

PACKAGE = Path(muybridge.__file__).resolve().parent
"""Where the package lies."""


def shipped_model(name: str = "proving-ground") -> Path:
    """The pipeline directory of a model that ships.

    Args:
        name: One of ``muybridge list models``.

    Raises:
        UsageError: Where there is no such model, or this build was made without its weights.
    """
    if name not in MODELS:
        raise UsageError(f"no model {name!r} ships", f"one of {', '.join(MODELS)}", "muybridge list models")
    directory = PACKAGE / MODELS[name].folder
    if not (directory / "model_index.json").is_file():
        raise UsageError(
            f"the model {name} is not in this build: {directory} holds no model_index.json",
            "an install that ships it",
            "give the directory of a pipeline instead; docs/proving-ground.md says how this one is trained",
        )
    return directory
