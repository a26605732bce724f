"""Whether attribution is right, on the proving ground: tables with mean and spread over seeds."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Optional

from muybridge.errors import UsageError


def bench_attribution(
    *,
    out: str = "runs/bench-attribution",
    model: str = "proving-ground",
    seeds: int = 3,
    clips: int = 600,
    targets: list[str] = ["roll"],  # noqa: B006 - printed by --help
    top: str = "10%",
    updates: int = 400,
    prompts: int = 40,
    subsets: int = 32,
    subset_updates: int = 60,
    learning_rate: float = 2e-3,
    compared: int = 64,
    dim: int = 4096,
    captionless: bool = True,
    only: Optional[list[str]] = None,
) -> None:
    """Hold attribution against clips whose motion is known, models that were really retrained, and what a judge sees.

    Clips show all ten motions, also those that the model does not know. What is done is not done again, and the tables are
    written anew as it goes on.

    Args:
        out: Where everything goes; a folder that this command began is continued.
        model: The pipeline that is asked: one that ships, or a directory.
        seeds: How many; each has its own clips, halves, order and noise.
        clips: How many are drawn for a seed; a fifth of them are the queries.
        targets: Motions that clips are selected for, which are then trained on.
        top: Share of the training clips that is selected and looked at.
        updates: Of training on a selection, the same for each, and on all clips.
        prompts: Captions of a target that are sampled and judged.
        subsets: Models trained on random halves of the clips; 0 leaves out what they tell.
        subset_updates: Updates of each of them.
        learning_rate: Of all training.
        compared: Clips whose full gradients are held against projected ones; 0 leaves that out.
        dim: Numbers of a projected gradient.
        captionless: Also take gradients without captions: words name the motion, and may have been read rather than seen.
        only: Which selections are trained on, where not all are wanted.
    """
    from muybridge.backbones.checkpoint import local_directory
    from muybridge.begun import begin
    from muybridge.cli.bench.methods import Setting, pick
    from muybridge.cli.bench.parts import Part, run_parts
    from muybridge.cli.bench.questions import Question, methods
    from muybridge.cli.bench.questions_board import Board
    from muybridge.cli.front import run
    from muybridge.proving_ground import MOTIONS
    from muybridge.proving_ground.small import SMALL

    least = {"seeds": 1, "clips": 20, "updates": 1, "prompts": 1, "subsets": 0, "subset_updates": 1, "dim": 1}
    given = {"seeds": seeds, "clips": clips, "updates": updates, "prompts": prompts}
    given |= {"subsets": subsets, "subset_updates": subset_updates, "dim": dim}
    small = [f"{name} is {value}" for name, value in given.items() if value < least[name]]
    # Of fewer there is nothing to rank.
    small += [f"{n} is {v}" for n, v in (("subsets", subsets), ("compared", compared)) if v in (1, 2)]
    if small:
        wanted = ", ".join(f"{name} {value} or more" for name, value in least.items())
        raise UsageError(" and ".join(small), f"{wanted}; subsets and compared 0, or 3 or more")
    unknown = [name for name in targets if name not in MOTIONS]
    if unknown or not targets or len(set(targets)) < len(targets):
        raise UsageError(f"targets are {targets}", f"some of {', '.join(MOTIONS)}, each once")
    local_directory(model)
    known = methods(top, learning_rate)
    # Distances are to real clips.
    chosen = pick(list(dict.fromkeys(["real", *only])) if only is not None else [m.name for m in known], known)
    root = Path(out)
    numbers = {"top": top, **given, "learning_rate": learning_rate, "compared": compared, "captionless": captionless}
    del numbers["seeds"]
    world = replace(SMALL, motions=MOTIONS)
    questions = [
        Question(
            setting=Setting(root / f"seed-{s}", model, world, clips, 0.2, updates, f"seed-{s}/", s),
            targets=tuple(targets),
            top=top,
            prompts=prompts,
            subsets=subsets,
            subset_updates=subset_updates,
            learning_rate=learning_rate,
            compared=compared if s == 0 else 0,
            dim=dim,
            captionless=captionless,
        )
        for s in range(seeds)
    ]
    lost = [f"{m} under seed {q.setting.seed}" for q in questions for m in targets if not q.queries(m)]
    if lost:
        raise UsageError(f"of {clips} clips no query shows {lost[0]}", "one or more", "draw more --clips")
    begin(root / "settings.json", {"model": model, **numbers}, "results")
    for question in questions:
        question.write_halves()
    command = ["bench-attribution", f"--model={model}", f"--seeds={seeds}", f"--targets={json.dumps(targets)}"]
    command += [f"--{name}={str(value).lower()}" for name, value in numbers.items()]
    command += [f"--only={json.dumps(only)}"] if only is not None else []
    board = Board(questions, chosen, shlex.join(["muybridge", *command]))
    parts = [part for q in questions for part in (*q.stores(), *q.checks())]
    parts += [part for q in questions for motion in targets for part in q.outcome(motion, chosen)]
    parts += [q.trained_half(number) for q in questions for number in range(subsets)]

    def after(part: Part) -> None:
        if part.name.endswith((".whole", ".whole-captionless", ".judge", ".projection", ".length")):
            board.write(root)

    run_parts(parts, root, run, after=after)
    markdown, data = board.write(root)
    print(f"\n{markdown.read_text(encoding='utf-8')}\ntable: {markdown}\ndata:  {data}")
