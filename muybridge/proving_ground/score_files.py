"""The judge's table as a file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from muybridge.errors import UsageError
from muybridge.proving_ground.scoring import Row, Scores
from muybridge.whole import write_text


def write_scores(path: str | Path, scores: Scores) -> Path:
    """A JSON file: the summary for those who read it, then all rows and features."""
    held = {
        "summary": {name: estimate._asdict() for name, estimate in scores.summary.items()},
        "rows": scores.table(),
        "features": [[round(float(x), 5) for x in feature] for feature in scores.features],
    }
    return write_text(path, json.dumps(held) + "\n")


def read_scores(path: str | Path) -> Scores:
    """What :func:`write_scores` wrote."""
    file = Path(path)
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Row)}
        rows = tuple(Row(**{name: value for name, value in row.items() if name in known}) for row in held["rows"])
        return Scores(rows, np.asarray(held["features"], np.float32))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} is no table of the judge ({type(error).__name__})", "a file that `muybridge judge --out` wrote"
        ) from error
