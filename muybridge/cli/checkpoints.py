"""What ``--ckpt_path`` means: a file, a sharded folder, ``last`` or ``best``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

from muybridge.cli.front import rank
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint file, or a folder of shards (which has a ``.metadata`` or a ``meta.pt``)."""
    if path.is_dir():
        return (path / ".metadata").is_file() or (path / "meta.pt").is_file()
    return path.is_file() and path.suffix == ".ckpt"


def run_of(config: Path) -> Optional[Path]:
    """The folder of the run that wrote this config file, where a run did."""
    if config.name != "config.yaml" or not config.is_file():
        return None
    with open(config, encoding="utf-8") as file:
        return config.resolve().parent if file.readline().startswith("# muybridge ") else None


def folders(trainer: Any, run: Optional[Path] = None) -> list[Path]:
    """Where checkpoints lie: the ``dirpath`` of each ModelCheckpoint, else all below the folder of the run, or of all runs."""
    named = [Path(c.dirpath) for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]
    return named or [run if run is not None else Path(trainer.default_root_dir)]


def left_early(trainer: Any, resuming: bool, run: Optional[Path]) -> list[Path]:
    """Where callbacks.Preemption leaves what is to be gone on with, which may be beside the runs: each attempt is a run.

    Asked for one run, a verb that does not go on with it means that run alone.
    """
    from callbacks.preemption import Preemption

    if run is not None and not resuming:
        return []
    told = [Path(c.dirpath) for c in trainer.callbacks if isinstance(c, Preemption) and c.dirpath]
    return [*told, *([Path(trainer.default_root_dir)] if run is not None else [])]


def written(places: Sequence[Path]) -> list[Path]:
    """All checkpoints in or below some folders, oldest first."""
    found = {p for place in places if place.is_dir() for p in place.rglob("*.ckpt") if is_checkpoint(p)}
    return sorted(found, key=age)


def age(path: Path) -> tuple[int, str]:
    """To sort by: the newest last."""
    return path.stat().st_mtime_ns, str(path)


@contextmanager
def one_file(given: Optional[str], beside: str | Path) -> Iterator[Optional[str]]:
    """A checkpoint as one file: the folder of a sharded one is put together next to ``beside``, and that file goes away again.

    Args:
        given: A file or a folder; ``None`` stays ``None``.
        beside: A path whose directory is written to.
    """
    if given is None or not Path(given).is_dir():
        yield given
        return
    from lightning_modules.parallel import consolidate

    whole = Path(beside).absolute()
    merged = whole.with_name(f".{whole.name}.{os.getpid()}.ckpt")
    try:
        yield str(consolidate(given, merged))
    finally:
        merged.unlink(missing_ok=True)


def say(text: str) -> None:
    """Tell the user once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)


def resolve(given: Optional[str], trainer: Any, resuming: bool = False, run: Optional[Path] = None) -> Optional[str]:
    """The checkpoint that was asked for.

    Lightning looks for ``last`` only where this very run would write, knows ``best`` only within the process that trained,
    and starts from nothing where it finds none. Here both mean what earlier runs of the same configuration left.

    Args:
        given: What the user wrote.
        trainer: Whose callbacks say where checkpoints lie.
        resuming: In ``fit``, ``last`` before the first checkpoint means the beginning, so that one command line both starts
            a run and continues it.
        run: Folder of the one run that is meant, where its own ``config.yaml`` was given.
    """
    if given is None:
        return None
    if given not in ("last", "best"):
        return _existing(given)
    places = folders(trainer, run)
    found = written(places)
    beside = left_early(trainer, resuming, run)
    left = [p for place in beside for p in place.glob("preempted-*.ckpt") if is_checkpoint(p)]
    found = sorted({*found, *left}, key=age)
    if not found:
        where = ", ".join(dict.fromkeys(map(str, [*places, *beside])))
        if given == "last" and resuming:
            say(f"ckpt_path last: no checkpoint in {where} yet, starting from the beginning")
            return None
        raise UsageError(
            f"ckpt_path {given}: no checkpoint in {where}", "a run that has written one", "give the path of a file"
        )
    chosen = found[-1] if given == "last" else _best(found, trainer)
    say(f"ckpt_path {given}: {chosen}")
    return str(chosen)


def refuse_folder(path: str, trainer: Any) -> None:
    """Stop if a sharded checkpoint meets a strategy that reads files."""
    if Path(path).is_dir() and not hasattr(trainer.strategy, "_save_distributed_checkpoint"):
        raise UsageError(
            f"ckpt_path {path} is a sharded folder, and the strategy {type(trainer.strategy).__name__} reads files",
            "trainer.strategy: lightning_modules.parallel.FullyShard",
            f"or make it a file: muybridge consolidate {path} --out {Path(path).with_suffix('.file.ckpt')}",
        )


def _existing(given: str) -> str:
    path = Path(given).expanduser()
    if is_checkpoint(path):
        return str(path)
    if path.is_dir():
        inside = written([path])
        hint = f"did you mean {inside[-1]}?" if inside else ""
        raise UsageError(
            f"ckpt_path {given} is a folder without shards", "a .ckpt file, or a folder that a sharded run wrote", hint
        )
    if path.is_file():
        raise UsageError(
            f"ckpt_path {given} is no .ckpt file",
            "a checkpoint that fit wrote",
            "export reads .ckpt, diffusers folders go into the backbone's path",
        )
    beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UsageError(
        f"ckpt_path {given} does not exist",
        "a .ckpt file, a sharded checkpoint folder, last or best",
        did_you_mean(near(given, beside)) or f"relative paths are looked up from {Path.cwd()}",
    )


class Remembered(NamedTuple):
    """What one checkpoint knows of the best one of its attempt at the run, by one value."""

    monitor: str
    mode: Optional[str]
    """``min`` or ``max``, where the checkpoint says it."""
    path: str
    """Empty before there is one."""
    score: Optional[float]
    """``None`` of a path that an attempt has from the one before it, whose score Lightning drops."""
    by: Path


def _remembered(checkpoint: Path) -> list[Remembered]:
    from lightning_modules.checkpoints import load_plain

    states = load_plain(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint).get("callbacks", {})
    known = []
    for key, state in states.items():
        if isinstance(state, dict) and state.get("monitor"):
            mode, score = re.search(r"'mode': '(min|max)'", key), state.get("best_model_score")
            told = None if mode is None else mode.group(1)
            value = None if score is None else float(score)
            known.append(Remembered(state["monitor"], told, state.get("best_model_path", ""), value, checkpoint))
    return known


def _trained(file: Path) -> Any:
    """What was trained on what, as the config says that a run left above this checkpoint; ``None`` where there is none.

    Attempts at one run agree in it, and may differ in what the Trainer was told, such as where to end.
    """
    import yaml

    for folder in file.parents:
        if run_of(folder / "config.yaml") is not None:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return {key: config.get(key) for key in ("seed_everything", "model", "data")}
    return None


def _best(found: Sequence[Path], trainer: Any) -> Path:
    """The best by the value that the newest checkpoint's run watched, over all its attempts: each remembers its own best."""
    watched, run = _remembered(found[-1])[:1], _trained(found[-1])
    attempts = [file for file in found if _trained(file) == run]
    known = [r for file in attempts for r in _remembered(file) if r.path and r.monitor in {w.monitor for w in watched}]
    if not known:
        raise UsageError(
            f"ckpt_path best: the run of {found[-1]} did not watch a value",
            "a ModelCheckpoint with monitor, such as val/loss",
            "use last, or the path of a file",
        )
    best, same = known[-1], known[-1:]
    modes = [c.mode for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == best.monitor]
    mode = watched[0].mode or (modes[0] if modes else None)
    scored = [(r.score, r) for r in known if r.score is not None]
    if mode is not None and scored:
        choose = min if mode == "min" else max
        best = choose(reversed(scored), key=lambda pair: pair[0])[1]
        same = [r for _, r in scored if r.path == best.path]
    # The run's folder may have been moved since.
    for candidate in (Path(best.path), *(r.by.parent / Path(best.path).name for r in same)):
        if is_checkpoint(candidate):
            return candidate
    raise UsageError(
        f"ckpt_path best: {best.path} is gone", "the file the run noted as its best", "use last, or the path of a file"
    )
