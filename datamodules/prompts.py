"""Prompts without videos: what ``predict`` samples, and what data-free distillation trains on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Optional

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from datamodules.collate import collate
from muybridge.batch import Batch
from muybridge.errors import UsageError


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file (one a line) or a JSONL file (``prompt`` or ``caption`` in every line)."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"prompt file {path} does not exist", "a .txt or .jsonl file", f"relative paths are looked up from {Path.cwd()}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "a UTF-8 text file") from error
    blank = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if blank or not lines:
        where = f"blank lines: {', '.join(map(str, blank[:5]))}" if blank else "nothing"
        raise UsageError(
            f"{path} holds {where}", "one prompt a line, none empty", "remove them (an empty prompt would be sampled like any other)"
        )
    if file.suffix != ".jsonl":
        return [line.strip() for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompts.append(str(entry["prompt"] if "prompt" in entry else entry["caption"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: {type(error).__name__} {error}", 'lines such as {"prompt": "a dog runs"}') from error
    return prompts


def prompt_id(index: int, prompt: str) -> str:
    """A file name for a prompt: its number and its first words."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{index:04d}-{words}" if words else f"{index:04d}"


class PromptDataset(Dataset[Batch]):
    """Ids and prompts as batches of one.

    Args:
        ids: A name for each.
        prompts: The texts.
    """

    def __init__(self, ids: list[str], prompts: list[str]) -> None:
        self.ids, self.prompts = ids, prompts

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        return Batch(ids=[self.ids[index]], prompts=[self.prompts[index]])


class PromptData(pl.LightningDataModule):
    """Prompts to sample.

    Args:
        prompts: A text file with one prompt a line, or a JSONL file with ``prompt`` in every line.
        texts: The prompts themselves, instead of a file.
        batch_size: Clips sampled at once, on every rank.
    """

    def __init__(self, prompts: Optional[str] = None, texts: Optional[list[str]] = None, batch_size: int = 1) -> None:
        super().__init__()
        if (prompts is None) == (texts is None):
            raise UsageError("prompts and texts: " + ("neither is" if prompts is None else "both are") + " given", "one of them")
        self.texts = texts if texts is not None else read_prompts(str(prompts))
        if not self.texts:
            raise UsageError("texts is empty", "at least one prompt")
        self.batch_size = batch_size

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The prompts in their order."""
        ids = [prompt_id(i, p) for i, p in enumerate(self.texts)]
        return DataLoader(PromptDataset(ids, self.texts), batch_size=self.batch_size, collate_fn=collate)
