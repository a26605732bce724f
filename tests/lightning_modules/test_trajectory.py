"""Stage 2: what a student is given lies on its teacher's path, block by block, and training goes on from any moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import latents_for, trainer
from support.trajectories import PATH, STEPS, data, job, write
from torch import Tensor

from callbacks.ema import EMA
from lightning_modules import Sampling, TrajectoryDistillation
from muybridge.backbones import Pretrained, load
from muybridge.backbones.adapters import LoRA
from muybridge.data.teaching import TeacherPath, kept_times
from muybridge.data.trajectories import Trajectories, TrajectoryBatch
from muybridge.diffusion import keyed_noise
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.errors import UsageError
from muybridge.losses import TrajectoryRegression

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def wan(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("wan")


@pytest.fixture(scope="module")
def folder(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(wan, tmp_path_factory.mktemp("trajectories") / "t")


def fit(module: TrajectoryDistillation, folder: Path, root: Path, steps: int = 4, **options: Any) -> dict[str, Tensor]:
    ckpt_path = options.pop("ckpt_path", None)
    runner = trainer(root, max_steps=steps, limit_val_batches=0, callbacks=[EMA(decay=0.9)], **options)
    runner.fit(module, datamodule=data(folder), ckpt_path=ckpt_path)
    runner.save_checkpoint(root / f"{steps}.ckpt")
    return torch.load(root / f"{steps}.ckpt", weights_only=True)["state_dict"]


# -- the teacher's paths -----------------------------------------------------------------------------------------------


def test_a_trajectory_is_the_teachers_path_from_keyed_noise(wan: Path, folder: Path) -> None:
    rows, teacher = Trajectories(folder), load(str(wan), max_text_length=16)
    row = rows.read("t05")
    assert row.times.tolist() == [[1000.0, 750.0, 500.0, 0.0]]
    noise = keyed_noise(teacher.latent_shape(9, 16, 16), 0, "trajectory", "t05")
    assert torch.equal(row.latents[0, 0], noise)
    denoise = teacher.guided(teacher.encode_text(row.prompts), teacher.unconditional(), 3.0)
    states = dict(ode_path(denoise, noise[None], teacher.schedule, ode_times(teacher.schedule, 4, 1.0)))
    wanted = torch.cat([states[t] for t in (1000.0, 750.0, 500.0, 0.0)])
    assert torch.allclose(row.latents[0], wanted, rtol=0, atol=1e-6)


def test_a_stopped_run_goes_on_and_ranks_and_batches_do_not_matter(wan: Path, folder: Path, tmp_path: Path) -> None:
    from muybridge.data.cache import Share

    out = tmp_path / "t"
    write(wan, out, count=3, batch_size=2)
    for rank in range(2):
        write(wan, out, share=Share(rank, 2), batch_size=3)
    found, wanted = Trajectories(out), Trajectories(folder)
    assert found.ids == wanted.ids
    assert len(set(found.ids)) == 8
    for name in wanted.ids:
        assert torch.allclose(found.read(name).latents, wanted.read(name).latents, rtol=0, atol=1e-6)
    assert torch.equal(found.read("t00").latents[:, 0], wanted.read("t00").latents[:, 0]), "the noise is a key's"


def test_paths_of_another_making_are_not_mixed(wan: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"guidance is 3\.0 there and 5\.0 here"):
        write(wan, folder, path=replace(PATH, guidance=5.0))


def test_steps_off_the_path_are_refused(wan: Path) -> None:
    teacher = Pretrained(str(wan))
    assert kept_times(teacher, TeacherPath(50, 8.0), [1000, 757, 522]) == pytest.approx(
        [1000, 756.76, 521.74, 0], abs=0.01
    )
    with pytest.raises(UsageError, match="step 700 is not on the teacher's path"):
        kept_times(teacher, TeacherPath(50, 8.0), [1000, 700])


# -- what the student is given -----------------------------------------------------------------------------------------


def batch_of(folder: Path, count: int = 4) -> TrajectoryBatch:
    rows = Trajectories(folder)
    return TrajectoryBatch.cat([rows.read(i) for i in rows.ids[:count]])


def test_every_block_is_given_a_state_of_its_own_and_its_time(wan: Path, folder: Path) -> None:
    module, batch = job(wan), batch_of(folder)
    module.configure_model()
    chosen = torch.tensor([[0, 1, 2], [3, 3, 0], [2, 0, 3], [1, 1, 1]])
    step = module.along(batch, chosen)
    assert step.t.tolist() == [[[1000.0, 750.0, 500.0, 0.0][i] for i in row] for row in chosen.tolist()]
    for sample, row in enumerate(chosen.tolist()):
        for frame, place in enumerate(row):
            assert torch.equal(step.noisy[sample, :, frame], batch.latents[sample, place, :, frame])
    assert torch.equal(step.clean, batch.latents[:, -1])


def test_draws_are_keyed_and_cover_all_choices(wan: Path, folder: Path) -> None:
    module, batch = job(wan), batch_of(folder, 8)
    first = module.draw_blocks(batch, 3, 4)
    assert torch.equal(first, module.draw_blocks(batch, 3, 4))
    seen = [first]
    for _ in range(10):
        module.samples_seen += 8
        seen.append(module.draw_blocks(batch, 3, 4))
    assert not torch.equal(seen[0], seen[1])
    shares = torch.bincount(torch.stack(seen).flatten(), minlength=4) / (11 * 8 * 3)
    assert bool(((shares - 0.25).abs() < 4 * math.sqrt(0.1875 / 264)).all())
    assert bool((first != first[:, :1]).any()), "blocks of one clip differ"


def test_a_bidirectional_student_has_one_time_a_clip_and_no_clean_one(wan: Path, folder: Path) -> None:
    module, batch = job(wan, block=None), batch_of(folder)
    module.configure_model()
    assert module.places(batch.times).shape == (4, 3)
    step = module.along(batch, torch.tensor([[0], [1], [2], [0]]))
    assert step.t.tolist() == [1000.0, 750.0, 500.0, 1000.0]
    assert torch.equal(step.noisy[1], batch.latents[1, 1])


def test_a_student_that_is_its_teacher_is_right_at_the_paths_last_step(wan: Path) -> None:
    """Without guidance the path ends at the teacher's own estimate of the state before; further up the path is curved."""
    module = job(wan, block=None, steps=[1000.0, 250.0], path=replace(PATH, guidance=1.0))
    module.configure_model()
    teacher, prompts = module.backbone, ["a dog", "a cat"]
    noise = torch.stack([keyed_noise(teacher.latent_shape(9, 16, 16), 0, i) for i in "ab"])
    times = ode_times(teacher.schedule, 4, 1.0)
    states = dict(ode_path(teacher.guided(teacher.encode_text(prompts)), noise, teacher.schedule, times))
    kept = torch.stack([states[t] for t in (1000.0, 250.0, 0.0)], 1)
    batch = TrajectoryBatch(["a", "b"], torch.tensor([[1000.0, 250.0, 0.0]] * 2), kept, prompts)
    with torch.no_grad():
        first, last = (TrajectoryRegression()(module.along(batch, torch.full((2, 1), i))) for i in (0, 1))
    assert bool((last < 1e-10).all())
    assert bool((first > 1e-6).all())


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_for_bit_the_whole_one(wan: Path, folder: Path, tmp_path: Path) -> None:
    whole = fit(job(wan), folder, tmp_path / "whole", steps=4)
    fit(job(wan), folder, tmp_path / "parts", steps=3)
    found = fit(job(wan), folder, tmp_path / "parts", steps=4, ckpt_path=tmp_path / "parts" / "3.ckpt")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], whole[n]) for n in whole)
    assert any(n.startswith("average.") for n in whole)


def test_training_nears_the_ends_and_the_student_samples_causally(wan: Path, folder: Path, tmp_path: Path) -> None:
    module, batch = job(wan), batch_of(folder, 8)
    chosen = torch.tensor([[i % 3, (i + 1) % 4, 2] for i in range(8)])
    module.configure_model()
    with torch.no_grad():
        before = float(TrajectoryRegression()(module.along(batch, chosen)).mean())
    module = job(wan, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, folder, tmp_path, steps=30)
    with torch.no_grad():
        after = float(TrajectoryRegression()(module.along(batch, chosen)).mean())
    assert after < 0.8 * before
    pixels = module.make_videos(batch, module.sampling)  # type: ignore[arg-type]
    assert pixels.shape == (8, 3, 9, 16, 16)


def test_an_adapter_alone_is_trained_and_saved(wan: Path, folder: Path, tmp_path: Path) -> None:
    module = job(wan, adapter=LoRA(rank=2))
    left = fit(module, folder, tmp_path, steps=2)
    assert left
    assert all("lora_" in n for n in left if not n.startswith("average."))


def test_validation_measures_every_step(wan: Path, folder: Path, tmp_path: Path) -> None:
    module = job(wan)
    loader = data(folder)
    runner = trainer(tmp_path)
    loader.setup("fit")
    [found] = runner.validate(
        module,
        dataloaders=torch.utils.data.DataLoader(loader.train_dataset(), batch_size=4, collate_fn=loader.collate),
        verbose=False,
    )
    assert {f"val/loss_t{s:03.0f}" for s in STEPS} <= set(found)
    wanted = sum(found[f"val/loss_t{s:03.0f}"] for s in STEPS) / 3
    assert found["val/loss"] == pytest.approx(wanted, rel=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(module: TrajectoryDistillation, datamodule: Any, tmp_path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=datamodule)
    return str(caught.value)


def test_settings_that_do_not_fit_the_trajectories_are_refused_before_weights_load(
    wan: Path, folder: Path, tmp_path: Path
) -> None:
    off = job(wan, steps=[1000.0, 875.0, 500.0], path=replace(PATH, steps=8))
    assert "no state at the student's step 875" in refused(off, data(folder), tmp_path)
    larger = Sampling(steps=STEPS, guidance=1.0, frames=13, height=16, width=16)
    assert "trajectories of 9 frames of 16x16" in refused(job(wan, sampling=larger), data(folder), tmp_path)
    assert not off.backbone.networks


def test_clips_instead_of_trajectories_are_refused(wan: Path, tmp_path: Path) -> None:
    module = job(wan)
    assert "TrajectoryData" in refused(module, latents_for(module), tmp_path)


def test_other_families_and_wrong_steps_are_refused_at_once(wan: Path, tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="a Wan student of a CogVideoX teacher"):
        job(wan, teacher=Pretrained(str(tiny_checkpoint("cogvideox"))))
    with pytest.raises(UsageError, match="the step list is"):
        job(wan, steps=[500.0, 750.0])
    with pytest.raises(UsageError, match="3 latent frames in causal blocks of 2"):
        job(wan, block=2).check()
