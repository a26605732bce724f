"""A student that stops moving is noticed, and a run can end there."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.distilling import distillation, prompts
from support.jobs import finetuning, trainer
from torch import Tensor

from callbacks.motion_monitor import MotionMonitor
from lightning_modules import Clips
from muybridge.batch import Batch
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
SIZE, FRAMES = 48, 5


def moving(speed: float) -> Tensor:
    """A textured square that moves so many pixels a frame, as a batch of one clip."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.nn.functional.interpolate(
        torch.rand(1, 1, 6, 6, generator=generator), size=(16, 16), mode="bilinear", align_corners=False
    )[0, 0]
    clip = torch.full((1, 3, FRAMES, SIZE, SIZE), -1.0)
    for frame in range(FRAMES):
        x = 6 + round(speed * frame)
        clip[0, :, frame, 16:32, x : x + 16] = 2.0 * texture - 1.0
    return clip


@pytest.fixture
def run(tiny_checkpoint: Tiny, tmp_path: Path) -> Callable[..., tuple[Any, MotionMonitor, list[dict[str, str]]]]:
    """A distillation whose videos move as fast as they are told to; the monitor, the Trainer and the table."""

    def go(speeds: list[float], iterations: int = 4, **options: Any) -> Any:
        job = distillation(tiny_checkpoint("wan"), update_ratio=1, clips=Clips(frames=9, height=16, width=16))
        left = iter(speeds)
        job.reference_videos = lambda batch, steps, on_step=None: moving(3.0)  # type: ignore[method-assign]
        job.make_videos = lambda batch, sampling, on_step=None, backbone=None: moving(next(left))  # type: ignore[method-assign]
        state, logger = options.pop("state", None), options.pop("trainer_logger", False)
        monitor = MotionMonitor(["a square"], **{"every": 1, **options})
        if state is not None:
            monitor.load_state_dict(state)
        lightning = trainer(tmp_path, max_steps=iterations, callbacks=[monitor], logger=logger, log_every_n_steps=1)
        lightning.fit(job, datamodule=prompts())
        with open(tmp_path / "motion/motion.csv", encoding="utf-8") as file:
            return lightning, monitor, list(csv.DictReader(file))

    return go


def test_motion_is_measured_against_the_teachers(run: Any, tmp_path: Path):
    lightning, monitor, rows = run([3.0, 1.5], iterations=2, floor=0.0)
    assert [row["update"] for row in rows] == ["1", "2"]
    assert float(rows[0]["amount_ratio"]) == pytest.approx(1.0, abs=1e-6)
    # A pixel and a half is a pixel and two in turn: the amount halves, and velocities last less.
    assert float(rows[1]["amount_ratio"]) == pytest.approx(0.5, abs=0.1)
    assert float(rows[1]["smoothness"]) < float(rows[0]["smoothness"])
    assert monitor.teacher["amount"] == pytest.approx(3.0 / SIZE, rel=0.1)
    assert float(lightning.callback_metrics["motion/amount_ratio"]) == pytest.approx(float(rows[1]["amount_ratio"]))
    assert {p.name for p in (tmp_path / "motion").iterdir()} == {
        "motion.csv",
        "teacher",
        "teacher.png",
        "update-0000001.png",
        "update-0000002.png",
    }


def test_a_collapse_is_warned_of_and_ends_the_run_where_asked(run: Any):
    with pytest.warns(UserWarning, match="0 % as much as the teacher"):
        lightning, monitor, rows = run([3.0, 0.0, 3.0, 0.0, 0.0, 3.0], iterations=6, stop=True, patience=2)
    assert lightning.global_step == len(rows) == 5, "two in a row, the first alone does not count"
    assert monitor.low_in_a_row == 2


def test_a_resumed_run_knows_what_the_teacher_did(run: Any, tmp_path: Path):
    """What it measured, and its rows above the student's, in TensorBoard too."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, monitor, _ = run([3.0], iterations=1)
    (tmp_path / "motion/teacher.png").rename(tmp_path / "teacher.png")
    shutil.rmtree(tmp_path / "motion")
    torch.save(monitor.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _, again, rows = run(
        [1.0, 1.0], iterations=2, state=state, trainer_logger=logger, every=2, dirpath=tmp_path / "motion"
    )
    assert again.teacher == monitor.teacher
    assert [row["update"] for row in rows] == ["2"]
    assert not (tmp_path / "motion/teacher.png").exists(), "it is not sampled anew"
    above, sheet = (np.asarray(Image.open(tmp_path / name)) for name in ("teacher.png", "motion/update-0000002.png"))
    assert sheet.shape == (2 * above.shape[0], *above.shape[1:])
    assert np.array_equal(sheet[: len(above)], above)
    assert not np.array_equal(sheet[len(above) :], above)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("motion")] == [2]
    assert events.Scalars("motion/amount_ratio")[-1].value == pytest.approx(float(rows[0]["amount_ratio"]))


def test_the_teachers_videos_are_the_teachers(tiny_checkpoint: Tiny, tmp_path: Path):
    """Its own sampler and guidance, on the student's noises; the student's weights have no part in them."""
    job = distillation(tiny_checkpoint("wan"))
    trainer(tmp_path, max_steps=1).fit(job, datamodule=prompts())
    batch = Batch(ids=["a"], prompts=["a dog"])
    made = job.reference_videos(batch, 2)
    with torch.no_grad():
        for parameter in job.student.parameters():
            parameter.zero_()
    assert torch.equal(job.reference_videos(batch, 2), made)
    noise = job.noise_for(["a"], job.sampling)
    text = job.teacher.encode_text(["a dog"])
    wanted = job.teacher.decode(job.teacher.sample(noise, text, steps=2, guidance=job.guidance))
    torch.testing.assert_close(made, wanted)


def test_all_roles_share_one_text_encoder(tiny_checkpoint: Tiny, tmp_path: Path):
    """Also in a run that goes on, where the teacher does not ask for the prompts first."""
    job = distillation(tiny_checkpoint("wan"), update_ratio=1)
    monitor = MotionMonitor(["a prompt that nothing is trained on"], every=1)
    monitor.load_state_dict({"teacher": {"amount": 1.0, "smoothness": 1.0}, "low_in_a_row": 0, "last": 0})
    trainer(tmp_path, max_steps=2, callbacks=[monitor]).fit(job, datamodule=prompts())
    assert (tmp_path / "motion/update-0000001.png").exists()
    roles = {"teacher": job.teacher, "student": job.student, "critic": job.critic}
    assert [name for name, role in roles.items() if "text" in role._parts] == ["teacher"]


def test_settings_that_cannot_work_are_refused(tiny_checkpoint: Tiny, tmp_path: Path):
    for options in (dict(prompts=[]), dict(every=0), dict(floor=1.0), dict(patience=0), dict(share=0.0)):
        with pytest.raises(UsageError, match="MotionMonitor"):
            MotionMonitor(**{"prompts": ["a"], **options})  # type: ignore[arg-type]
    monitor = MotionMonitor(["a"])
    with pytest.raises(UsageError, match="reference_videos"):
        monitor.setup(trainer(tmp_path), finetuning(tiny_checkpoint("wan")), "fit")
