"""Ways to teach a motion from one clip, held against one another: motion, leaked look, and what was asked for."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from muybridge.cli.bench.methods import Method
from muybridge.errors import UsageError


def bench_customize(
    *,
    out: str = "runs/bench-customize",
    model: str = "proving-ground",
    seeds: int = 3,
    motions: Optional[list[str]] = None,
    references: int = 3,
    prompts: int = 12,
    updates: int = 250,
    taus: list[float] = [500.0, 800.0],  # noqa: B006 - printed by --help
    probed: int = 12,
    only: Optional[list[str]] = None,
    more: Optional[list[Method]] = None,
) -> None:
    """Teach motions of the proving ground from single clips by several methods; write tables with mean and spread, and a picture.

    Every motion is called by a word that the model has never seen, and asked for with subjects unlike the clip's. A part that is
    done is not done again; a method stands in the tables as soon as all lessons of a seed are done.

    Args:
        out: Where everything goes; a folder that this command began is continued.
        model: The pipeline that is taught: one that ships, or a directory.
        seeds: How many; each has its own times and noise, and all have the same clips.
        motions: Which are taught; all ten where not given.
        references: Clips of each motion, one after another.
        prompts: New subjects of each clip.
        updates: Of each training, as ``trainer.max_steps`` counts them.
        taus: Boundaries to try.
        probed: Clips by which a probe looks for another boundary to try; 0 leaves that out.
        only: Names of the methods, where not all are wanted.
        more: Further methods, such as ``[{"name": "mine", "title": "mine", "config": "mine.yaml", "trained": true}]``.
    """
    from muybridge.backbones.checkpoint import local_directory
    from muybridge.begun import begin
    from muybridge.cli.bench.lessons import PROBED, Probing, lessons, methods
    from muybridge.cli.bench.lessons_board import LessonsBoard
    from muybridge.cli.bench.methods import pick
    from muybridge.cli.bench.parts import Part, run_parts
    from muybridge.cli.front import run
    from muybridge.proving_ground import MOTIONS
    from muybridge.proving_ground.small import SMALL

    if min(seeds, references, prompts, updates) < 1 or probed < 0:
        raise UsageError(
            f"{seeds} seeds, {references} references, {prompts} prompts, {updates} updates, {probed} probed",
            "1 or more of each, of the last 0 or more",
        )
    if not all(0.0 < tau < 999.0 for tau in taus) or len(set(taus)) < len(taus):
        raise UsageError(f"taus are {taus}", "times above 0 and below 999, each once", "1000 is noise")
    taught = list(MOTIONS) if motions is None else motions
    unknown = [name for name in taught if name not in MOTIONS]
    if unknown or not taught or len(set(taught)) < len(taught):
        raise UsageError(f"motions are {taught}", f"some of {', '.join(MOTIONS)}, each once")
    local_directory(model)
    root = Path(out)
    probing = Probing(root, model, SMALL, probed)
    known = (*methods(taus, probing.out if probed else None), *(more or ()))
    if len({method.name for method in known}) < len(known):
        raise UsageError("a further method is called like another", f"none of {', '.join(m.name for m in known)}")
    chosen = pick(only if only is not None else [method.name for method in known], known)
    begin(root / "settings.json", {"model": model, "prompts": prompts, "updates": updates, "probed": probed}, "results")
    taught_by_seed = [lessons(root, model, SMALL, s, taught, references, prompts, updates) for s in range(seeds)]
    for some in taught_by_seed:
        for lesson in some:
            lesson.write_prompts()
    options: dict[str, object] = {"model": model, "seeds": seeds, "motions": json.dumps(taught)}
    options |= {"references": references, "prompts": prompts, "updates": updates}
    options |= {"taus": json.dumps(taus), "probed": probed}
    command = ["bench-customize", *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--only={json.dumps(only)}"] if only is not None else []
    command += [f"--more={json.dumps([asdict(method) for method in more])}"] if more else []
    found = None
    if any(method.name == PROBED for method in chosen):
        run_parts(probing.parts(), root, run)
        found = probing.found()
        if found["tau"] is None:
            print(f"\nno lesson from the probe's boundary on, since it finds none: {found['reason']}")
            chosen = tuple(method for method in chosen if method.name != PROBED)
    board = LessonsBoard(taught_by_seed, chosen, shlex.join(["muybridge", *command]), found)
    parts: list[Part] = []
    last = set()
    for some in taught_by_seed:
        parts += [lesson.draw() for lesson in some]
        for method in chosen:
            parts += [part for lesson in some for part in lesson.parts(method)]
            last.add(parts[-1].name)

    def after(part: Part) -> None:
        if part.name in last:
            board.write(root)

    run_parts(parts, root, run, after=after)
    markdown, data = board.write(root)
    print(
        f"\n{markdown.read_text(encoding='utf-8')}\ntable:   {markdown}\ndata:    {data}\npicture: {root / 'results.png'}"
    )
