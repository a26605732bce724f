"""A diffusers pipeline directory, read without importing diffusers."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from muybridge.errors import UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path: str) -> Path:
    """The local directory of a checkpoint: the path itself, or the local copy of a hub id (downloaded where needed)."""
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
    if not _HUB_ID.fullmatch(path) or path.count("/") != 1:
        raise UsageError(
            f"checkpoint path {path!r} does not exist",
            "a directory with model_index.json, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            f"relative paths are looked up from {Path.cwd()}",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{path!r} is neither a directory here nor a repository that could be fetched ({type(error).__name__})",
            "a directory with model_index.json, or a hub id that can be reached",
            f"relative paths are looked up from {Path.cwd()}; offline, download it first and give the directory",
        ) from error


class Checkpoint:
    """The configuration files of a pipeline directory.

    Args:
        path: A directory with ``model_index.json``, or a hub id.
    """

    def __init__(self, path: str) -> None:
        self.given = path
        self.path = resolve(path)

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
