"""Losses of a student turn against what their equations say of the gradient, exactly."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muybridge.diffusion import Conditioning, FlowSchedule, NoiseSchedule, ScoreStep, VPSchedule
from muybridge.errors import UsageError
from muybridge.losses import Adversarial, DistributionMatching, MotionScoreMatching, Regression

SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": FlowSchedule(5.0),
    "epsilon": VPSchedule.from_betas(),
    "v": VPSchedule.from_betas(prediction="v", snr_shift=3.0, zero_terminal_snr=True),
}
SHAPE = (3, 4, 5, 2, 3)


def draw(seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(family: str = "flow", shape: tuple[int, ...] = SHAPE, **changes: Any) -> ScoreStep:
    """A turn whose two clean estimates come from raw predictions of the family, in float64."""
    schedule = SCHEDULES[family]
    sample = draw(0, shape).requires_grad_()
    t = torch.tensor([920.0, 500.0, 60.0])[: shape[0]]
    noisy = schedule.add_noise(sample.detach(), draw(1, shape), t)
    real, fake = (schedule.to_x0(draw(seed, shape), noisy, t) for seed in (2, 3))
    text = Conditioning(torch.zeros(shape[0], 1, 1))
    return replace(ScoreStep(sample, noisy, t, real, fake, text), **changes)


def gradient(loss: nn.Module, at: ScoreStep) -> Tensor:
    """Of the mean over the samples, as jobs take it."""
    return torch.autograd.grad(loss(at).mean(), at.sample)[0]


def pull_of(at: ScoreStep) -> Tensor:
    """``g = (x̂_fake - x̂_real)/w`` by its equation."""
    w = torch.stack([(x - r).abs().mean() for x, r in zip(at.sample.detach(), at.real_x0, strict=True)])
    return (at.fake_x0 - at.real_x0) / w.view(-1, 1, 1, 1, 1)


def difference_operator(frames: int) -> Tensor:
    """``Δ`` as a matrix, (F - 1, F)."""
    eye = torch.eye(frames, dtype=torch.float64)
    return eye[1:] - eye[:-1]


# -- distribution matching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SCHEDULES)
def test_the_gradient_is_the_normalised_difference_of_the_clean_estimates(family: str):
    at = step(family)
    torch.testing.assert_close(
        gradient(DistributionMatching(), at), pull_of(at) / at.sample.numel(), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("family", SCHEDULES)
def test_the_gradient_points_along_the_difference_of_the_scores(family: str):
    """At one time the scores' difference is the clean estimates' by a positive number, α/σ², the same for all frames."""
    at, schedule = step(family), SCHEDULES[family]
    scores = schedule.score(at.fake_x0, at.noisy, at.t) - schedule.score(at.real_x0, at.noisy, at.t)
    found = gradient(DistributionMatching(), at)
    cosines = torch.nn.functional.cosine_similarity(found.flatten(1), scores.flatten(1), dim=1)
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    at, loss = step(), DistributionMatching()
    alone = replace(
        at,
        sample=at.sample[:1].detach().requires_grad_(),
        **{n: getattr(at, n)[:1] for n in ("noisy", "t", "real_x0", "fake_x0")},
    )
    torch.testing.assert_close(gradient(loss, alone)[0], 3.0 * gradient(loss, at)[0], rtol=1e-10, atol=1e-14)


def test_the_gradient_does_not_change_with_a_shift_of_everything():
    at = step()
    moved = replace(
        at, sample=(at.sample + 7.0).detach().requires_grad_(), real_x0=at.real_x0 + 7.0, fake_x0=at.fake_x0 + 7.0
    )
    for loss in (DistributionMatching(), MotionScoreMatching(normalizer="own")):
        torch.testing.assert_close(gradient(loss, moved), gradient(loss, at), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "loss", [DistributionMatching(), MotionScoreMatching(), MotionScoreMatching(normalizer="own")], ids=str
)
def test_nothing_pulls_where_the_critic_says_what_the_teacher_says(loss: nn.Module):
    at = step()
    same = replace(at, fake_x0=at.real_x0)
    assert float(loss(same).abs().max().detach()) == 0.0
    assert float(gradient(loss, same).abs().max()) == 0.0
    # Also where the student is already what the teacher would make of it: 0/0 without the floor.
    there = replace(at, sample=at.real_x0.clone().requires_grad_(), fake_x0=at.real_x0)
    assert float(gradient(loss, there).abs().max()) == 0.0


def test_the_normaliser_has_a_floor():
    at = step()
    there = replace(at, sample=at.real_x0.clone().requires_grad_())
    found = gradient(DistributionMatching(floor=0.5), there)
    torch.testing.assert_close(found, (at.fake_x0 - at.real_x0) / 0.5 / at.sample.numel(), rtol=1e-10, atol=1e-13)


def test_bfloat16_samples_are_compared_in_float64():
    """x - g in bfloat16 would lose g where it is small beside x."""
    at = step()
    coarse = (100.0 + at.sample.detach()).to(torch.bfloat16).requires_grad_()
    low = replace(at, sample=coarse, real_x0=at.real_x0 + 100.0, fake_x0=at.real_x0 + 100.0 + 1e-6)
    found = DistributionMatching()(low)
    assert bool((found > 0).all())
    assert found.dtype == torch.float64


# -- motion score matching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_with_the_shared_normaliser_both_losses_are_one_operator_on_the_gradient(family: str, weight: float):
    """``DMD + λ MSM`` is the gradient of DMD times ``I + λ c ΔᵀΔ``, ``c = F/(F - 1)``."""
    at = step(family)
    dmd = gradient(DistributionMatching(), at)
    both = dmd + gradient(MotionScoreMatching(weight=weight), at)
    frames = SHAPE[2]
    delta = difference_operator(frames)
    operator = torch.eye(frames, dtype=torch.float64) + weight * frames / (frames - 1) * delta.T @ delta
    torch.testing.assert_close(both, torch.einsum("fg,bcghw->bcfhw", operator, dmd), rtol=0, atol=1e-10)
    torch.testing.assert_close(both.mean(2), dmd.mean(2), rtol=0, atol=1e-12)
    known = torch.tensor(
        [1 + weight * frames / (frames - 1) * (2 - 2 * math.cos(math.pi * k / frames)) for k in range(frames)]
    )
    torch.testing.assert_close(torch.linalg.eigvalsh(operator), known.double(), rtol=0, atol=1e-6)


def test_its_own_normaliser_rescales_the_motion_part_of_each_sample():
    at = step()
    shared, own = (gradient(MotionScoreMatching(normalizer=n), at) for n in ("shared", "own"))
    rest = (at.sample - at.real_x0).detach()
    w, w_m = (x.abs().flatten(1).mean(1) for x in (rest, rest[:, :, 1:] - rest[:, :, :-1]))
    torch.testing.assert_close(own, shared * (w / w_m).view(-1, 1, 1, 1, 1), rtol=1e-10, atol=1e-13)


def test_weight_zero_is_distribution_matching_bit_for_bit():
    at = step()
    dmd = gradient(DistributionMatching(), at)
    assert torch.equal(dmd + gradient(MotionScoreMatching(weight=0.0), at), dmd)


def test_a_skipped_first_frame_is_not_pulled():
    at = step()
    found = gradient(MotionScoreMatching(skip_first_frame=True), at)
    assert float(found[:, :, 0].abs().max()) == 0.0
    delta = difference_operator(SHAPE[2] - 1)
    wanted = torch.einsum("fg,bcghw->bcfhw", delta.T @ delta, pull_of(at)[:, :, 1:])
    torch.testing.assert_close(found[:, :, 1:] * at.sample.numel() * 3 / 5, wanted, rtol=0, atol=1e-10)


def test_a_linear_feature_acts_by_its_square_on_the_differences():
    """``∂L/∂x = ΔᵀAᵀA Δ g``: here ``A`` averages 1x1x3 cells of the picture."""
    at = step()
    found = gradient(MotionScoreMatching(feature=nn.AvgPool3d((1, 1, 3))), at)
    delta, g = difference_operator(SHAPE[2]), pull_of(at)
    moved = torch.einsum("fg,bcghw->bcfhw", delta, g)
    pooled = moved.mean(4, keepdim=True).expand_as(moved) / 3
    count = moved.numel() / 3
    torch.testing.assert_close(found * count, torch.einsum("fg,bcfhw->bcghw", delta, pooled), rtol=0, atol=1e-10)


class Square(nn.Module):
    """A feature that differences do not pass through."""

    def forward(self, x: Tensor) -> Tensor:
        return x**2


@pytest.mark.parametrize("normalizer", ["shared", "own"])
def test_a_feature_is_taken_of_frames_and_then_differences_of_it(normalizer: Any):
    """Eq. 13, ``f(x²…xᶠ) - f(x¹…xᶠ⁻¹)``: with ``f = x²`` the gradient in ``x`` is ``2 x Δᵀ(Δf(x̂_fake) - Δf(x̂_real))/w``."""
    at = step()
    found = gradient(MotionScoreMatching(feature=Square(), normalizer=normalizer), at)
    delta, x = difference_operator(SHAPE[2]), at.sample.detach()
    moved = {
        n: torch.einsum("fg,bcghw->bcfhw", delta, y**2)
        for n, y in (("x", x), ("real", at.real_x0), ("fake", at.fake_x0))
    }
    rest = x - at.real_x0 if normalizer == "shared" else moved["x"] - moved["real"]
    pulled = (moved["fake"] - moved["real"]) / rest.abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    wanted = 2 * x * torch.einsum("fg,bcfhw->bcghw", delta, pulled)
    torch.testing.assert_close(found * pulled.numel(), wanted, rtol=1e-9, atol=1e-9)


def test_a_feature_is_not_trained_and_keeps_its_own_precision():
    """A module as anyone builds it is in float32; steps are compared in float64, and jobs run under autocast."""
    torch.manual_seed(0)
    feature, at = nn.Conv3d(4, 2, 1), step()
    fine = gradient(MotionScoreMatching(feature=copy.deepcopy(feature).double()), at)
    loss = MotionScoreMatching(feature=feature)
    assert not any(p.requires_grad for p in loss.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(loss, at)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, fine, rtol=1e-4, atol=1e-7)
    assert fine.abs().max() > 1e-3


def test_differing_score_times_of_frames_are_refused_with_the_reason():
    at = step()
    t = torch.full((3, 5), 500.0)
    same = replace(at, t=t)
    assert torch.equal(gradient(MotionScoreMatching(), same), gradient(MotionScoreMatching(), at))
    with pytest.raises(UsageError, match="belong to different noise levels"):
        MotionScoreMatching()(replace(at, t=t + torch.arange(5.0)))


@pytest.mark.parametrize(("frames", "skip"), [(1, False), (2, True)])
def test_clips_without_motion_are_refused(frames: int, skip: bool):
    with pytest.raises(UsageError, match="at least two latent frames"):
        MotionScoreMatching(skip_first_frame=skip)(step(shape=(3, 4, frames, 2, 3)))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UsageError, match="away from the teacher's motion"):
        MotionScoreMatching(weight=-0.1)
    with pytest.raises(UsageError, match="weight"):
        MotionScoreMatching(weight=math.nan)
    for wrong in (dict(normalizer="none"), dict(floor=0.0)):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            MotionScoreMatching(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="floor"):
        DistributionMatching(floor=0.0)


# -- regression and adversarial ----------------------------------------------------------------------------------------


def test_regression_pulls_towards_the_teachers_outcome():
    at = step()
    target = draw(9)
    found = gradient(Regression(), replace(at, target=target))
    torch.testing.assert_close(found, 2 * (at.sample.detach() - target) / at.sample.numel(), rtol=1e-10, atol=1e-14)
    signs = gradient(Regression("l1"), replace(at, target=target))
    torch.testing.assert_close(signs, (at.sample.detach() - target).sign() / at.sample.numel(), rtol=1e-10, atol=0)
    near = replace(at, target=at.sample.detach() + 1e-4)
    torch.testing.assert_close(Regression("huber")(near), 5.0 * Regression()(near), rtol=1e-4, atol=0)
    assert float(gradient(Regression(), at).abs().max()) == 0.0, "a turn without a pair"


def test_the_adversarial_term_is_the_non_saturating_one():
    logits = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    at = step(logits=logits)
    torch.testing.assert_close(Adversarial()(at), torch.log1p(torch.exp(-logits)), rtol=1e-12, atol=0)
    # At the critic's optimum D = log p_real/p_fake; the verdict of equal distributions is 2 log 2.
    zero = torch.zeros(2)
    torch.testing.assert_close(Adversarial().verdict(zero, zero), torch.full((2,), 2 * math.log(2.0)).double())
    with pytest.raises(UsageError, match="discriminator"):
        Adversarial()(step())


@pytest.mark.parametrize("name", ["wan", "unet3d"])
def test_the_discriminator_reads_the_critic_sample_by_sample(name: str, tiny_checkpoint: Any):
    from support.denoising import denoising_inputs, open_tiny

    critic = open_tiny(tiny_checkpoint(name), gradient_checkpointing=True)
    loss = Adversarial(every=1)
    loss.attach(critic)
    latents, t, text = denoising_inputs(critic)
    latents.requires_grad_()

    def judge(latents: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        with loss.reading(critic) as outputs:
            critic(latents, t, text)
        assert len(outputs) == len(loss.names) > 1
        return loss.judge(outputs, len(latents))

    both = judge(latents, t, text)
    alone = torch.cat([judge(latents[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    (towards,) = torch.autograd.grad(both[0], latents)
    assert towards[0].abs().sum() > 0
    assert float(towards[1].abs().max()) == 0.0, "one sample's verdict does not depend on another"
    again = Adversarial(every=1)
    again.attach(critic)
    assert all(torch.equal(a, b) for a, b in zip(loss.parameters(), again.parameters(), strict=True))
