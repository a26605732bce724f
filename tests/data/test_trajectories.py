"""Trajectories come back as they were written, in an order that no rank or run decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.caches import make_cache
from torch import Tensor

from datamodules.trajectories import TrajectoryData
from muybridge.backbones import load
from muybridge.cli import main
from muybridge.data.clips import Clip
from muybridge.data.trajectories import Trajectories, TrajectoryBatch, TrajectoryWriter
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_noise
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]
TIMES = [1000.0, 757.0, 522.0, 0.0]
MADE = {"teacher": "Wan", "steps": 50, "guidance": 5.0}


def states(name: str, count: int = len(TIMES)) -> Tensor:
    return keyed_noise((count, 16, 3, 2, 2), 0, name)


def write(folder: Path, numbers: range, **options: int) -> Path:
    with TrajectoryWriter(folder, MADE, **options) as writer:
        for i in numbers:
            if f"t{i}" not in writer.done:
                writer.add(f"t{i}", f"a dog number {i % 2}", TIMES, states(f"t{i}"))
    return folder


def test_trajectories_come_back_with_their_times(tmp_path: Path) -> None:
    rows = Trajectories(write(tmp_path / "t", range(5), shard_rows=2))
    assert rows.ids == [f"t{i}" for i in range(5)]
    assert rows.made == MADE
    for i in range(5):
        row = rows.read(f"t{i}")
        assert torch.equal(row.latents[0], states(f"t{i}"))
        assert (row.times.tolist(), row.prompts) == ([TIMES], [f"a dog number {i % 2}"])


def test_two_writers_and_a_second_run_make_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write(folder, range(3, 6))
    write(folder, range(0, 4))
    write(folder, range(6))
    assert Trajectories(folder).ids == [f"t{i}" for i in range(6)]
    assert sum(1 for _ in folder.glob("*.safetensors")) == 2


def test_trajectories_of_other_making_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "t", range(1))
    with pytest.raises(UsageError, match=r"guidance is 5\.0 there and 3\.0 here"):
        TrajectoryWriter(tmp_path / "t", {**MADE, "guidance": 3.0})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("!", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no trajectories"):
        TrajectoryWriter(tmp_path / "other", MADE)
    with pytest.raises(UsageError, match="holds no trajectories"):
        Trajectories(tmp_path / "other")


@pytest.mark.parametrize("times", [[1000.0, 500.0], [0.0, 500.0, 700.0, 1000.0], [1000.0, 500.0, 500.0, 0.0]])
def test_times_must_fall_and_match(tmp_path: Path, times: list[float]) -> None:
    with TrajectoryWriter(tmp_path / "t", MADE) as writer, pytest.raises(ValueError, match="expected"):
        writer.add("a", "", times, states("a"))


def test_batches_join_move_and_refuse_other_lengths(tmp_path: Path) -> None:
    rows = Trajectories(write(tmp_path / "t", range(2)))
    batch = TrajectoryBatch.cat([rows.read("t0"), rows.read("t1")])
    assert (len(batch), batch.times.shape, batch.latents.shape) == (2, (2, 4), (2, 4, 16, 3, 2, 2))
    assert batch.to(torch.float64).latents.dtype == torch.float64
    short = TrajectoryBatch(["s"], torch.tensor([[1000.0, 0.0]]), states("s", 2)[None], [""])
    with pytest.raises(UsageError, match="2 shapes in one batch"):
        TrajectoryBatch.cat([batch, short])


def test_embeddings_come_from_a_cache(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    encoders = load(str(tiny_checkpoint("wan")), components=("vae", "text_encoder"), max_text_length=16)
    write(tmp_path / "t", range(4))
    file = tmp_path / "x.mp4"
    file.write_bytes(b"x")
    cache = make_cache(tmp_path / "cache", encoders, [Clip("x", file, "a dog number 0")])
    data = TrajectoryData(str(tmp_path / "t"), str(cache), batch_size=2, num_workers=0)
    with pytest.raises(UsageError, match="lacks 1 of 2 texts, such as 'a dog number 1'"):
        data.setup("fit")
    make_cache(tmp_path / "cache", encoders, [Clip(f"x{i}", file, f"a dog number {i}") for i in range(2)])
    data = TrajectoryData(str(tmp_path / "t"), str(cache), batch_size=2, num_workers=0)
    data.setup("fit")
    for batch in data.train_dataloader():
        wanted = Conditioning.cat([encoders.encode_text([p]) for p in batch.prompts])
        assert torch.equal(batch.conditioning.text, wanted.text)


JOB = '''
import torch
from lightning_modules.base import DiffusionModule
from muybridge.backbones.base import Backbone


class Jump(DiffusionModule):
    """From a teacher's first state to its last, in one step."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def roles(self):
        return {"student": self.backbone}

    @property
    def sampled(self):
        return self.backbone

    def check(self):
        pass

    def prepare(self):
        self.backbone.requires_grad_(True)

    def training_step(self, batch, index):
        start, end = batch.latents[:, 0], batch.latents[:, -1]
        velocity = self.backbone(start, batch.times[:, 0], self.text(batch, self.backbone))
        with open("losses.txt", "a") as file:
            loss = (start - velocity - end).square().mean()
            print(" ".join(batch.ids), loss.item(), file=file)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
'''

CONFIG = """
trainer: {{accelerator: cpu, max_epochs: 6, logger: false, enable_checkpointing: false, enable_progress_bar: false}}
model:
  class_path: my_job.Jump
  init_args:
    backbone:
      class_path: Pretrained
      init_args: {{path: {model}, max_text_length: 16}}
data:
  class_path: TrajectoryData
  init_args: {{path: t, batch_size: 2, num_workers: 1}}
"""


def test_a_job_of_one_s_own_trains_on_trajectories_through_the_command(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "t", range(4))
    (tmp_path / "my_job.py").write_text(JOB, encoding="utf-8")
    (tmp_path / "jump.yaml").write_text(CONFIG.format(model=tiny_checkpoint("wan")), encoding="utf-8")
    assert main(["fit", "-c", "jump.yaml"]) == 0
    rows = [line.split() for line in (tmp_path / "losses.txt").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12
    for epoch in range(6):
        assert sorted(name for row in rows[2 * epoch : 2 * epoch + 2] for name in row[:2]) == ["t0", "t1", "t2", "t3"]
    losses = [float(row[2]) for row in rows]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
