"""Prompts without videos: what ``predict`` samples, and what data-free distillation trains on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from torch.utils.data import DataLoader, Dataset

from datamodules.base import ResumableData
from muybridge.batch import Batch
from muybridge.data.cache import Cache
from muybridge.data.encoding import Material
from muybridge.errors import UsageError


def read_prompts(path: str) -> tuple[list[str], list[str]]:
    """Ids and prompts of a text file (one prompt a line) or a JSONL file (``prompt`` or ``caption``, and ``id`` where given)."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(
            f"prompt file {path} does not exist",
            "a .txt or .jsonl file",
            f"relative paths are looked up from {Path.cwd()}",
        )
    try:
        # Not splitlines(): a prompt may hold one of the rarer line separators.
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "a UTF-8 text file") from error
    blank = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        where = "nothing" if lines == [""] else f"blank lines: {', '.join(map(str, blank[:5]))}"
        raise UsageError(
            f"{path} holds {where}",
            "one prompt a line, none empty",
            "remove them (an empty prompt would be sampled like any other)",
        )
    if file.suffix != ".jsonl":
        prompts = [line.strip() for line in lines]
        return [prompt_id(i, p) for i, p in enumerate(prompts)], prompts
    ids, prompts = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt = str(entry["prompt"] if "prompt" in entry else entry["caption"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: {type(error).__name__} {error}", 'lines such as {"prompt": "a dog runs"}'
            ) from error
        ids.append(str(entry["id"]) if "id" in entry else prompt_id(number - 1, prompt))
        prompts.append(prompt)
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise UsageError(f"{path} has {len(twice)} ids more than once, such as {', '.join(twice[:3])}", "every id once")
    return ids, prompts


def prompt_id(index: int, prompt: str) -> str:
    """A file name for a prompt: its number and its first words."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{index:04d}-{words}" if words else f"{index:04d}"


class PromptDataset(Dataset[Batch]):
    """Ids and prompts as batches of one.

    Args:
        ids: A name for each.
        prompts: The texts.
        cache: Where their embeddings are, if anywhere.
    """

    def __init__(self, ids: Sequence[str], prompts: Sequence[str], cache: Optional[Cache] = None) -> None:
        self.ids, self.prompts, self.cache = list(ids), list(prompts), cache

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        prompt = self.prompts[index]
        text = None if self.cache is None else self.cache.text(prompt)
        return Batch(ids=[self.ids[index]], prompts=[prompt], conditioning=text)


class PromptData(ResumableData):
    """Prompts without videos: to sample, or to distil a model without data.

    Args:
        prompts: A text file with one prompt a line, or a JSONL file with ``prompt`` (and ``id``, if you have one) in every line.
        texts: The prompts themselves, instead of a file.
        cache: A cache that holds their embeddings, so that no text encoder is loaded.
        batch_size: Prompts of a micro-batch, on every rank.
        num_workers: Processes that read, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
    """

    def __init__(
        self,
        prompts: Optional[str] = None,
        texts: Optional[list[str]] = None,
        cache: Optional[str] = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if (prompts is None) == (texts is None):
            raise UsageError(
                "prompts and texts: " + ("neither is" if prompts is None else "both are") + " given", "one of them"
            )
        if texts is not None:
            self.ids, self.texts = [prompt_id(i, p) for i, p in enumerate(texts)], list(texts)
        else:
            self.ids, self.texts = read_prompts(str(prompts))
        if not self.texts:
            raise UsageError("texts is empty", "at least one prompt")
        self.cache_path = cache
        self.cache: Optional[Cache] = None

    def setup(self, stage: str) -> None:
        """Open the cache."""
        if self.cache_path is not None and self.cache is None:
            self.cache = Cache(self.cache_path)
            self.cache.check_texts(self.texts)

    def to_cache(self) -> Material:
        """What ``muybridge cache`` encodes: the prompts."""
        return Material(texts=self.texts)

    def train_dataset(self) -> PromptDataset:
        return PromptDataset(self.ids, self.texts, self.cache)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts in their order."""
        return self.evaluation_loader(self.train_dataset())
