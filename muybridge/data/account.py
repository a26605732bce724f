"""What became of the clips that were read: how many, which were skipped, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muybridge.errors import UsageError
from muybridge.whole import whole

FILE = "bad_videos.jsonl"


class BadVideo(Exception):
    """A clip that can't be used; the message is the reason, fit for a report."""


@dataclass
class Account:
    """Clips seen, and what there is to say of some of them.

    Args:
        seen: Clips asked for, each as often as it was.
        skipped: How many of them were skipped.
        reasons: Why, by id.
        remarks: What there is to say of clips that were read all the same, by id.
    """

    seen: int = 0
    skipped: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def see(self, ids: Sequence[str], present: Sequence[bool], remarks: Sequence[str]) -> list[str]:
        """Count a batch; returns the ids that are skipped for the first time.

        Args:
            ids: The clips.
            present: Which of them are there.
            remarks: What there is to say of each: for a skipped one the reason, for others mostly nothing.
        """
        self.seen += len(ids)
        new = []
        for name, there, remark in zip(ids, present, remarks, strict=True):
            if not there:
                self.skipped += 1
                if name not in self.reasons:
                    self.reasons[name] = remark
                    new.append(name)
            elif remark:
                self.remarks.setdefault(name, remark)
        return new

    def __add__(self, other: Account) -> Account:
        """Both together, such as of two ranks."""
        return Account(
            self.seen + other.seen,
            self.skipped + other.skipped,
            {**self.reasons, **other.reasons},
            {**self.remarks, **other.remarks},
        )

    def summary(self) -> str:
        """One line: how many were skipped, and the commonest kinds of reason."""
        if not self.skipped:
            return f"all {self.seen} clips could be read"
        kinds = Counter(kind(reason) for reason in self.reasons.values())
        listed = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
        return f"{self.skipped} of {self.seen} clips skipped ({self.skipped / self.seen:.1%}): {listed}"

    def too_many(self, fraction: float, least: int = 1) -> bool:
        """Whether more than a fraction of the clips was skipped, of ``least`` or more."""
        return self.seen >= least and self.skipped > fraction * self.seen


def kind(reason: str) -> str:
    """What a reason says before its details: reasons are written as ``kind: details``."""
    return reason.partition(":")[0]


def refuse(account: Account, fraction: float, where: str) -> UsageError:
    """The error that ends a run with too many bad clips."""
    examples = "; ".join(f"{name} ({reason})" for name, reason in list(account.reasons.items())[:3])
    return UsageError(
        f"{account.summary()}, such as {examples}",
        f"at most {fraction:.1%} (max_bad_fraction)",
        f"mend or remove the files listed in {where}, or raise max_bad_fraction",
    )


# -- the file ------------------------------------------------------------------------------------------------------


def line(name: str, path: str, reason: str) -> str:
    """One line of the file."""
    return json.dumps({"id": name, "path": path, "reason": reason}, ensure_ascii=False) + "\n"


def append(file: Path, lines: Iterable[str]) -> None:
    """Add lines at once. Every file has one process that writes it."""
    data = "".join(lines).encode("utf-8", "backslashreplace")
    if not data:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as handle:
        handle.write(data)


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a file; none where there is no file. The last line counts once it is whole."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(text) for text in whole.splitlines()]


def merge(file: Path, reasons: Mapping[str, str], paths: Mapping[str, str]) -> None:
    """Write the file anew with every (id, reason) once: those it holds and these.

    Args:
        file: The file.
        reasons: Why clips were skipped, by id.
        paths: The file of each clip.
    """
    rows = [(str(e.get("id")), str(e.get("path")), str(e.get("reason"))) for e in read(file)]
    rows += [(name, paths.get(name, ""), reason) for name, reason in reasons.items()]
    unique = {(name, reason): line(name, path, reason) for name, path, reason in rows}
    if not unique:
        return
    with whole(file) as temporary:
        temporary.write_bytes("".join(unique.values()).encode("utf-8", "backslashreplace"))
