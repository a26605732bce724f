"""From nothing to a page to look at, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path

from muybridge.errors import UsageError

SHOWN = ("real", "teacher-50", "teacher-4", "undistilled", "dmd", "msm-shared-1")
VALIDATION = 0.2


def demo(*, out: str = "runs/demo", updates: int = 80, clips: int = 240, model: str = "proving-ground") -> None:
    """Sample the model that ships, distil it to four steps, customize it from one clip, attribute motions; judge it all, show it.

    Each part is a verb with its options, which are printed, and can be run alone. What is done is not done again.

    Args:
        out: Where everything goes; a folder that this command began is continued.
        updates: Iterations of each distillation; the customization has four times as many, up to 300.
        clips: How many clips are drawn; a fifth of them give the captions that are sampled and judged.
        model: The pipeline that is sampled and distilled: one that ships, or a directory.
    """
    from muybridge.backbones.checkpoint import local_directory
    from muybridge.begun import begin
    from muybridge.cli.bench.comparison import read_compared, sections
    from muybridge.cli.bench.methods import Setting, pick
    from muybridge.cli.bench.parts import run_parts
    from muybridge.cli.bench.tour import Attribution, Customization
    from muybridge.cli.front import run
    from muybridge.proving_ground.small import SMALL
    from muybridge.report import Report, write_report

    if updates < 1 or clips < 30:
        raise UsageError(f"{updates} updates, {clips} clips", "1 or more, and 30 or more: six to judge")
    local_directory(model)
    root = Path(out)
    begin(root / "settings.json", {"updates": updates, "clips": clips, "model": model}, "results")
    setting = Setting(root, model, SMALL, clips, VALIDATION, updates)
    methods = pick(SHOWN)
    customization = Customization(setting, updates=min(300, 4 * updates), count=max(2, setting.judged // 6))
    attribution = Attribution(setting)
    customization.write_prompts()
    parts = [setting.draw(), *(part for method in methods for part in setting.parts(method))]
    parts += [*customization.parts(), *attribution.parts()]
    done = run_parts(parts, root, run)
    took = sum(d.seconds for d in done.values())
    report = Report(
        "muybridge: a first run",
        "A small world where the truth about motion is known, a model that was trained on it, what becomes of its motion when "
        "it is distilled to four steps, how it learns one from a single clip, and which clips a motion comes from. "
        f"Made in {took / 60:.0f} minutes; every command is below what it made.",
        (
            *sections(read_compared(setting, methods), methods, done),
            customization.section(done),
            attribution.section(done),
        ),
    )
    print(f"\nreport: {write_report(root / 'report.html', report).resolve()}")
