"""Which clips of a source are trained on, and how often: lists of ids in files, sampling weights, repeats."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError
from muybridge.whole import whole

_META = b"muybridge"
KINDS = "a .txt file with one id a line, or a .csv or .parquet file with a column id"


@dataclass(frozen=True)
class Selection:
    """Some clips of a source.

    Args:
        path: The file it was read from.
        ids: Their ids, each once.
        weights: How often each is drawn, relative to the others; ``None`` where the file has no column ``weight``.
        meta: What the file says of how it was made.
    """

    path: str
    ids: list[str]
    weights: Optional[list[float]] = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def write_selection(
    path: str | Path,
    ids: Sequence[str],
    weights: Optional[Sequence[float]] = None,
    meta: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write a selection as Parquet, whole or not at all.

    Args:
        path: Where to; the suffix should be ``.parquet``.
        ids: The clips, best first where they are ranked.
        weights: Sampling weights.
        meta: What :attr:`Selection.meta` gives back: how it was made, as plain values.
    """
    path = Path(path)
    if weights is not None and len(weights) != len(ids):
        raise ValueError(f"{len(ids)} ids and {len(weights)} weights")
    _check(str(path), list(ids), list(weights) if weights is not None else None)
    columns: dict[str, Any] = {"id": pa.array(list(ids), pa.string())}
    if weights is not None:
        columns["weight"] = pa.array([float(w) for w in weights], pa.float64())
    table = pa.table(columns).replace_schema_metadata({_META: json.dumps(dict(meta or {}))})
    with whole(path) as temporary:
        pq.write_table(table, temporary)
    return path


def read_selection(path: str | Path) -> Selection:
    """Read a selection: Parquet or CSV with a column ``id`` and optionally ``weight``, or a text file with one id a line."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"selection {path} does not exist", KINDS, f"relative paths are looked up from {Path.cwd()}")
    meta: Mapping[str, Any] = {}
    if file.suffix == ".parquet":
        ids, weights, meta = _read_parquet(file)
    elif file.suffix == ".csv":
        ids, weights = _read_csv(file)
    elif file.suffix == ".txt":
        ids, weights = [line.strip() for line in _text(file).splitlines() if line.strip()], None
    else:
        raise UsageError(f"selection {path}", KINDS)
    _check(str(path), ids, weights)
    return Selection(str(path), ids, weights, meta)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})", "a UTF-8 text file") from error


def _read_csv(file: Path) -> tuple[list[str], Optional[list[float]]]:
    rows = csv.DictReader(_text(file).splitlines())
    names = rows.fieldnames or []
    if "id" not in names:
        raise UsageError(f"{file} has the columns {', '.join(names) or '(none)'}", "a column id")
    ids, weights = [], []
    for row in rows:
        ids.append(row["id"])
        if "weight" in names:
            try:
                weights.append(float(row["weight"]))
            except (TypeError, ValueError) as error:
                raise UsageError(f"{file}, line {rows.line_num}: weight is {row['weight']!r}", "a number") from error
    return ids, weights if "weight" in names else None


def _read_parquet(file: Path) -> tuple[list[str], Optional[list[float]], Mapping[str, Any]]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{file} can't be read as Parquet ({error})", "a complete Parquet file") from error
    if "id" not in table.column_names:
        raise UsageError(f"{file} has the columns {', '.join(table.column_names)}", "a column id")
    weights = None
    if "weight" in table.column_names:
        column = table["weight"]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)) or column.null_count:
            raise UsageError(
                f"{file}: column weight holds {column.type}, {column.null_count} of them empty", "a number for each id"
            )
        weights = [float(w) for w in column.to_pylist()]
    meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    return [str(i) for i in table["id"].to_pylist()], weights, meta


def _check(path: str, ids: list[str], weights: Optional[list[float]]) -> None:
    if not ids:
        raise UsageError(f"selection {path} is empty", "at least one id")
    seen: dict[str, int] = {}
    for name in ids:
        seen[name] = seen.get(name, 0) + 1
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        raise UsageError(
            f"selection {path} names {len(twice)} ids more than once, such as {', '.join(twice[:3])}",
            "every id once",
            "to train on clips several times, set repeats, or give them a larger weight",
        )
    if weights is not None:
        check_weights(path, weights)


def check_weights(path: str, weights: Sequence[float]) -> None:
    """Refuse weights that no draw can follow."""
    wrong = [w for w in weights if not (math.isfinite(w) and w >= 0)]
    if wrong:
        raise UsageError(
            f"{path}: {len(wrong)} of {len(weights)} weights are negative or not finite, such as {wrong[0]}",
            "0 or more",
        )
    if not any(weights):
        raise UsageError(f"{path}: all {len(weights)} weights are 0", "at least one above 0")


def _refuse_unknown(path: str, named: Iterable[str], known: set[str]) -> None:
    unknown = [name for name in named if name not in known]
    if not unknown:
        return
    whole = [u for u in unknown if "@" not in u and any(k.startswith(f"{u}@") for k in known)]
    cut = [u for u in unknown if "@" in u and u.rpartition("@")[0] in known]
    hint = f"ids of this source look like {', '.join(sorted(known)[:3])}"
    if whole:
        example = min(k for k in known if k.startswith(f"{whole[0]}@"))
        hint = f"{whole[0]} is a whole video, and this source cuts it into clips such as {example}: name the clips"
    elif cut:
        hint = f"{cut[0]} is a part of a video, and this source takes {cut[0].rpartition('@')[0]} whole: use the same windows"
    raise UsageError(
        f"{path} names {len(unknown)} ids that the source lacks, such as {', '.join(unknown[:3])}",
        "ids of the source",
        hint,
    )


def restrict(selection: Selection, ids: Sequence[str]) -> list[int]:
    """Places of the selected clips in a source, in the source's order.

    Args:
        selection: What is wanted; ids match whole or not at all.
        ids: All clips of the source.
    """
    wanted = set(selection.ids)
    _refuse_unknown(f"selection {selection.path}", selection.ids, set(ids))
    return [place for place, name in enumerate(ids) if name in wanted]


def weights_for(selection: Selection, ids: Sequence[str]) -> list[float]:
    """The weight of each clip that is trained on.

    Args:
        selection: With weights: a selection with a column ``weight``, or a file of weights alone. It may name more clips than are
            trained on.
        ids: The clips that are trained on.
    """
    if selection.weights is None:
        raise UsageError(f"{selection.path} has no weights", "a .csv or .parquet file with columns id and weight")
    table = dict(zip(selection.ids, selection.weights, strict=True))
    missing = [name for name in ids if name not in table]
    if missing:
        raise UsageError(
            f"{selection.path} has no weight for {len(missing)} of {len(ids)} clips, such as {', '.join(missing[:3])}",
            "a weight for every clip that is trained on",
            "give them the weight 0, or leave them out by a selection",
        )
    weights = [table[name] for name in ids]
    check_weights(selection.path, weights)
    return weights


@dataclass(frozen=True)
class Plan:
    """What an epoch consists of.

    Args:
        places: Places in the source, each as often as it is in the epoch.
        weights: One for each place where the epoch is drawn with replacement; ``None`` where every place comes once.
    """

    places: list[int]
    weights: Optional[list[float]] = None


def plan(
    ids: Sequence[str], selection: Optional[str] = None, sampling_weights: Optional[str] = None, repeats: int = 1
) -> Plan:
    """The epoch that a datamodule's options ask for.

    Args:
        ids: All clips of the source.
        selection: File of the ids that are trained on; all of them where not given.
        sampling_weights: File of weights; the selection's own column ``weight`` where not given, and none where there is none.
        repeats: How often the clips stand in one epoch.
    """
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}", "1 or more")
    chosen = read_selection(selection) if selection is not None else None
    places = list(range(len(ids))) if chosen is None else restrict(chosen, ids)
    weighing = read_selection(sampling_weights) if sampling_weights is not None else chosen
    weights = None
    if weighing is not None and (weighing.weights is not None or sampling_weights is not None):
        weights = weights_for(weighing, [ids[place] for place in places]) * repeats
    return Plan(places * repeats, weights)


def weighted_order(weights: Sequence[float], count: int, seed: int, epoch: int) -> list[int]:
    """``count`` places drawn with replacement, each with probability ``weight / sum``; a function of (seed, epoch) alone."""
    steps = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    u = torch.rand(count, dtype=torch.float64, generator=keyed_generator(seed, "weighted", epoch)) * steps[-1]
    # Right of its own step and of every empty one, so that a weight of 0 is never drawn; rounding may not leave the end.
    last = int(torch.tensor(weights, dtype=torch.float64).nonzero().max())
    return torch.searchsorted(steps, u, right=True).clamp(max=last).tolist()
