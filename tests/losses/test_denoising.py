"""The plain loss: hand-computed cases, one per prediction kind."""

from __future__ import annotations

import pytest
import torch

from muybridge.diffusion import Conditioning, DenoisingStep, FlowSchedule, NoiseSchedule, VPSchedule
from muybridge.errors import UsageError
from muybridge.losses import Denoising


def make_step(schedule: NoiseSchedule, error: torch.Tensor, t: torch.Tensor) -> DenoisingStep:
    """A step whose prediction is off from its target by ``error``, constant per sample."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(len(t), 2, 3, 4, 4, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = schedule.add_noise(clean, noise, t)
    target = schedule.target(clean, noise, t)
    prediction = target + error.view(-1, 1, 1, 1, 1)
    return DenoisingStep(
        clean=clean,
        noise=noise,
        noisy=noisy,
        t=t,
        prediction=prediction,
        target=target,
        x0=schedule.to_x0(prediction, noisy, t),
        conditioning=Conditioning(torch.zeros(len(t), 1, 1)),
        weights=None,
        schedule=schedule,
    )


SCHEDULES = {
    "flow": FlowSchedule(),
    "epsilon": VPSchedule.from_betas(),
    "v": VPSchedule.from_betas(prediction="v", zero_terminal_snr=True),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_is_the_squared_error_of_each_sample(kind: str) -> None:
    error = torch.tensor([0.0, 0.5, 2.0])
    step = make_step(SCHEDULES[kind], error, torch.tensor([10.0, 500.0, 990.0]))
    torch.testing.assert_close(Denoising()(step), error**2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_min_snr_weights_by_the_clipped_ratio(kind: str) -> None:
    schedule, t = SCHEDULES[kind], torch.tensor([100.0, 500.0, 900.0])
    error = torch.ones(3)
    alpha, sigma = schedule.coefficients(t.double())
    snr = (alpha / sigma) ** 2
    expected = snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1.0)
    loss = Denoising(weighting="min_snr")(make_step(schedule, error, t))
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-4)


def test_min_snr_is_zero_and_finite_where_nothing_is_left_of_the_signal() -> None:
    loss = Denoising(weighting="min_snr")(make_step(SCHEDULES["v"], torch.ones(1), torch.tensor([999.0])))
    assert loss.item() == 0.0


def test_reads_half_precision_predictions_in_float32() -> None:
    step = make_step(SCHEDULES["flow"], torch.full((1,), 0.01), torch.tensor([500.0]))
    half = DenoisingStep(
        **{**step.__dict__, "prediction": step.prediction.bfloat16(), "target": step.prediction.bfloat16()}
    )
    assert Denoising()(half).dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"weighting": "snr"}, {"gamma": 0.0}])
def test_refuses_settings_that_mean_nothing(arguments: dict) -> None:
    with pytest.raises(UsageError, match="expected"):
        Denoising(**arguments)
