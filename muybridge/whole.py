"""Files that are whole or not there: written under a temporary name beside their own, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path, suffix: bool = False) -> Iterator[Path]:
    """Where to write what is to have this name once all of it is there; after an error nothing of it is left.

    The temporary name begins with a dot, which readers of folders pass over, and is this process's own: of two that write the
    same file, the later one's stays.

    Args:
        path: The name; folders that it is in are made.
        suffix: Whether the temporary name ends like the name, for writers that choose a format by it. Others look like no file
            of that kind, also to who lists a folder by suffix.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    ending = target.suffix if suffix else ".partial"
    # The number of a process is its own on one machine only.
    own = f"{os.getpid()}-{uuid.uuid4().hex}"
    temporary = target.with_name(f".{target.stem if suffix else target.name}.{own}{ending}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """A text file in UTF-8, its line ends as given."""
    with whole(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    return Path(path)
