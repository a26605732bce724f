"""A diffusers pipeline directory, read without importing diffusers."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from muybridge.backbones.shipped import shipped_model
from muybridge.errors import UsageError
from muybridge.registry import MODELS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEXT_FILES = ("*.json", "*.txt", "*.model")
"""Configurations, and the vocabularies of tokenizers."""
_WEIGHT_FILES = tuple(
    f"{name}{part}.safetensors" for name in ("diffusion_pytorch_model", "model") for part in ("", "-*")
)
"""Weights as diffusers and transformers load them where no variant is asked for, whole or in parts."""
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.[\w-]+\.(?:safetensors|bin)(?:\.index\.json)?|.+\.index\.[\w-]+\.json"
)


def is_variant(name: str) -> bool:
    """Whether a file holds a component's weights once more, in another precision (``model.fp16.safetensors``).

    Nothing here loads these; what is downloaded, copied and compared passes over them.

    Args:
        name: The file's.
    """
    return _VARIANT.fullmatch(name) is not None


def local_directory(path: str) -> Optional[Path]:
    """The directory of a checkpoint on this machine, or of a model that ships; ``None`` where ``path`` can only be a hub id."""
    local = Path(path).expanduser()
    if (local / "model_index.json").is_file():
        return local
    if local.exists():
        found = sorted(p.name for p in local.iterdir())[:8] if local.is_dir() else ["a file"]
        hint = "give the directory that holds model_index.json"
        if local.is_dir():
            below = sorted(str(p.parent) for p in local.glob("*/model_index.json"))
            if below:
                hint = f"one level down there is one: {below[0]}"
            elif (local / "config.json").is_file():
                hint = f"this is one component of a pipeline; give its parent, {local.parent}"
        raise UsageError(
            f"{path} is no diffusers pipeline (it holds {', '.join(found) or 'nothing'})",
            "a directory with model_index.json, as DiffusionPipeline.save_pretrained writes it",
            hint,
        )
    if path in MODELS:
        return shipped_model(path)
    if not _HUB_ID.fullmatch(path) or path.count("/") != 1:
        raise UsageError(
            f"checkpoint path {path!r} does not exist",
            "a directory with model_index.json, a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or a model that ships"
            f" ({', '.join(MODELS)})",
            f"relative paths are looked up from {Path.cwd()}",
        )
    return None


def _download(repository: str, patterns: list[str], revision: Optional[str] = None) -> Path:
    """The local copy of a hub repository, after those of its files that match were fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{repository!r} is neither a directory here nor a repository that could be fetched"
            f" ({type(error).__name__}; wanted {', '.join(patterns)})",
            "a directory with model_index.json, or a hub id that can be reached",
            f"relative paths are looked up from {Path.cwd()}; offline, download it first and give the directory",
        ) from error


class Checkpoint:
    """The configuration files of a pipeline directory.

    Opening a hub id downloads its configuration files alone; :meth:`fetch` brings the weights of one component when they
    are needed, so a job never waits for encoders that it does not use. (Checking a cache against its encoders uses their
    files, see ``muybridge.data.content``.)

    Args:
        path: A directory with ``model_index.json``, the name of a model that ships, or a hub id.
    """

    def __init__(self, path: str) -> None:
        self.given = path
        local = local_directory(path)
        self.is_local = local is not None
        self.path = local if local is not None else _download(path, list(_TEXT_FILES))
        """The directory; of a hub id, one commit's in the local cache, whose folder names that commit."""
        self._fetched: set[str] = set()

    def fetch(self, *components: str) -> Path:
        """The directory, holding all files of these components. Nothing to do where the checkpoint is a local directory."""
        missing = [c for c in components if not self.is_local and self.has(c) and c not in self._fetched]
        if not missing:
            return self.path
        patterns = [f"{c}/{files}" for c in missing for files in (*_TEXT_FILES, *_WEIGHT_FILES, "*.py")]
        # The commit that the configuration came from: the repository may have moved on since.
        _download(self.given, patterns, revision=self.path.name)
        for component in missing:
            # Offline, the hub's client answers with whatever part of the commit is here.
            folder = self.path / component
            if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
                raise UsageError(
                    f"{self.given} gave no weights for its {component}",
                    f"one of {', '.join(_WEIGHT_FILES)} in the repository's {component}, and a connection to fetch it",
                    "offline, or where it holds *.bin or another precision (fp16) alone: download the repository, save it"
                    " once more with safe_serialization, and give the directory",
                )
        self._fetched.update(missing)
        return self.path

    def read_json(self, *parts: str) -> dict[str, Any]:
        """One of the directory's JSON files."""
        file = self.path.joinpath(*parts)
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{self.given} has no {'/'.join(parts)}",
                "a complete diffusers pipeline directory",
                "download or export the checkpoint again",
            ) from None
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{file} is not valid JSON ({error})", "an unbroken download", "fetch the file again"
            ) from error

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``."""
        return self.read_json("model_index.json")

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers pipeline class."""
        return str(self.index.get("_class_name", ""))

    def has(self, component: str) -> bool:
        """Whether the index names a real component of this name."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def class_of(self, component: str) -> str:
        """Class name of a component."""
        if not self.has(component):
            named = [name for name in self.index if self.has(name)]
            raise UsageError(f"{self.given} has no {component}", f"one of its components: {', '.join(named)}")
        return str(self.index[component][1])

    @property
    def components(self) -> list[str]:
        """Names of all components, also those that are null."""
        return [name for name, entry in self.index.items() if isinstance(entry, list) and len(entry) == 2]

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component."""
        self.class_of(component)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self.read_json(component, name)
