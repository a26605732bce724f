"""The scoreboard: what becomes of motion under each method, at full strength and with several seeds."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from muybridge.cli.bench.methods import Method
from muybridge.errors import UsageError


def bench_motion(
    *,
    out: str = "runs/bench-motion",
    model: str = "proving-ground",
    seeds: int = 3,
    updates: int = 3000,
    clips: int = 2500,
    only: Optional[list[str]] = None,
    more: Optional[list[Method]] = None,
) -> None:
    """Train, sample and judge every method with several seeds; write a table with mean and spread as Markdown and JSON.

    A method with a seed that is done is not done again, and the table is written anew after each. All methods get the same clips,
    captions, noise and number of updates of a seed.

    Args:
        out: Where everything goes; a folder that this command began is continued.
        model: The pipeline that methods begin with: one that ships, or a directory.
        seeds: How many; each has its own clips, captions, order and noise.
        updates: Of training, as ``trainer.max_steps`` counts them.
        clips: How many clips are drawn for a seed; a fifth of them give the captions that are sampled and judged.
        only: Names of the methods, where not all are wanted.
        more: Further methods, such as ``[{"name": "mine", "title": "mine, 4 steps", "config": "mine.yaml", "trained": true}]``.
    """
    from muybridge.backbones.checkpoint import local_directory
    from muybridge.begun import begin
    from muybridge.cli.bench.methods import METHODS, Setting, pick
    from muybridge.cli.bench.parts import Part, run_parts
    from muybridge.cli.bench.scoreboard import Scoreboard
    from muybridge.cli.front import run
    from muybridge.proving_ground.small import SMALL

    if min(seeds, updates) < 1 or clips < 30:
        raise UsageError(f"{seeds} seeds, {updates} updates, {clips} clips", "1 or more, 1 or more, and 30 or more")
    local_directory(model)
    known = (*METHODS, *(more or ()))
    if len({method.name for method in known}) < len(known):
        raise UsageError("a further method is called like another", f"none of {', '.join(m.name for m in METHODS)}")
    # Distances are to real clips.
    methods = pick(list(dict.fromkeys(["real", *only])) if only is not None else [m.name for m in known], known)
    root = Path(out)
    begin(root / "settings.json", {"model": model, "updates": updates, "clips": clips}, "results")
    settings = [Setting(root / f"seed-{s}", model, SMALL, clips, 0.2, updates, f"seed-{s}/", s) for s in range(seeds)]
    command = ["bench-motion", f"--model={model}", f"--seeds={seeds}", f"--updates={updates}", f"--clips={clips}"]
    command += [f"--only={json.dumps(only)}"] if only is not None else []
    command += [f"--more={json.dumps([asdict(method) for method in more])}"] if more else []
    board = Scoreboard(settings, methods, shlex.join(["muybridge", *command]))
    parts = [part for s in settings for part in (s.draw(), *(p for method in methods for p in s.parts(method)))]

    def after(part: Part) -> None:
        if part.name.endswith(".judge"):
            board.write(root)

    run_parts(parts, root, run, after=after)
    markdown, data = board.write(root)
    print(f"\n{markdown.read_text(encoding='utf-8')}\ntable: {markdown}\ndata:  {data}")
