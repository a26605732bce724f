"""The distillation job: who trains when, on what, and what is left of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.distilling import STEPS, distillation, opened, prompts
from support.jobs import LatentClips, trainer
from torch import Tensor

from callbacks.ema import EMA
from lightning_modules import Clips, Distillation, memory, two_optimizers
from lightning_modules.optimization import LearningRate
from muybridge.backbones import Causal
from muybridge.backbones.adapters import LoRA
from muybridge.batch import Batch
from muybridge.data.trajectories import TrajectoryBatch
from muybridge.errors import UsageError
from muybridge.losses import Adversarial, DistributionMatching, Loss, MotionScoreMatching, Regression

Tiny = Callable[[str], Path]


def weights(job: Distillation, role: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in job.trained(role).items()}


class Watch(pl.Callback):
    """What each micro-batch changed, and what was logged."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.before = {r: weights(pl_module, r) for r in ("student", "critic")}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        after = {r: weights(pl_module, r) for r in ("student", "critic")}
        moved = [r[0] for r in after if any(not torch.equal(after[r][n], self.before[r][n]) for n in after[r])]
        self.changed.append("".join(moved))
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(job: Distillation, root: Path, iterations: int, data: Any = None, **settings: Any) -> Watch:
    watch = Watch()
    callbacks = [*settings.pop("callbacks", ()), watch]
    run = trainer(root, max_steps=iterations, callbacks=callbacks, **settings)
    run.fit(job, datamodule=data if data is not None else prompts())
    assert run.global_step == job.iterations == iterations
    return watch


# -- who trains when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "student", "critic", "wanted"),
    [
        (2, 1, 1, ["sc", "c", "sc", "c", "sc"]),
        (2, 2, 1, ["", "sc", "c", "", "sc"]),
        (3, 1, 2, ["", "sc", "", "c", "", "c", "", "sc"]),
    ],
)
def test_the_critic_steps_every_iteration_and_the_student_every_so_many(
    ratio: int, student: int, critic: int, wanted: list[str], tiny_checkpoint: Tiny, tmp_path: Path
):
    job = distillation(tiny_checkpoint("wan"), update_ratio=ratio, student_accumulate=student, critic_accumulate=critic)
    iterations = sum("c" in w for w in wanted)
    watch = fit(job, tmp_path, iterations, prompts(16, batch_size=1))
    assert watch.changed == wanted
    assert job.updates == sum("s" in w for w in wanted) == -(-iterations // ratio)
    assert job.samples_seen == len(wanted)


def test_the_teacher_stays_and_all_three_begin_at_its_weights(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"))
    job.configure_model()
    start = {n: p.detach().clone() for n, p in job.teacher.named_parameters()}
    for backbone in (job.student, job.critic):
        assert backbone is not job.teacher
        assert all(torch.equal(p, start[n]) for n, p in backbone.named_parameters())
    watch = fit(job, tmp_path, 2)
    assert watch.changed == ["sc", "c"]
    assert all(torch.equal(p, start[n]) and p.grad is None for n, p in job.teacher.named_parameters())
    assert set(job.state_dict()) == set(job.trained("student")) | set(job.trained("critic")), "no frozen weights"


def test_accumulated_micro_batches_are_the_whole_batch(tiny_checkpoint: Tiny, tmp_path: Path):
    left = []
    for size, accumulate in ((2, 1), (1, 2)):
        # One step: where a rollout is left is drawn for each micro-batch.
        job = distillation(
            tiny_checkpoint("wan"), steps=[1000.0], student_accumulate=accumulate, critic_accumulate=accumulate
        )
        fit(job, tmp_path, 3, prompts(8, size))
        assert job.iterations == 3
        left.append(weights(job, "student") | weights(job, "critic"))
    for name, value in left[0].items():
        torch.testing.assert_close(left[1][name], value, atol=5e-6, rtol=1e-5)


# -- what a turn computes ----------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tiny_checkpoint: Tiny, tmp_path: Path) -> Callable[..., tuple[Distillation, Batch]]:
    """A job in a run that has just begun, and a batch."""

    def make(**settings: Any) -> tuple[Distillation, Batch]:
        job = distillation(tiny_checkpoint("wan"), **settings)
        run = trainer(tmp_path, max_steps=1, limit_train_batches=0)
        run.fit(job, datamodule=prompts())
        return job, Batch(ids=["a", "b"], prompts=["a dog", "rain"])

    return make


def test_both_branches_in_one_batch_are_what_they_are_apart(ready: Any):
    job, batch = ready(guidance=4.0)
    text, draw = job.text(batch, job.teacher), job.draw(batch, "student", job.latent_shape())
    t = torch.tensor([900.0, 300.0])
    together = job.guided_teacher(draw.start, t, text)
    job.batch_guidance = False
    torch.testing.assert_close(together, job.guided_teacher(draw.start, t, text), atol=1e-5, rtol=1e-5)
    # Elsewhere 3.0 means c + 3 (c - u), which is 4 here.
    given, without = job.teacher(draw.start, t, text), job.teacher(draw.start, t, job.teacher.unconditional().expand(2))
    torch.testing.assert_close(together, given + 3.0 * (given - without), atol=1e-5, rtol=1e-5)


def test_a_rollout_that_goes_to_the_end_is_what_the_sampler_makes(ready: Any):
    """The student is trained at the inputs that it is given when it samples."""
    job, batch = ready()
    text, shape = job.text(batch, job.teacher), job.latent_shape()
    job.exit_step = lambda turn: len(STEPS) - 1
    sample, _ = job.roll_out(batch, text, "student", job.draw(batch, "student", shape))
    draw = job.draw(batch, "student", shape)
    made = job.student.sample(draw.start, text, steps=STEPS, generator=draw.generators)
    assert torch.equal(sample.detach(), made)
    assert sample.requires_grad


def test_where_a_rollout_is_left_covers_all_steps_and_is_the_same_for_all_samples(ready: Any):
    job, _ = ready()
    seen = []
    for job.iterations in range(60):
        seen.append(job.exit_step("student"))
        assert seen[-1] == job.exit_step("student")
    assert {seen.count(i) > 8 for i in range(3)} == {True}


def test_the_gradient_in_the_weights_is_that_of_the_losses_sum(ready: Any):
    """The losses see a leaf, and one backward pass takes the sum of their gradients."""
    job, batch = ready(losses=[DistributionMatching(), MotionScoreMatching(weight=0.7)], loss_weights=[1.0, 2.0])
    text, share = job.text(batch, job.teacher), torch.tensor(2.0)
    job.log = lambda *a, **k: None
    job.student_turn(batch, text, share)
    found = {n: p.grad.clone() for n, p in job.trained("student").items()}
    job.zero_grad()
    draw = job.draw(batch, "student", job.latent_shape())
    sample, _ = job.roll_out(batch, text, "student", draw)
    step = job.score_step(sample, draw, text)
    (DistributionMatching()(step) + 2.0 * MotionScoreMatching(weight=0.7)(step)).mean().backward()
    for name, parameter in job.trained("student").items():
        torch.testing.assert_close(parameter.grad, found[name], atol=1e-8, rtol=1e-4)
    assert all(p.grad is None for r in (job.critic, job.teacher) for p in r.parameters())


def test_frames_share_one_noise_where_a_loss_asks_for_it(ready: Any):
    job, batch = ready(losses=[MotionScoreMatching(shared_noise=True)])
    noise = job.draw(batch, "student", (4, 3, 2, 2), shared_noise=True).noise
    assert torch.equal(noise[:, :, 0], noise[:, :, 2])
    job.log = lambda *a, **k: None
    seen: list[bool] = []
    job.draw = lambda b, turn, shape, shared=False: (
        seen.append(shared),
        Distillation.draw(job, b, turn, shape, shared),
    )[1]
    job.student_turn(batch, job.text(batch, job.teacher), torch.tensor(2.0))
    assert seen == [True]


def test_the_critic_can_learn_from_the_students_own_clip(ready: Any, monkeypatch: pytest.MonkeyPatch):
    job, batch = ready(reuse_sample=True)
    job.log = lambda *a, **k: None
    rolled: list[str] = []
    real = Distillation.roll_out

    def spy(self: Any, batch: Any, text: Any, turn: str, draw: Any) -> Any:
        rolled.append(turn)
        return real(self, batch, text, turn, draw)

    monkeypatch.setattr(Distillation, "roll_out", spy)
    job.training_step(batch, 0)
    job.training_step(batch, 1)
    assert rolled == ["student", "critic"], "in the second iteration there is no student's turn to take one from"


def test_noised_data_is_noised_to_the_students_steps(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), rollout="noised_data")
    run = trainer(tmp_path, max_steps=1, limit_train_batches=0)
    clips = LatentClips(job.latent_shape(), count=4)
    run.fit(job, datamodule=clips)
    batch = Batch(ids=[str(i) for i in range(40)], latents=torch.ones(40, *job.latent_shape()), prompts=["a"] * 40)
    inputs: list[tuple[Tensor, Tensor]] = []
    job.student.forward = lambda z, t, text: (inputs.append((z, t)), z)[1]  # type: ignore[method-assign]
    draw = job.draw(batch, "student", job.latent_shape())
    job.roll_out(batch, job.text(batch, job.teacher), "student", draw)
    ((z, t),) = inputs
    assert set(t.tolist()) == set(STEPS)
    sigma = (t / 1000.0).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(z, (1.0 - sigma) + sigma * draw.start, atol=1e-6, rtol=0)


CLEAN: dict[str, Callable[..., Tensor]] = {
    "flow": lambda z, p, a, s: z - s * p,
    "epsilon": lambda z, p, a, s: (z - s * p) / a,
    "v": lambda z, p, a, s: a * z - s * p,
}
TARGET: dict[str, Callable[..., Tensor]] = {
    "flow": lambda x, e, a, s: e - x,
    "epsilon": lambda x, e, a, s: e,
    "v": lambda x, e, a, s: a * e - s * x,
}


@pytest.mark.parametrize(
    ("name", "kind"), [("wan", "flow"), ("cogvideox", "v"), ("latte", "epsilon"), ("unet3d", "epsilon")]
)
def test_both_turns_are_their_equations_on_every_family(name: str, kind: str, tiny_checkpoint: Tiny, tmp_path: Path):
    """The teacher under guidance, the critic without, one time and noise; then the critic's own regression, and it alone."""
    steps = [1000.0, 500.0]
    job = distillation(tiny_checkpoint(name), name, guidance=4.0, steps=steps)
    assert fit(job, tmp_path, 1).changed == ["sc"], "three networks that differ"
    batch, job.log = Batch(ids=["a", "b"], prompts=["a dog", "rain"]), lambda *a, **k: None
    schedule, text, shape = job.teacher.schedule, job.text(batch, job.teacher), job.latent_shape()
    empty = job.teacher.pair_unconditional(text, job.teacher.unconditional())

    def levels(t: Tensor) -> list[Tensor]:
        return [c.float().view(-1, 1, 1, 1, 1) for c in schedule.coefficients(t)]

    def drawn(turn: str) -> tuple[Any, Tensor, list[Tensor]]:
        draw = job.draw(batch, turn, shape)
        t = job.score_times.quantile(draw.u, schedule)
        return draw, t, levels(t)

    job.exit_step = lambda turn: 0  # type: ignore[method-assign]
    draw, t, (a, s) = drawn("student")
    with torch.no_grad():
        first = schedule.snap(torch.full((2,), 1000.0))
        sample, _ = job.roll_out(batch, text, "student", draw)
        wanted = CLEAN[kind](draw.start, job.student(draw.start, first, text), *levels(first))
        torch.testing.assert_close(sample, wanted, atol=1e-5, rtol=1e-5)
        step = job.score_step(sample, draw, text)
        z = a * sample + s * draw.noise
        given, without = job.teacher(z, t, text), job.teacher(z, t, empty)
        real = CLEAN[kind](z, without + 4.0 * (given - without), a, s)
        fake = CLEAN[kind](z, job.critic(z, t, text), a, s)
    for found, value in ((step.noisy, z), (step.real_x0, real), (step.fake_x0, fake)):
        torch.testing.assert_close(found, value, atol=1e-4, rtol=1e-4)

    job.critic_turn(batch, text, torch.tensor(2.0), sample)
    found = {n: p.grad.clone() for n, p in job.trained("critic").items()}
    assert all(p.grad is None for role in (job.student, job.teacher) for p in role.parameters())
    job.zero_grad()
    draw, t, (a, s) = drawn("critic")
    says = job.critic(a * sample + s * draw.noise, t, text)
    ((says - TARGET[kind](sample, draw.noise, a, s)) ** 2).mean().backward()
    for n, parameter in job.trained("critic").items():
        torch.testing.assert_close(found[n], parameter.grad, atol=1e-6, rtol=1e-4)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_two_adapters_share_one_copy_of_the_weights(tiny_checkpoint: Tiny, tmp_path: Path):
    lora = LoRA(rank=2, projections=["q", "k", "v", "o"])
    job = distillation(tiny_checkpoint("wan"), student_lora=lora, critic_lora=lora)
    whole = distillation(tiny_checkpoint("wan"))
    base = opened(tiny_checkpoint("wan")).materialize()
    start = {n: p.clone() for n, p in base.named_parameters()}
    watch = fit(job, tmp_path, 3)
    assert watch.changed == ["sc", "c", "sc"]
    whole.configure_model()

    def held(module: torch.nn.Module) -> int:
        return sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())

    adapters = sum(p.nbytes for r in ("student", "critic") for p in job.trained(r).values())
    assert held(job) == held(base) + adapters
    assert held(whole) == 3 * held(base)
    assert set(job.state_dict()) == set(job.trained("student")) | set(job.trained("critic"))
    assert all(".student." in n for n in job.trained("student"))

    # Each role runs the base with its own adapter alone, and outside of turns the student is what the base runs as.
    batch = Batch(ids=["a"], prompts=["a dog"])
    text, z = job.text(batch, job.teacher), torch.randn(1, *job.latent_shape())
    t = torch.tensor([700.0])
    with torch.no_grad():
        says = {}
        for role in ("teacher", "student", "critic"):
            with job.playing(role) as backbone:  # type: ignore[arg-type]
                says[role] = backbone(z, t, text)
        assert torch.equal(says["teacher"], base(z, t, text))
        assert torch.equal(says["student"], job.sampled(z, t, text))
        assert len({float(v.sum()) for v in says.values()}) == 3
    assert all(
        torch.equal(p, start[n.replace(".base_layer", "")])
        for n, p in job.teacher.named_parameters()
        if "lora_" not in n
    )
    # What comes out is the base with the student's adapter in it, and nothing of the critic's.
    (out,) = job.export(str(tmp_path / "student"))
    with torch.no_grad():
        merged = opened(out).materialize()(z, t, text)
    torch.testing.assert_close(merged, says["student"], atol=1e-5, rtol=1e-5)
    assert float((merged - says["critic"]).abs().max()) > 1e-3


def test_an_adapter_of_one_role_leaves_the_other_a_copy(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), critic_lora=LoRA(rank=2))
    assert fit(job, tmp_path, 2).changed == ["sc", "c"]
    assert job.student is not job.teacher
    assert job.critic is job.teacher


def test_adapters_train_the_same_with_gradient_checkpointing(tiny_checkpoint: Tiny, tmp_path: Path):
    left = []
    for checkpointing in (False, True):
        teacher = opened(tiny_checkpoint("wan"), gradient_checkpointing=checkpointing)
        job = distillation(tiny_checkpoint("wan"), teacher=teacher, student_lora=LoRA(rank=2), critic_lora=LoRA(rank=2))
        fit(job, tmp_path, 2)
        left.append(weights(job, "student") | weights(job, "critic"))
    for name in left[0]:
        torch.testing.assert_close(left[1][name], left[0][name], atol=1e-6, rtol=1e-5)


# -- other losses ------------------------------------------------------------------------------------------------------


def test_the_adversarial_term_trains_a_discriminator_with_the_critic(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), losses=[DistributionMatching(), Adversarial(every=1)], update_ratio=1)
    job.configure_model()
    heads = {n for n in job.trained("critic") if n.startswith("losses.1.heads")}
    assert heads
    assert not heads & set(job.trained("student"))
    clips = LatentClips(job.latent_shape(), count=4)
    watch = fit(job, tmp_path, 2, clips)
    assert watch.changed == ["sc", "sc"]
    assert {"critic/verdict", "student/share_of_Adversarial"} <= set(watch.logged[-1])
    assert heads <= set(job.state_dict())


def test_pairs_are_regressed_on_where_the_rollout_is_left_at_its_first_step(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), losses=[Regression()], steps=[1000.0])
    run = trainer(tmp_path, max_steps=1, limit_train_batches=0)
    run.fit(job, datamodule=prompts())
    job.log = lambda *a, **k: None
    paths = torch.randn(2, 3, *job.latent_shape())
    times = torch.tensor([[1000.0, 500.0, 0.0]] * 2)
    batch = TrajectoryBatch(ids=["a", "b"], times=times, latents=paths, prompts=["a dog", "rain"])
    clips, pairs = job._clips_and_pairs(batch)
    text = job.text(clips, job.teacher)
    job.student_turn(clips, text, torch.tensor(2.0), pairs)
    found = {n: p.grad.clone() for n, p in job.trained("student").items()}
    job.zero_grad()
    z, t = paths[:, 0], torch.tensor([1000.0, 1000.0])
    made = job.teacher.schedule.to_x0(job.student(z, t, text), z, t)
    ((made - paths[:, -1]) ** 2).mean().backward()
    for name, parameter in job.trained("student").items():
        torch.testing.assert_close(parameter.grad, found[name], atol=1e-7, rtol=1e-4)
    with pytest.raises(UsageError, match="TrajectoryData"):
        job._clips_and_pairs(Batch(ids=["a"], prompts=["a dog"]))
    # A repeat that only fills up the batch counts for nothing here as well.
    job.zero_grad()
    clips, pairs = job._clips_and_pairs(replace(batch, present=torch.tensor([True, False])))
    job.student_turn(clips, text, torch.tensor(1.0), pairs)
    found = {n: p.grad.clone() for n, p in job.trained("student").items()}
    job.zero_grad()
    made = job.teacher.schedule.to_x0(job.student(z, t, text), z, t)
    ((made[:1] - paths[:1, -1]) ** 2).mean().backward()
    for name, parameter in job.trained("student").items():
        torch.testing.assert_close(parameter.grad, found[name], atol=1e-7, rtol=1e-4)


def test_what_the_students_clips_are_compared_with_is_of_their_size(tiny_checkpoint: Tiny, tmp_path: Path):
    """Pairs of a noise and what this teacher made of it, and real clips for a discriminator."""
    wan = tiny_checkpoint("wan")
    pairs, clips = prompts(), LatentClips((16, 3, 2, 2), 4)
    fine = dict(family="Wan", frames=9, height=16, width=16, times=[1000.0, 0.0])
    for change, words in (
        (dict(frames=13), "data with clips of 13 frames of 16x16"),
        (dict(family="LTX"), "trajectories of LTX for a Wan"),
        (dict(times=[750.0, 0.0]), "begin at time 750"),
    ):
        pairs.made = {**fine, **change}  # type: ignore[attr-defined]
        job = distillation(wan, losses=[Regression()])
        with pytest.raises(UsageError, match=words):
            fit(job, tmp_path, 1, pairs)
        assert not job.teacher.networks
    clips.clip_sizes = [(9, 16, 16), (9, 32, 32)]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="9 frames of 16x16, as the student makes them"):
        fit(distillation(wan, losses=[Adversarial()]), tmp_path, 1, clips)


def test_a_causal_student_is_at_another_step_in_each_block(tiny_checkpoint: Tiny, tmp_path: Path):
    student = opened(tiny_checkpoint("wan"), causal=Causal(block=1))
    job = distillation(tiny_checkpoint("wan"), student=student, losses=[DistributionMatching(), MotionScoreMatching()])
    times: list[Tensor] = []
    real = student.denoise
    student.forward = lambda z, t, text: (times.append(t), real(z, t, text))[1]  # type: ignore[method-assign]
    watch = fit(job, tmp_path, 2)
    assert watch.changed == ["sc", "c"]
    blocks = [t for t in times if t.ndim == 2]
    assert blocks
    assert {float(x) for t in blocks for x in t.flatten()} <= {*STEPS, 0.0}
    assert any(len(set(row.tolist())) > 1 for t in blocks for row in t)
    assert "student/share_of_MotionScoreMatching" in watch.logged[-1]


def test_a_causal_students_rollout_is_its_sampler_block_by_block(ready: Any, tiny_checkpoint: Tiny):
    """On the keys and values of finished blocks: what a block is given at a step does not follow from noisy ones before it."""
    job, batch = ready(student=opened(tiny_checkpoint("wan"), causal=Causal(block=1)))
    student, text, shape = job.student, job.text(batch, job.teacher), job.latent_shape()
    blocks, count = shape[1], len(STEPS)
    real, calls, given = student.denoise, [], []
    student.denoise = lambda z, t, text: (calls.append(z), real(z, t, text))[1]
    draw = job.draw(batch, "student", shape)
    clip = student.sample(draw.start, text, STEPS, generator=draw.generators)
    # Each block is denoised at every step, and all but the last once more for their keys and values.
    assert [len(z[0, 0]) for z in calls] == [1] * (blocks * (count + 1) - 1)
    inputs = [torch.cat([calls[block * (count + 1) + step] for block in range(blocks)], 2) for step in range(count)]

    student.denoise = real
    student.forward = lambda z, t, text: (given.append(z), real(z, t, text))[1]
    for picks in ([[0, 0, 0], [1, 1, 1]], [[2, 2, 2], [3, 3, 3]], [[0, 1, 2], [3, 2, 0]]):
        chosen = torch.tensor(picks)
        job._times_of_samples = lambda draw, spans, chosen=chosen: torch.tensor([*STEPS, 0.0])[chosen]
        job.roll_out(batch, text, "student", job.draw(batch, "student", shape))
        for sample, row in enumerate(picks):
            for block, step in enumerate(row):
                wanted = clip if step == count else inputs[step]
                assert torch.equal(given[-1][sample, :, block], wanted[sample, :, block])


def test_a_causal_adapter_shares_its_weights_with_a_teacher_and_a_critic_that_see_whole_clips(ready: Any):
    lora = LoRA(rank=2)
    job, batch = ready(student_lora=lora, critic_lora=lora)
    path, text = job.teacher.checkpoint.given, job.text(batch, job.teacher)
    z, t = torch.randn(2, *job.latent_shape()), torch.tensor([900.0, 300.0])
    shared, _ = ready(teacher=opened(path, causal=Causal(block=1)), student_lora=lora, critic_lora=lora)
    changed = z.clone()
    changed[:, :, -1] += 1.0
    with torch.no_grad():
        for role in ("teacher", "critic"):
            with job.playing(role) as plain, shared.playing(role) as other:
                assert torch.equal(other(z, t, text), plain(z, t, text))
        with shared.playing("student") as student:
            assert torch.equal(student(z, t, text)[:, :, :-1], student(changed, t, text)[:, :, :-1])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Poison(Loss):
    """Distribution matching that is not a number at some calls."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.calls, self.real = at, -1, DistributionMatching()

    def forward(self, step: Any) -> Tensor:
        self.calls += 1
        return self.real(step) * (float("nan") if self.calls in self.at else 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_the_critic_goes_on(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), losses=[Poison(1)], update_ratio=1)
    with pytest.warns(UserWarning, match="student's gradient is not finite"):
        watch = fit(job, tmp_path, 3)
    assert watch.changed == ["sc", "c", "sc"]
    assert (job.updates, job.iterations) == (2, 3)


def test_a_diverged_run_ends(tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(two_optimizers, "MAX_SKIPPED", 2)
    job = distillation(tiny_checkpoint("wan"), losses=[Poison(*range(9))], update_ratio=1)
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(UsageError, match="not finite in 2 updates"):
        fit(job, tmp_path, 4)


def test_gradients_are_clipped_by_role(tiny_checkpoint: Tiny, tmp_path: Path):
    seen: dict[str, float] = {}

    class Norms(torch.optim.SGD):
        def __init__(self, parameters: Any, name: str) -> None:
            super().__init__(parameters, lr=0.0)
            self.name = name

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()
            seen[self.name] = float(torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]]))

    job = distillation(
        tiny_checkpoint("wan"),
        student_clip=1e-4,
        critic_clip=None,
        student_optimizer=lambda p: Norms(p, "student"),
        critic_optimizer=lambda p: Norms(p, "critic"),
    )
    watch = fit(job, tmp_path, 1)
    assert seen["student"] == pytest.approx(1e-4, rel=1e-3)
    assert watch.logged[0]["student/grad_norm"] > 1e-4
    assert seen["critic"] == pytest.approx(watch.logged[0]["critic/grad_norm"], rel=1e-5)


def test_each_roles_schedule_counts_its_own_updates(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(
        tiny_checkpoint("wan"),
        student_learning_rate=LearningRate(warmup=2),
        critic_learning_rate=LearningRate(shape="cosine"),
    )
    logged = fit(job, tmp_path, 5).logged
    # The student is updated in iterations 0, 2 and 4, and between them its last number stands.
    assert [row["student/lr"] for row in logged] == pytest.approx([1e-3 / 3] * 2 + [2e-3 / 3] * 2 + [1e-3])
    cosine = [1e-3 * 0.5 * (1.0 + math.cos(math.pi * n / 5)) for n in range(5)]
    assert [row["critic/lr"] for row in logged] == pytest.approx(cosine)


def test_mixed_precision_keeps_weights_and_losses_in_float32(tiny_checkpoint: Tiny, tmp_path: Path):
    seen: list[torch.dtype] = []

    class Look(DistributionMatching):
        def forward(self, step: Any) -> Tensor:
            seen.extend((step.sample.dtype, step.real_x0.dtype, step.fake_x0.dtype))
            return super().forward(step)

    job = distillation(tiny_checkpoint("wan"), losses=[Look()], steps=STEPS[:2], update_ratio=1)
    # Left at the second step, after a forward without gradients under the same autocast.
    job.exit_step = lambda turn: 1  # type: ignore[method-assign]
    assert fit(job, tmp_path, 2, precision="bf16-mixed").changed == ["sc", "sc"]
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in job.parameters()} == {torch.float32}


# -- what is logged and kept -------------------------------------------------------------------------------------------


def test_what_is_logged_tells_of_motion_and_of_noise_levels(tiny_checkpoint: Tiny, tmp_path: Path):
    job = distillation(tiny_checkpoint("wan"), losses=[DistributionMatching(), MotionScoreMatching(weight=0.0)])
    logged = fit(job, tmp_path, 2, prompts(16, batch_size=8)).logged[-1]
    names = {"student/loss", "student/grad_norm", "critic/grad_norm", "critic/loss", "student/x0_gap"}
    assert names | {"student/motion", "student/motion_of_teacher", "student/motion_ratio"} <= set(logged)
    assert logged["student/share_of_MotionScoreMatching"] == 0.0
    assert logged["student/share_of_DistributionMatching"] == 1.0
    assert logged["student/motion_ratio"] == pytest.approx(
        logged["student/motion"] / logged["student/motion_of_teacher"], rel=1e-5
    )
    levels = [n for n in logged if n.startswith("critic/loss_from_t")]
    assert len(levels) >= 2
    assert min(logged[n] for n in levels) <= logged["critic/loss"] <= max(logged[n] for n in levels)


def test_a_run_that_was_cut_goes_on_bit_for_bit(tiny_checkpoint: Tiny, tmp_path: Path):
    """Cut between two updates of the student, so that its counter, not the clock, says when the next is due."""

    def make() -> Distillation:
        return distillation(
            tiny_checkpoint("wan"), losses=[DistributionMatching(), MotionScoreMatching()], update_ratio=3
        )

    whole = make()
    fit(whole, tmp_path, 5, callbacks=[EMA(decay=0.5)])
    first = make()
    run = trainer(tmp_path, max_steps=2, callbacks=[EMA(decay=0.5)])
    run.fit(first, datamodule=prompts())
    run.save_checkpoint(tmp_path / "two.ckpt")
    second = make()
    run = trainer(tmp_path, max_steps=5, callbacks=[EMA(decay=0.5)])
    run.fit(second, datamodule=prompts(), ckpt_path=str(tmp_path / "two.ckpt"))
    assert (second.iterations, second.updates, second.samples_seen) == (5, 2, 10)
    state = whole.state_dict()
    assert {n for n in state if n.startswith("average.")} == {
        f"average.{n.replace('.', '__')}" for n in whole.trained("student")
    }
    for name, value in second.state_dict().items():
        assert torch.equal(value, state[name]), name
    other = distillation(tiny_checkpoint("wan"), steps=[1000.0, 500.0], update_ratio=3)
    with pytest.raises(UsageError, match="trained at the steps"):
        trainer(tmp_path, max_steps=5, callbacks=[EMA()]).fit(
            other, datamodule=prompts(), ckpt_path=str(tmp_path / "two.ckpt")
        )


# -- what is refused before weights load -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(steps=[1000.0, 757.0, 800.0]), "step list"),
        (dict(steps=[]), "step list"),
        (dict(losses=[]), "losses is empty"),
        (dict(loss_weights=[1.0, 2.0]), "loss_weights"),
        (dict(guidance=0.0), "guidance"),
        (dict(update_ratio=0), "update_ratio"),
        (dict(student_clip=0.0), "student_clip"),
        (dict(losses=[MotionScoreMatching()], clips=Clips(frames=1, height=16, width=16)), "two latent frames"),
        (dict(student_lora=LoRA(targets="nothing.*")), "hits no linear layer"),
        (dict(losses=[Adversarial(layers="nothing")]), "hits no linear layer"),
        (dict(losses=[Adversarial(), Adversarial()]), "one discriminator"),
        (dict(clips=Clips(frames=8, height=16, width=16)), "frames"),
        (dict(losses=[Regression()], rollout="noised_data"), "Regression, and rollout is noised_data"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str, tiny_checkpoint: Tiny):
    with pytest.raises(UsageError, match=words):
        distillation(tiny_checkpoint("wan"), **settings).check()


def test_roles_must_go_together(tiny_checkpoint: Tiny):
    wan, other = tiny_checkpoint("wan"), opened(tiny_checkpoint("cogvideox"), "cogvideox")
    with pytest.raises(UsageError, match="student is CogVideoX and the teacher Wan"):
        distillation(wan, student=other).check()
    with pytest.raises(UsageError, match="Regression, and the student is causal"):
        distillation(wan, losses=[Regression()], student=opened(wan, causal=Causal(block=1))).check()
    experts = distillation(tiny_checkpoint("wan22"), "wan22")
    experts._trainer = type("T", (), {"precision": "32-true", "world_size": 2})()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="distil on one process"):
        experts.check()
    with pytest.raises(UsageError, match="max_text_length"):
        distillation(wan, student=opened(wan, max_text_length=32)).check()
    with pytest.raises(UsageError, match="both given"):
        distillation(wan, student=opened(wan), student_lora=LoRA())
    with pytest.raises(UsageError, match="per-frame times"):
        opened(tiny_checkpoint("cogvideox"), "cogvideox", causal=Causal())
    with pytest.raises(UsageError, match="tells apart"):
        distillation(tiny_checkpoint("latte"), "latte", steps=[999.2, 999.0]).check()


def test_too_little_memory_is_refused_before_weights_load(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three copies of four bytes a weight, and gradients and two moments of two of them: 9 times the weights."""
    base = opened(tiny_checkpoint("wan")).materialize()
    size = sum(p.nbytes for p in base.parameters())
    job = distillation(tiny_checkpoint("wan"))
    assert sum(memory.memory_needed(job).values()) == 9 * size
    monkeypatch.setattr(memory, "memory_of", lambda device: 8 * size)
    with pytest.raises(UsageError, match="student_lora and critic_lora"):
        fit(job, tmp_path, 1)
    assert not job.teacher.networks
    small = distillation(tiny_checkpoint("wan"), student_lora=LoRA(rank=2), critic_lora=LoRA(rank=2))
    fit(small, tmp_path, 1)


def test_clips_are_asked_for_where_there_are_prompts_alone(tiny_checkpoint: Tiny, tmp_path: Path):
    for settings in (dict(rollout="noised_data"), dict(losses=[Adversarial()])):
        job = distillation(tiny_checkpoint("wan"), **settings)
        with pytest.raises(UsageError, match="PromptData has prompts alone"):
            fit(job, tmp_path, 1)
        assert not job.teacher.networks
    job = distillation(tiny_checkpoint("wan"))
    job._trainer = type("T", (), {"precision": "16-mixed", "world_size": 1})()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="loss scaling"):
        job._check_run()
