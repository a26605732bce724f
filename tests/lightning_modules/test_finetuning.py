"""The plain job: what it draws, trains, saves, measures and exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import lightning.pytorch as pl
import pytest
import torch
from support.jobs import SHAPES, finetuning, latents_for, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.ema import EMA
from callbacks.samples import Samples
from datamodules.collate import collate
from lightning_modules import Sampling
from lightning_modules.finetuning import present_sum
from muybridge.backbones import Pretrained, load
from muybridge.backbones.adapters import LoRA
from muybridge.batch import Batch
from muybridge.cli.jobs import Trainer
from muybridge.data.memory import Memory
from muybridge.diffusion import Boundary, Conditioning, DenoisingStep, Uniform
from muybridge.errors import UsageError
from muybridge.losses import Denoising, Loss

Tiny = Callable[[str], Path]


def weights(job: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in job.named_parameters()}


# -- draws ---------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_place_and_id_alone(tiny_checkpoint: Tiny) -> None:
    job, shape = finetuning(tiny_checkpoint("wan")), (16, 3, 2, 2)
    together = job.draw(Batch(ids=["a", "b"], prompts=["", ""]), shape)
    first = job.draw(Batch(ids=["a"], prompts=[""]), shape)
    job.samples_seen, job.updates = 1, 7
    second = job.draw(Batch(ids=["b"], prompts=[""]), shape)
    for joint, a, b in zip(together, first, second, strict=True):
        assert torch.equal(joint, torch.cat([a, b]))
    assert not torch.equal(job.draw(Batch(ids=["a"], prompts=[""]), shape)[0], first[0])
    assert not torch.equal(
        finetuning(tiny_checkpoint("wan"), seed=1).draw(Batch(ids=["a"], prompts=[""]), shape)[0], first[0]
    )


def test_a_clip_that_comes_again_is_noised_anew(tiny_checkpoint: Tiny) -> None:
    job, noises = finetuning(tiny_checkpoint("wan")), []
    # One clip in two slots, then in two further micro-batches of the same update.
    for size in (2, 1, 1):
        noises.extend(job.draw(Batch(ids=["a"] * size, prompts=[""] * size), (2, 2, 2, 2))[0])
        job.samples_seen += size
    assert len({tuple(n.flatten().tolist()) for n in noises}) == 4


def test_caption_dropout_has_its_share(tiny_checkpoint: Tiny) -> None:
    job = finetuning(tiny_checkpoint("wan"), caption_dropout=0.3)
    ids = [str(i) for i in range(2000)]
    drop = job.draw(Batch(ids=ids, prompts=[""] * len(ids)), (1,))[2]
    assert drop.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


# -- training ------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_at_fixed_noise(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"), caption_dropout=0.0)
    data = latents_for(job, count=4, batch_size=4)
    run = trainer(tmp_path, max_steps=30)
    before = run.validate(job, data, verbose=False)[0]["val/loss"]
    run.fit(job, data)
    after = run.validate(job, data, verbose=False)[0]["val/loss"]
    assert after < 0.95 * before
    assert (job.updates, job.samples_seen) == (30, 120)


def test_accumulated_micro_batches_are_the_whole_batch(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    results = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        job = finetuning(tiny_checkpoint("wan"))
        run = trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate)
        run.fit(job, latents_for(job, count=8, batch_size=batch_size))
        assert job.updates == 3
        results.append(weights(job))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=2e-6, rtol=1e-5)


def test_losses_are_summed_with_their_weights(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"), losses=[Denoising(), Denoising()], loss_weights=[1.0, 0.5])
    once = finetuning(tiny_checkpoint("wan"))
    assert job.loss_names == ["Denoising", "Denoising_2"]
    values = [trainer(tmp_path).validate(j, latents_for(j), verbose=False)[0]["val/loss"] for j in (job, once)]
    assert values[0] == pytest.approx(1.5 * values[1], rel=1e-5)


def test_validation_is_the_same_for_any_batching(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    values = []
    for size in (1, 4):
        job = finetuning(tiny_checkpoint("wan"), timesteps=Uniform(low=Boundary(700.0)), seed=size)
        values.append(trainer(tmp_path).validate(job, latents_for(job, batch_size=size), verbose=False)[0])
    assert values[0].keys() == values[1].keys() >= {"val/loss", "val/loss_t100", "val/loss_t900"}
    for name, value in values[0].items():
        assert value == pytest.approx(values[1][name], rel=1e-5)


def test_a_skipped_clip_counts_for_nothing(tiny_checkpoint: Tiny) -> None:
    job = finetuning(tiny_checkpoint("wan"))
    job.configure_model()
    clips = latents_for(job).train_dataset()
    one, two = clips[0], clips[1]
    missing = Batch(
        ids=two.ids, latents=torch.zeros_like(two.latents), prompts=two.prompts, present=torch.tensor([False])
    )

    def loss(batch: Batch) -> Tensor:
        clean = batch.latents
        noise, t, _ = job.draw(batch, clean.shape[1:])
        step = job.noised_forward(clean, noise, t, job.text(batch, job.backbone), batch)
        return present_sum(job.total(job.losses_of(step)), batch.present)

    torch.testing.assert_close(loss(collate([one, missing])), loss(one))
    assert loss(missing).item() == 0.0


def test_skipped_clips_leave_the_validation_loss_of_the_others(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    def measure(keep: list[int], size: int) -> float:
        job = finetuning(tiny_checkpoint("wan"))
        clips = [latents_for(job).train_dataset()[i] for i in range(3)]
        marked = [replace(c, present=torch.tensor([i in keep])) for i, c in enumerate(clips)]
        loader = DataLoader(marked, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]
        return trainer(tmp_path).validate(job, loader, verbose=False)[0]["val/loss"]

    values = [measure([0, 2], size) for size in (1, 2, 3)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    both = (measure([0], 1) + measure([2], 1)) / 2
    assert values[0] == pytest.approx(both, rel=1e-5)


class Poison(Loss):
    """The plain loss, but not a number at one update."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step: DenoisingStep) -> Tensor:
        self.calls += 1
        return Denoising()(step) * (float("nan") if self.calls == self.at else 1.0)


def test_an_update_without_a_finite_gradient_is_skipped(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"), losses=[Poison(at=2)])
    job.configure_model()
    seen = []
    watch = pl.Callback()
    watch.on_train_batch_end = lambda *_: seen.append(weights(job))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="not finite"):
        trainer(tmp_path, max_steps=3, callbacks=[watch]).fit(job, latents_for(job))
    first, second, third = seen
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(second[n], third[n]) for n in first)
    assert all(bool(torch.isfinite(p).all()) for p in third.values())


# -- what is trained and saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pattern", "count"),
    [
        ({}, "", 69),
        ({"trainable": r"transformer\.blocks\.\d+\.attn1\.to_v\..*"}, "attn1.to_v", 4),
        ({"adapter": LoRA(rank=2)}, "lora_", 8),
    ],
    ids=["all", "some", "adapter"],
)
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
    tiny_checkpoint: Tiny, tmp_path: Path, settings: dict, pattern: str, count: int
) -> None:
    job = finetuning(tiny_checkpoint("wan"), **settings)
    run = trainer(tmp_path, max_steps=2)
    run.fit(job, latents_for(job))
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert len(saved["state_dict"]) == count
    assert all(pattern in name for name in saved["state_dict"])
    again = finetuning(tiny_checkpoint("wan"), **settings)
    more = trainer(tmp_path, max_steps=3)
    more.fit(again, latents_for(again), ckpt_path=tmp_path / "run.ckpt")
    assert (again.updates, again.samples_seen) == (3, 6)


def test_only_what_is_trained_moves(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"), trainable=r".*\.attn1\.to_v\.weight")
    job.configure_model()
    before = weights(job)
    trainer(tmp_path, max_steps=2).fit(job, latents_for(job))
    moved = {n for n, p in job.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith("attn1.to_v.weight")}


def test_a_checkpoint_of_other_settings_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"), adapter=LoRA(rank=2))
    run = trainer(tmp_path, max_steps=1)
    run.fit(job, latents_for(job))
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    full = finetuning(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match="same adapter"):
        trainer(tmp_path, max_steps=2).fit(full, latents_for(full), ckpt_path=tmp_path / "adapter.ckpt")


def test_an_adapter_with_a_range_is_trained_inside_it_and_measured_everywhere(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    def job(trained: bool) -> dict[str, float]:
        module = finetuning(
            tiny_checkpoint("wan"),
            adapter=LoRA(t_min=Boundary(700.0)),
            timesteps=Uniform(low=Boundary(700.0)),
            validation_quantiles=[0.5, 0.9],
        )
        data, run = latents_for(module), trainer(tmp_path, max_steps=5)
        if trained:
            run.fit(module, data)
        return run.validate(module, data, verbose=False)[0]

    base, after = job(trained=False), job(trained=True)
    # Below the range the trained model is the base model, bit for bit.
    assert after["val/loss_t500"] == base["val/loss_t500"]
    assert after["val/loss_t900"] != base["val/loss_t900"]


@pytest.mark.parametrize(
    ("times", "expert"),
    [(Uniform(low=Boundary(875.0)), "transformer"), (Uniform(high=Boundary(875.0)), "transformer_2")],
)
def test_an_experts_range_trains_that_expert_alone(tiny_checkpoint: Tiny, times: Uniform, expert: str) -> None:
    job = finetuning(tiny_checkpoint("wan22"), "wan22", timesteps=times)
    job.configure_model()
    trained = {n.split(".")[2] for n, p in job.named_parameters() if p.requires_grad}
    assert trained == {expert}
    ends = times.quantile(torch.tensor([0.0, 1.0]), job.backbone.schedule)
    assert all((t >= 875.0) == (expert == "transformer") for t in ends)


# -- videos and exports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "cogvideox", "latte", "unet3d"])
def test_the_exported_pipeline_is_the_trained_model(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    job = finetuning(tiny_checkpoint(name), name)
    trainer(tmp_path, max_steps=2).fit(job, latents_for(job, name))
    job.export(str(tmp_path / "out"))
    exported = load(str(tmp_path / "out"), max_text_length=job.backbone.max_text_length)
    assert exported.checkpoint.pipeline_class == job.backbone.checkpoint.pipeline_class
    noise = job.noise_for(["x"], job.sampling)
    text = exported.encode_text(["a dog"])
    trained = job.backbone.eval().sample(noise, text, steps=2)
    assert torch.equal(exported.sample(noise, text, steps=2), trained)
    base = load(str(tiny_checkpoint(name)), max_text_length=job.backbone.max_text_length)
    assert not torch.allclose(base.sample(noise, text, steps=2), trained, atol=1e-5)


def test_a_run_with_an_average_exports_the_average(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"))
    trainer(tmp_path, max_steps=4, callbacks=[EMA(decay=0.5, warmup=False)]).fit(job, latents_for(job))
    job.export(str(tmp_path / "out"))
    exported = load(str(tmp_path / "out"))
    assert job.average is not None
    averages = dict(job.average.named_buffers())
    last = dict(job.backbone.networks.named_parameters())
    for name, value in exported.networks.named_parameters():
        key = f"backbone.networks.{name}".replace(".", "__")
        torch.testing.assert_close(value, averages[key], atol=0, rtol=0)
    assert any(not torch.equal(value, last[name]) for name, value in exported.networks.named_parameters())


def test_a_clips_video_does_not_depend_on_its_batch(tiny_checkpoint: Tiny) -> None:
    sampling = Sampling(steps=[1000.0, 500.0], guidance=1.0, frames=9, height=16, width=16)
    job = finetuning(tiny_checkpoint("wan"), sampling=sampling)
    job.configure_model()
    together = job.make_videos(Batch(ids=["a", "b"], prompts=["x", "y"]), sampling)
    alone = job.make_videos(Batch(ids=["b"], prompts=["y"]), sampling)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_the_memory_of_texts_is_bounded() -> None:
    text = Conditioning(torch.zeros(1, 4, 8))
    memory: Memory[Conditioning] = Memory(3 * text.nbytes, lambda kept: kept.nbytes)
    for i in range(10):
        memory.put(str(i), text)
        memory.find("0")
    assert len(memory) == 3
    assert memory.find("0") is not None
    assert memory.find("9") is not None
    assert memory.find("5") is None


def test_predict_writes_every_clip_and_is_a_function_of_its_id(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    frames = []
    for run in ("a", "b"):
        job = finetuning(tiny_checkpoint("wan"))
        data = latents_for(job)
        trainer(tmp_path / run, callbacks=[Samples()]).predict(job, data, return_predictions=False)
        files = sorted((tmp_path / run / "predictions").glob("*.mp4"))
        assert [f.stem for f in files] == ["clip-000", "clip-001"]
        with av.open(str(files[0])) as container:
            frames.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert len(frames[-1]) == SHAPES["wan"][0]
    assert all((a == b).all() for a, b in zip(*frames, strict=True))


def test_samples_appear_at_their_updates(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"))
    samples = Samples(prompts=["a dog", "a cat"], every=2, at_start=True)
    trainer(tmp_path, max_steps=4, callbacks=[samples]).fit(job, latents_for(job))
    folders = sorted((tmp_path / "samples").iterdir())
    assert [f.name for f in folders] == ["update-0000000", "update-0000002", "update-0000004"]
    assert sorted(p.name for p in folders[0].iterdir()) == ["00.mp4", "01.mp4", "sheet.png"]


@pytest.mark.parametrize("name", ["wan", "unet3d"])  # the second has dropout, which must stay off
def test_sampling_does_not_change_training(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    results = []
    for callbacks in ([], [Samples(prompts=["a dog"], every=1)]):
        job = finetuning(tiny_checkpoint(name), name)
        trainer(tmp_path, max_steps=3, callbacks=callbacks).fit(job, latents_for(job, name))
        results.append(weights(job))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_videos_outside_lightnings_steps_have_the_precision_of_the_run(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, seen = finetuning(tiny_checkpoint("wan")), []
    plain = type(job.backbone).denoise

    def denoise(*args: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return plain(*args)

    monkeypatch.setattr(type(job.backbone), "denoise", denoise)
    settings: dict[str, Any] = dict(precision="bf16-mixed", accelerator="cpu", devices=1, logger=False)
    samples = Samples(prompts=["a dog"], every=1)
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[samples], **settings).fit(job, latents_for(job))
    sampled = [mixed for learns, mixed in seen if not learns]
    assert sampled, "the callback has sampled"
    assert all(mixed for _, mixed in seen), "in the callback as in training"
    seen.clear()
    verbs = Trainer(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **settings)
    verbs.run_with(job, lambda: job.make_videos(Batch(ids=["a"], prompts=["x"]), job.sampling))
    assert seen
    assert all(mixed for _, mixed in seen), "and in other verbs of the command"


# -- refusals ------------------------------------------------------------------------------------------------------


class Scalar(Loss):
    """A loss that forgot the batch."""

    def forward(self, step: object) -> Tensor:
        return torch.zeros(())


class Forgetful(Loss):
    """A loss that forgot to return."""

    def forward(self, step: object) -> Tensor:
        torch.zeros(1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"losses": []}, "at least one loss"),
        ({"loss_weights": [1.0, 2.0]}, "one weight for each loss"),
        ({"caption_dropout": 1.0}, "share from 0"),
        ({"validation_quantiles": [0.0]}, "between 0 and 1"),
        ({"adapter": LoRA(), "trainable": ".*"}, "one of them"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(tiny_checkpoint: Tiny, settings: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        finetuning(tiny_checkpoint("wan"), **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainable": "nothing"}, "matches no parameter"),
        ({"timesteps": Uniform(low=Boundary(900.0), high=Boundary(0.5, "sigma"))}, "range is empty"),
        ({"adapter": LoRA(targets="blocks.*to_w")}, "hits no linear layer"),
        ({"adapter": LoRA(t_min=Boundary(700.0))}, "times inside the adapter's range"),
        ({"components": ["denoiser", "vae"]}, "caption_dropout is 0.1"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_training(tiny_checkpoint: Tiny, settings: dict, says: str) -> None:
    if "components" in settings:
        settings = {"backbone": Pretrained(str(tiny_checkpoint("wan")), **settings)}
    with pytest.raises(UsageError, match=says):
        finetuning(tiny_checkpoint("wan"), **settings).configure_model()


def test_half_precision_of_everything_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"))
    with pytest.raises(UsageError, match="bf16-mixed"):
        trainer(tmp_path, max_steps=1, precision="bf16-true").fit(job, latents_for(job))


def test_low_precision_weights_are_not_trained(tiny_checkpoint: Tiny) -> None:
    job = finetuning(tiny_checkpoint("wan"), backbone=Pretrained(str(tiny_checkpoint("wan")), dtype="bfloat16"))
    with pytest.raises(UsageError, match="float32"):
        job.configure_model()


@pytest.mark.parametrize(
    ("loss", "says"), [(Scalar, r"Scalar returned shape \(\)"), (Forgetful, "Forgetful returned None")]
)
def test_a_loss_that_gives_no_number_per_sample_is_named(
    tiny_checkpoint: Tiny, tmp_path: Path, loss: type[Loss], says: str
) -> None:
    job = finetuning(tiny_checkpoint("wan"), losses=[loss()])
    with pytest.raises(UsageError, match=says):
        trainer(tmp_path, max_steps=1).fit(job, latents_for(job))


def test_export_refuses_to_overwrite(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    job = finetuning(tiny_checkpoint("wan"))
    job.configure_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        job.export(str(tmp_path / "out"))
