"""The motion-score job from the command: trained, resumed, rated, sampled, exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muybridge.backbones.base import Backbone

from .conftest import Command

Tiny = Callable[[str], Path]


@pytest.fixture
def options(tiny_checkpoint: Tiny, clips: Path, tmp_path: Path) -> list[str]:
    wan = tiny_checkpoint("wan")
    return [
        "-c=tiny/motion_score.yaml", f"--model.backbone.path={wan}", f"--model.appearance.path={wan}",
        f"--data.videos={clips}", f"--data.validation={clips}", f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip


def test_a_motion_score_model_goes_from_clips_to_ratings_and_videos(
    command: Command, options: list[str], tmp_path: Path
) -> None:
    assert command("fit", *options, "--trainer.max_steps=2", "--trainer.val_check_interval=2").code == 0
    (last,) = (tmp_path / "run").rglob("last.ckpt")
    (config,) = (tmp_path / "run").rglob("config.yaml")
    names = torch.load(last, weights_only=True)["state_dict"]
    assert names
    assert not any(n.startswith("appearance") for n in names), "what is frozen is in no checkpoint"
    tested = command("test", "-c", str(config), f"--ckpt_path={last}")
    assert tested.code == 0, tested.err
    assert "test/motion_log_likelihood" in tested.out
    # The checkpoint knows nothing of the appearance model, which a later command may change.
    predicted = command("predict", "-c", str(config), f"--ckpt_path={last}", "--trainer.limit_predict_batches=1")
    assert predicted.code == 0, predicted.err
    assert len(list((tmp_path / "run").rglob("predictions/*.mp4"))) == 2


def test_given_frames_on_a_family_without_per_frame_times_are_refused_before_weights_load(
    command: Command, options: list[str], tiny_checkpoint: Tiny, loads: list[Backbone]
) -> None:
    other = tiny_checkpoint("cogvideox")
    result = command("fit", *options, f"--model.backbone.path={other}", f"--model.appearance.path={other}")
    assert result.code == 2
    assert "a family with per-frame times" in result.message
    assert not loads
