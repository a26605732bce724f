"""The schedules agree with diffusers' own and with what was published."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.schedules import SCHEDULES

from muybridge.backbones.noise import rectified_flow, variance_preserving
from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule, shift_level, shifted_steps
from muybridge.errors import UsageError

TIMES = (3, 250, 500, 777, 950)


def config_of(scheduler: Any) -> dict[str, Any]:
    """What ``save_pretrained`` writes."""
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


def vp_schedulers() -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler, DDPMScheduler

    scaled = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    cog = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
    return {
        "modelscope": DDIMScheduler(**scaled, set_alpha_to_one=False, steps_offset=1),
        "latte": DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False),
        "ddpm_v": DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        "ddpm_x0": DDPMScheduler(prediction_type="sample", clip_sample=False),
        "ddim_zero_snr": DDIMScheduler(**scaled, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        "cogvideox_2b": CogVideoXDDIMScheduler(**cog, snr_shift_scale=3.0, timestep_spacing="trailing"),
        "cogvideox_5b": CogVideoXDDIMScheduler(**cog, snr_shift_scale=1.0, timestep_spacing="trailing"),
        "cogvideox_dpm": CogVideoXDPMScheduler(**cog, snr_shift_scale=1.0, timestep_spacing="trailing"),
    }


VP = (
    "modelscope",
    "latte",
    "ddpm_v",
    "ddpm_x0",
    "ddim_zero_snr",
    "cogvideox_2b",
    "cogvideox_5b",
    "cogvideox_dpm",
)


@pytest.mark.parametrize("name", VP)
def test_vp_noise_is_the_schedulers_own(name: str) -> None:
    scheduler = vp_schedulers()[name]
    schedule = variance_preserving(config_of(scheduler))
    clean, noise = torch.randn(len(TIMES), 4, 2, 3, 3), torch.randn(len(TIMES), 4, 2, 3, 3)
    expected = scheduler.add_noise(clean, noise, torch.tensor(TIMES))
    torch.testing.assert_close(
        schedule.add_noise(clean, noise, torch.tensor(TIMES).float()), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["modelscope", "latte", "cogvideox_2b", "cogvideox_5b"])
def test_a_ddim_step_is_our_estimates_at_the_next_time(name: str) -> None:
    scheduler = vp_schedulers()[name]
    schedule = variance_preserving(config_of(scheduler))
    scheduler.set_timesteps(20)
    for index in (0, 5, 12):
        t, following = scheduler.timesteps[index], scheduler.timesteps[index + 1]
        noisy, prediction = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)
        x0 = schedule.to_x0(prediction, noisy, t[None].float())
        eps = schedule.to_eps(prediction, noisy, t[None].float())
        ours = schedule.add_noise(x0, eps, following[None].float())
        expected = scheduler.step(prediction, t, noisy).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_flow_noise_and_step_are_the_schedulers_own(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = rectified_flow(config_of(scheduler))
    assert schedule.shift == shift
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[[0, 3, 6, 9]]
    clean, noise = torch.randn(4, 4, 2, 3, 3), torch.randn(4, 4, 2, 3, 3)
    torch.testing.assert_close(
        schedule.add_noise(clean, noise, t), scheduler.scale_noise(clean, t, noise), rtol=0, atol=1e-5
    )
    for index in range(9):
        t, following = scheduler.timesteps[index : index + 1], scheduler.timesteps[index + 1 : index + 2]
        noisy, prediction = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)
        x0, eps = schedule.to_x0(prediction, noisy, t), schedule.to_eps(prediction, noisy, t)
        expected = scheduler.step(prediction, t[0], noisy).prev_sample
        torch.testing.assert_close(schedule.add_noise(x0, eps, following), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_target_and_estimates_are_inverses(name: str) -> None:
    schedule = SCHEDULES[name]
    clean, noise = torch.randn(5, 4, 2, 3, 3).double(), torch.randn(5, 4, 2, 3, 3).double()
    t = torch.tensor([40.0, 300.0, 600.0, 850.0, 990.0], dtype=torch.float64)
    noisy, target = schedule.add_noise(clean, noise, t), schedule.target(clean, noise, t)
    torch.testing.assert_close(schedule.to_x0(target, noisy, t), clean, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.to_eps(target, noisy, t), noise, rtol=0, atol=1e-10)
    for kind, expected in (("x0", clean), ("epsilon", noise), ("flow", noise - clean)):
        torch.testing.assert_close(schedule.to_kind(target, noisy, t, kind), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b"])
def test_zero_terminal_snr_is_exact_and_finite(name: str) -> None:
    schedule = SCHEDULES[name]
    clean, noise, t = torch.randn(1, 4, 1, 2, 2), torch.randn(1, 4, 1, 2, 2), torch.tensor([1000.0])
    assert torch.equal(schedule.add_noise(clean, noise, t), noise)
    prediction = torch.randn(1, 4, 1, 2, 2)
    assert torch.isfinite(schedule.to_x0(prediction, noise, t)).all()
    torch.testing.assert_close(schedule.to_x0(schedule.target(clean, noise, t), noise, t), clean)
    assert schedule.logsnr(t).item() == -math.inf


def test_per_frame_times_are_per_frame() -> None:
    schedule = FlowSchedule()
    clean, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    t = torch.tensor([[0.0, 500.0, 1000.0], [250.0, 250.0, 250.0]])
    noisy = schedule.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy[0, :, 0], clean[0, :, 0])
    torch.testing.assert_close(noisy[0, :, 2], noise[0, :, 2])
    torch.testing.assert_close(noisy[1:], schedule.add_noise(clean[1:], noise[1:], torch.tensor([250.0])))
    with pytest.raises(ValueError, match=r"\(B, F\)"):
        schedule.add_noise(clean, noise, torch.zeros(2, 4))


def test_half_precision_latents_stay_so() -> None:
    for schedule in SCHEDULES.values():
        z = schedule.add_noise(
            torch.randn(2, 4, 1, 2, 2).bfloat16(), torch.randn(2, 4, 1, 2, 2), torch.tensor([3.0, 900.0])
        )
        assert z.dtype == torch.bfloat16
        assert schedule.to_x0(z, z, torch.tensor([3.0, 900.0])).dtype == torch.float32


def test_times_of_vp_snap_to_the_nearest_entry() -> None:
    schedule = SCHEDULES["modelscope"]
    t = torch.tensor([-3.0, 0.4, 499.6, 998.9, 1000.0])
    assert schedule.snap(t).tolist() == [0.0, 0.0, 500.0, 999.0, 999.0]
    for a, b in zip(schedule.coefficients(t), schedule.coefficients(schedule.snap(t)), strict=True):
        assert torch.equal(a, b)
    alpha, sigma = schedule.coefficients(t.double())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_published_step_lists_under_a_shift() -> None:
    raw = [1000.0, 750.0, 500.0, 250.0]
    assert shifted_steps(raw, 5.0) == pytest.approx([1000.0, 937.5, 833.333, 625.0], abs=1e-3)
    assert shifted_steps(raw, 8.0) == pytest.approx([1000.0, 960.0, 888.889, 727.273], abs=1e-3)
    assert shifted_steps(raw, 1.0) == raw
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_level(shift_level(u, 3.0), 1 / 3.0), u)


def published(name: str, t: float) -> float:
    return SCHEDULES[name].logsnr(torch.tensor(t, dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("name", "t", "logsnr"),
    [("modelscope", 700, -2.41), ("latte", 700, -4.97), ("cogvideox_5b", 950, -7.44), ("cogvideox_2b", 950, -8.59)],
)
def test_published_ratios(name: str, t: float, logsnr: float) -> None:
    assert published(name, t) == pytest.approx(logsnr, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"prediction_type": "nonsense"}, "prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"num_train_timesteps": 4000}, "num_train_timesteps"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_a_table_that_cannot_be_built_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        variance_preserving({"_class_name": "DDIMScheduler", **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prediction_type": "epsilon", "use_flow_sigmas": True}, "prediction_type"),
        ({"use_flow_sigmas": False, "prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ({"num_train_timesteps": 100}, "num_train_timesteps"),
    ],
)
def test_a_flow_schedule_that_is_none_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        rectified_flow({"_class_name": "UniPCMultistepScheduler", **changes})


def test_missing_keys_mean_the_defaults_of_the_class() -> None:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

    for cls in (CogVideoXDDIMScheduler, DDIMScheduler):
        bare = variance_preserving({"_class_name": cls.__name__})
        torch.testing.assert_close(bare.alphas_cumprod.float(), cls().alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="shift"):
        FlowSchedule(0.0)
    with pytest.raises(ValueError, match="falling"):
        VPSchedule(torch.tensor([0.1, 0.9]), "epsilon")
    with pytest.raises(ValueError, match="beta_schedule"):
        VPSchedule.from_betas(beta_schedule="cosine")


def test_fraction_of_the_steps() -> None:
    flow: NoiseSchedule = SCHEDULES["flow_shift5"]
    # Half of the steps of a sampler with shift 5 are spent above 833.
    assert flow.time_of_fraction(0.5) == pytest.approx(1000 * 5 / 6)
    assert (flow.time_of_fraction(0.0), flow.time_of_fraction(1.0)) == (1000.0, 0.0)
    assert SCHEDULES["latte"].time_of_fraction(0.25) == pytest.approx(749.25)
