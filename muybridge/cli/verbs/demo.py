"""From nothing to a page to look at, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path

from muybridge.errors import UsageError

SHOWN = ("real", "teacher-50", "teacher-4", "dmd", "msm-shared-1")
VALIDATION = 0.2


def demo(*, out: str = "runs/demo", updates: int = 120, clips: int = 240, model: str = "proving-ground") -> None:
    """Sample the model that ships, distil it to four steps with and without motion score matching, judge all of it, show it.

    Each part is a verb with its options, which are printed, and can be run alone. What is done is not done again.

    Args:
        out: Where everything goes; a folder that this command began is continued.
        updates: Iterations of each distillation.
        clips: How many clips are drawn; a fifth of them give the captions that are sampled and judged.
        model: The pipeline that is sampled and distilled: one that ships, or a directory.
    """
    from muybridge.backbones.checkpoint import local_directory
    from muybridge.cli.comparison import read_compared, sections
    from muybridge.cli.front import run
    from muybridge.cli.methods import Setting, pick
    from muybridge.cli.parts import agree, run_parts
    from muybridge.proving_ground.small import SMALL
    from muybridge.report import Report, write_report

    if updates < 1 or clips < 30:
        raise UsageError(f"{updates} updates, {clips} clips", "1 or more, and 30 or more: six to judge")
    local_directory(model)
    root = Path(out)
    agree(root, {"updates": updates, "clips": clips, "model": model})
    setting = Setting(root, model, SMALL, clips, VALIDATION, updates)
    methods = pick(SHOWN)
    parts = [setting.draw(), *(part for method in methods for part in setting.parts(method))]
    done = run_parts(parts, root, run)
    took = sum(d.seconds for d in done.values())
    report = Report(
        "muybridge: a first run",
        "A small world where the truth about motion is known, a model that was trained on it, and what becomes of its motion "
        f"when it is distilled to four steps. Made in {took / 60:.0f} minutes; every command is below what it made.",
        sections(read_compared(setting, methods), methods, done),
    )
    print(f"\nreport: {write_report(root / 'report.html', report).resolve()}")
