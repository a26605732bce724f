"""Losses of motion: hand-computed cases, what they do not see, and gradients that reach the adapter alone in every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.denoising import denoising_inputs, open_tiny
from torch import Tensor

from muybridge import tiny
from muybridge.backbones import Backbone
from muybridge.backbones.adapters import LoRA, adapter_parameters, disabled, inject
from muybridge.backbones.attention import AttentionRecord
from muybridge.backbones.taps import AttentionTap
from muybridge.diffusion import Boundary, Conditioning, DenoisingStep, FlowSchedule, NoiseSchedule, VPSchedule
from muybridge.diffusion.steps import denoising_step
from muybridge.errors import UsageError
from muybridge.losses import (
    AppearanceDebiased,
    AttentionMotionFlow,
    FrameResidual,
    Loss,
    MotionFeatureMatching,
    MotionFeatures,
    SpaceTimeFeatures,
    TemporalHighPass,
)
from muybridge.losses.attention_motion_flow import expected_flow
from muybridge.losses.frozen_attention import in_order, key_features
from muybridge.losses.motion_features import motion_channels
from muybridge.losses.space_time_features import frame_pairs

Tiny = Callable[[str], Path]
UNIFIED = ("wan", "wan22", "cogvideox", "cogvideox_rope", "hunyuan", "ltx", "mochi")
SCHEDULES = {
    "flow": FlowSchedule(),
    "epsilon": VPSchedule.from_betas(),
    "v": VPSchedule.from_betas(prediction="v", zero_terminal_snr=True),
}


def step_of(schedule: NoiseSchedule, error: Tensor, t: float = 600.0) -> DenoisingStep:
    """A step whose prediction is off by ``error``, (B, C, F, H, W)."""
    clean, noise = torch.randn(2, *error.shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((len(error),), t)
    target = schedule.target(clean, noise, times)

    def denoise(noisy: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        return target + error

    return denoising_step(denoise, schedule, clean, noise, times, Conditioning(torch.zeros(len(error), 1, 1)))


# -- on predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
def test_an_error_that_is_the_same_in_all_frames_is_no_error_of_motion(kind: str) -> None:
    error = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 4, -1, -1)
    step = step_of(SCHEDULES[kind], error)
    torch.testing.assert_close(TemporalHighPass()(step), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(FrameResidual()(step), torch.zeros(2), atol=1e-5, rtol=0)


def test_the_high_pass_of_two_frames_is_a_quarter_of_their_squared_difference() -> None:
    error = torch.zeros(1, 1, 2, 1, 1)
    error[0, 0, 1] = 3.0
    # Means removed: -1.5 and 1.5.
    assert TemporalHighPass()(step_of(SCHEDULES["flow"], error)).item() == pytest.approx(2.25, abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_debiased_loss_is_the_mean_over_all_anchor_frames(beta: float) -> None:
    error = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    a = (beta**2 + 1.0) ** 0.5
    by_anchor = [((a * error - beta * error[:, :, k : k + 1]) ** 2).flatten(1).mean(1) for k in range(4)]
    expected = (error**2).flatten(1).mean(1) + torch.stack(by_anchor).mean(0)
    found = AppearanceDebiased(beta)(step_of(SCHEDULES["epsilon"], error))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_the_same_in_all_frames_weighs_less_in_the_debiased_loss() -> None:
    """``3 - 2√2`` against ``3``, at β = 1."""
    still = torch.ones(1, 1, 2, 1, 1)
    moving = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1)
    loss = AppearanceDebiased(plain_weight=0.0)
    assert loss(step_of(SCHEDULES["flow"], still)).item() == pytest.approx(3.0 - 8.0**0.5, abs=1e-5)
    assert loss(step_of(SCHEDULES["flow"], moving)).item() == pytest.approx(3.0, abs=1e-5)


def test_residuals_at_a_right_angle_lose_one_and_opposite_ones_two() -> None:
    schedule = FlowSchedule()
    clean = torch.zeros(1, 2, 3, 1, 1)
    clean[0, 0, :, 0, 0] = torch.tensor([0.0, 1.0, 2.0])  # moves along the first channel
    for estimate, expected in (
        ([[0.0, 5.0, 10.0], [0.0, 0.0, 0.0]], 0.0),  # the same way, five times as far
        ([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], 1.0),  # along the second
        ([[0.0, -1.0, -2.0], [0.0, 0.0, 0.0]], 2.0),  # back
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], 1.0),  # there and back: (0 + 2)/2
    ):
        x0 = torch.tensor(estimate).view(1, 2, 3, 1, 1)
        noise, t = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([700.0])
        noisy = schedule.add_noise(clean, noise, t)
        prediction = (noisy - x0) / 0.7
        target = noise - clean
        step = DenoisingStep(
            clean, noise, noisy, t, prediction, target, x0, Conditioning(torch.zeros(1, 1, 1)), None, schedule
        )
        assert FrameResidual(kind="x0")(step).item() == pytest.approx(expected, abs=1e-4)


def test_the_released_residual_takes_absolute_values_along_the_frames() -> None:
    error = torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    step = step_of(SCHEDULES["epsilon"], error)
    a, b = (x.diff(dim=2).abs() for x in (step.prediction, step.target))
    cosine = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))
    found = FrameResidual(mode="released")(step)
    torch.testing.assert_close(found, (1 - cosine).flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_a_noise_residual_is_not_a_flow_residual() -> None:
    error = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    step = step_of(SCHEDULES["flow"], error)
    values = {kind: FrameResidual(kind=kind)(step).item() for kind in ("epsilon", "x0", "flow")}
    assert len({round(v, 4) for v in values.values()}) == 3
    assert FrameResidual()(step).item() == values["x0"]
    noise_step = step_of(SCHEDULES["epsilon"], error)
    assert FrameResidual()(noise_step).item() == FrameResidual(kind="epsilon")(noise_step).item()


@pytest.mark.parametrize("loss", [FrameResidual(), TemporalHighPass()])
def test_one_frame_has_no_motion(loss: Loss) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        loss(step_of(SCHEDULES["flow"], torch.ones(1, 2, 1, 2, 2)))


# -- on records, by hand -----------------------------------------------------------------------------------------------


def record(
    query: Tensor, key: Tensor, role: str = "unified", grid: tuple[int, int, int] = (2, 1, 1)
) -> AttentionRecord:
    unturned = key.transpose(1, 2).flatten(2)
    return AttentionRecord("x", "", role, query, key, None, 1.0, 1, grid, None, unturned)  # type: ignore[arg-type]


def test_maps_of_two_frames_by_hand() -> None:
    """One place, two frames, one head: a score of ln 3 makes rows of 3/4 and 1/4; without scores they are halves."""
    one = torch.ones(1, 1, 2, 1)
    scores = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 2, 1)
    found, wanted = record(one, scores), record(one, torch.zeros(1, 1, 2, 1))
    loss = MotionFeatureMatching(temporal_weight=16.0, cross_weight=0.0)
    # Every entry is off by 1/4: 16 · 1/16.
    assert loss.compare([found], [wanted]).tolist() == pytest.approx([1.0])
    # Two layers are averaged before they are compared: off by 1/8.
    assert loss.compare([found, wanted], [wanted, wanted]).tolist() == pytest.approx([0.25])


def test_cross_maps_by_hand() -> None:
    query = torch.ones(1, 1, 2, 1)
    found = record(query, torch.tensor([math.log(3.0), 0.0]).view(1, 1, 2, 1), role="cross")
    wanted = record(query, torch.zeros(1, 1, 2, 1), role="cross")
    loss = MotionFeatureMatching(temporal_weight=0.0, cross_weight=32.0)
    assert loss.compare([found], [wanted]).tolist() == pytest.approx([2.0])
    with pytest.raises(UsageError, match="none of them temporal"):
        MotionFeatureMatching(cross_weight=0.0).compare([found], [wanted])


def test_expected_flow_follows_the_keys() -> None:
    """A 2x2 grid: each place's query meets one key of the next frame, which lies one to the right (wrapping)."""
    codes = torch.eye(4) * 40.0
    frame = torch.eye(4)
    query = torch.stack([frame, frame]).flatten(0, 1).view(1, 1, 8, 4)
    moved = codes[[1, 0, 3, 2]]
    flow = expected_flow(record(query, torch.cat([codes, moved]).view(1, 1, 8, 4), grid=(2, 2, 2)), 2.0)
    torch.testing.assert_close(
        flow, torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]]), atol=1e-6, rtol=0
    )


def test_space_time_features_see_differences_between_frames_alone() -> None:
    wanted = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])
    assert frame_pairs(wanted * 3.0 + 7.0, wanted).item() == pytest.approx(0.0, abs=1e-6)
    assert frame_pairs(-wanted, wanted).item() == pytest.approx(2.0, abs=1e-6)
    turned = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    assert frame_pairs(turned, wanted).item() == pytest.approx(1.0, abs=1e-6)


def test_motion_channels_are_those_that_change_most() -> None:
    features = torch.randn(1, 6, 5, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    features[..., 2] += torch.linspace(-1, 1, 6).view(1, 6, 1)
    features[..., 5] += 0.5 * torch.linspace(-1, 1, 6).view(1, 6, 1)
    assert motion_channels(features - features.mean(1, keepdim=True), 2).tolist() == [[2, 5]]


def test_the_loss_of_motion_features_by_hand() -> None:
    """One place, two frames, four channels: differences from the mean of both frames are ±d/2, so the cosine is that of d."""

    def keys(look: float, moves: list[float]) -> AttentionRecord:
        key = torch.full((2, 4), look)
        key[1] += torch.tensor(moves)
        return record(torch.zeros(1, 1, 2, 4), key.view(1, 1, 2, 4))

    loss, wanted = MotionFeatures(), keys(0.0, [1.0, 0.0, 0.0, 0.0])
    for moves, expected in (
        ([2.0, 0, 0, 0], 0.0),
        ([0, 1.0, 0, 0], 1.0),
        ([-1.0, 0, 0, 0], 2.0),
        ([1.0, 1.0, 0, 0], None),
    ):
        found = loss.layer(keys(5.0, moves), wanted).item()
        assert found == pytest.approx(1.0 - 2.0**-0.5 if expected is None else expected, abs=1e-6)


def test_the_loss_of_displacements_by_hand() -> None:
    """Two places that stay where they are, or change places: off by (±1, 0) at each, 1/2 on average."""
    codes, frame = torch.eye(2) * 40.0, torch.eye(2)
    query = torch.cat([frame, frame]).view(1, 1, 4, 2)
    still, moved = (
        record(query, torch.cat([codes, second]).view(1, 1, 4, 2), grid=(2, 1, 2)) for second in (codes, codes.flip(0))
    )
    assert AttentionMotionFlow().layer(moved, still).tolist() == pytest.approx([0.5])
    assert AttentionMotionFlow().layer(still, still).tolist() == [0.0]


def test_the_loss_of_space_time_features_by_hand() -> None:
    """Places are averaged before frames are compared: a swap of two places is no difference."""
    one = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 2.0]])  # two frames of two places
    other = one[[0, 1, 3, 2]]
    turned = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-1.0, 2.0], [-1.0, 2.0]])  # means (2, 1) and (-1, 2): a right angle
    a, b, c = (record(torch.zeros(1, 1, 4, 2), x.view(1, 1, 4, 2), grid=(2, 1, 2)) for x in (one, other, turned))
    assert SpaceTimeFeatures().layer(b, a).tolist() == pytest.approx([0.0], abs=1e-6)
    assert SpaceTimeFeatures().layer(c, a).tolist() == pytest.approx([1.0], abs=1e-6)


def test_layers_of_a_unet_are_ordered_as_they_run() -> None:
    names = ["up_blocks.0.a", "up_blocks.1.a", "mid_block.a", "down_blocks.1.a", "transformer_in.a", "down_blocks.2.a"]
    assert in_order(names) == [
        "transformer_in.a",
        "down_blocks.1.a",
        "down_blocks.2.a",
        "mid_block.a",
        "up_blocks.0.a",
        "up_blocks.1.a",
    ]


# -- on real networks --------------------------------------------------------------------------------------------------


def adapted(path: Path, **options: bool) -> Backbone:
    """With an adapter whose both matrices are at work."""
    backbone = open_tiny(path, **options)
    inject(backbone, LoRA(t_min=Boundary(300.0)))
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter_parameters(backbone).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return backbone


def real_step(backbone: Backbone, t: float = 900.0) -> DenoisingStep:
    clean, times, text = denoising_inputs(backbone, t=t)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))
    return denoising_step(backbone, backbone.schedule, clean, noise, times, text)


def losses_for(name: str) -> list[Loss]:
    found: list[Loss] = [
        MotionFeatureMatching(),
        FrameResidual(),
        AppearanceDebiased(),
        TemporalHighPass(),
        SpaceTimeFeatures(),
        MotionFeatures(),
    ]
    return [*found, AttentionMotionFlow()] if name in UNIFIED else found


@pytest.mark.parametrize("name", [n for n in tiny.MAKERS if n != "cogvideox_rope"])
def test_gradients_reach_the_adapter_alone(name: str, tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint(name))
    step = real_step(backbone)
    working = {n: p for n, p in adapter_parameters(backbone).items() if "transformer_2." not in n}
    for loss in losses_for(name):
        value = loss(step)
        assert value.shape == (2,)
        assert bool((value > 0).all()), type(loss).__name__
        backbone.zero_grad()
        value.sum().backward(retain_graph=True)
        reached = {n for n, p in backbone.named_parameters() if p.grad is not None}
        assert reached == set(working), type(loss).__name__
        for parameter_name in working:
            assert float(backbone.get_parameter(parameter_name).grad.abs().max()) > 0, (loss, parameter_name)
    # The truth itself loses nothing.
    exact = replace(step, prediction=step.target, x0=step.clean)
    for loss in losses_for(name):
        assert float(loss(exact).abs().max()) < 1e-4, type(loss).__name__


def gradients(backbone: Backbone, loss: Loss) -> dict[str, Tensor]:
    backbone.zero_grad()
    loss(real_step(backbone)).sum().backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(backbone).items() if p.grad is not None}


@pytest.mark.parametrize("name", ["wan", "cogvideox", "unet3d"])
def test_switching_before_backward_is_right_under_checkpointing(name: str, tiny_checkpoint: Tiny) -> None:
    """The trap: adapters are on again when blocks of the frozen pass are recomputed."""
    loss = MotionFeatureMatching()
    plain = gradients(adapted(tiny_checkpoint(name)), loss)
    recomputed = gradients(adapted(tiny_checkpoint(name), gradient_checkpointing=True), loss)
    assert set(plain) == set(recomputed)
    assert plain
    for key, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("name", ["wan", "unet3d"])
def test_no_second_copy_is_as_a_second_copy(name: str, tiny_checkpoint: Tiny) -> None:
    """The same loss from a second, untouched model that runs to its end."""
    backbone, copy = adapted(tiny_checkpoint(name)), open_tiny(tiny_checkpoint(name))
    step = real_step(backbone)
    loss = MotionFeatureMatching(depth=1.0)
    predicted, true, later = loss.latents(step)
    maps = []
    for latents in (predicted, true):
        tap = AttentionTap(copy, kind=("temporal", "cross"))
        tap.run(lambda: copy.denoise(latents, later, step.conditioning))  # noqa: B023 - called at once
        maps.append(list(tap.records))
    torch.testing.assert_close(loss(step), loss.compare(*maps), atol=1e-7, rtol=1e-4)
    with disabled(backbone):
        same = backbone.denoise(true, later, step.conditioning)
    torch.testing.assert_close(same, copy.denoise(true, later, step.conditioning), atol=1e-5, rtol=1e-5)
    # And the adapter is on again.
    again = backbone.denoise(step.noisy, step.t, step.conditioning)
    torch.testing.assert_close(again, step.prediction, atol=1e-6, rtol=1e-6)


def test_only_high_times_count(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    low = real_step(backbone, t=500.0)
    loss = MotionFeatureMatching(t_min=500.0)
    value = loss(low)
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in adapter_parameters(backbone).values() if p.grad is not None)
    mixed = replace(real_step(backbone), t=torch.tensor([900.0, 400.0]))
    found = loss(mixed)
    assert found[0] > 0
    assert found[1] == 0


def test_samples_of_two_experts_are_compared_each_by_its_own(tiny_checkpoint: Tiny) -> None:
    """Wan 2.2 changes networks at 875, and the frozen pass is one of the weights that predicted."""
    backbone = adapted(tiny_checkpoint("wan22"))
    step, t = real_step(backbone), torch.tensor([600.0, 950.0])

    def part(rows: slice) -> DenoisingStep:
        parts = (step.clean[rows], step.noise[rows], t[rows], step.conditioning[rows])
        return denoising_step(backbone, backbone.schedule, *parts)

    together, alone = part(slice(None)), [part(slice(0, 1)), part(slice(1, 2))]
    for loss in losses_for("wan22"):
        torch.testing.assert_close(loss(together), torch.cat([loss(one) for one in alone]), atol=1e-7, rtol=1e-4)
    near = replace(step, t=torch.tensor([880.0, 870.0]))
    assert MotionFeatureMatching().latents(near)[2].tolist() == [875.0, 850.0]


def test_a_base_pass_below_the_gate_is_no_mixed_call(tiny_checkpoint: Tiny) -> None:
    """One sample's later time may lie below the adapter's range while the other's lies inside."""
    backbone = adapted(tiny_checkpoint("wan"))
    step = replace(real_step(backbone), t=torch.tensor([310.0, 900.0]))
    assert bool(torch.isfinite(MotionFeatureMatching(t_min=100.0)(step)).all())
    with pytest.raises(UsageError, match="both sides"):
        backbone.denoise(step.noisy, torch.tensor([290.0, 900.0]), step.conditioning)


def test_layers_are_chosen_by_regex_and_the_rest_is_not_run(tiny_checkpoint: Tiny) -> None:
    backbone = adapted(tiny_checkpoint("wan"))
    step, ran = real_step(backbone), []
    handle = backbone.network.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: ran.append(1))
    MotionFeatureMatching(layers=r"blocks\.0\.attn[12]")(step)
    assert not ran
    MotionFeatureMatching(layers=r"blocks\.\d\.attn1")(step)
    assert ran
    handle.remove()
    with pytest.raises(UsageError, match="hits no module"):
        MotionFeatureMatching(layers=r"nothing")(step)


def test_keys_have_one_layout_in_both_kinds_of_families(tiny_checkpoint: Tiny) -> None:
    for name in ("latte", "cogvideox"):
        backbone = open_tiny(tiny_checkpoint(name))
        latents, t, text = denoising_inputs(backbone)
        tap = AttentionTap(backbone, unturned=True)
        with torch.no_grad():
            tap.run(lambda: backbone.denoise(latents, t, text))  # noqa: B023 - called at once
        frames, height, width = (n // p for n, p in zip(latents.shape[2:], backbone.geometry.patch, strict=True))
        for one in tap.records:
            features = key_features(one)
            assert features.shape[:3] == (2, frames, height * width)
            # A frame's keys at a place, as the record has them.
            head = features[0, 1, 2, : one.key.shape[-1]]
            if one.role == "factorised":
                torch.testing.assert_close(head, one.key[2, 0, 1])
            else:
                first = one.key.shape[2] - frames * height * width if one.text == "first" else 0
                torch.testing.assert_close(head, one.key[0, 0, first + height * width + 2])


@pytest.mark.parametrize("name", ["wan", "cogvideox_rope", "hunyuan", "ltx", "mochi", "unet3d"])
def test_what_stands_still_has_no_features_of_motion(name: str, tiny_checkpoint: Tiny) -> None:
    """In the first layer, of a clip without noise; rotated by its frame, a still look would be another key in each."""
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    still = latents[:, :, :1].expand_as(latents).contiguous()
    for clip, moves in ((still, False), (latents, True)):
        tap = AttentionTap(backbone, unturned=True)
        with torch.no_grad():
            tap.run(lambda: backbone.denoise(clip, t, text))  # noqa: B023 - called at once
        features = key_features(tap.records[0])
        change = features - features.mean(1, keepdim=True)
        assert bool((change.abs().amax() > 1e-2 * features.abs().amax()) == moves), name


def test_keys_before_their_rotation_must_be_asked_for(tiny_checkpoint: Tiny) -> None:
    backbone = open_tiny(tiny_checkpoint("wan"))
    latents, t, text = denoising_inputs(backbone)
    tap = AttentionTap(backbone)
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, t, text))
    with pytest.raises(UsageError, match="unturned=True"):
        key_features(tap.records[0])


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx", "mochi"])
def test_an_empty_prompt_has_maps(name: str, tiny_checkpoint: Tiny) -> None:
    """Mochi's is of no token at all."""
    backbone = adapted(tiny_checkpoint(name))
    clean, times, _ = denoising_inputs(backbone, t=900.0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))
    text = backbone.encode_text(["a dog", ""])
    loss = MotionFeatureMatching()(denoising_step(backbone, backbone.schedule, clean, noise, times, text))
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter_parameters(backbone).values() if p.grad is not None)


@pytest.mark.parametrize("name", ["wan", "unet3d", "cogvideox"])
def test_maps_of_heads_are_not_kept_for_the_backward_pass(name: str, tiny_checkpoint: Tiny) -> None:
    """The mean over heads is the same, its gradient too, and little more than the mean is kept."""
    backbone = open_tiny(tiny_checkpoint(name))
    latents, t, text = denoising_inputs(backbone)
    tap = AttentionTap(backbone, kind=("temporal", "cross"))
    with torch.no_grad():
        tap.run(lambda: backbone.denoise(latents, t, text))
    for one in tap.records:
        makers = [
            *([AttentionRecord.same_site_map] if one.role != "cross" else []),
            *(
                [partial(AttentionRecord.cross_map, among_text=True, chunk=7)]
                if one.role == "cross" or one.text
                else []
            ),
        ]
        for make in makers:
            found = []
            for mean_heads in (False, True):
                record = replace(one, query=one.query.clone().requires_grad_(), key=one.key.clone().requires_grad_())
                own = {record.query.untyped_storage().data_ptr(), record.key.untyped_storage().data_ptr()}
                kept: dict[int, int] = {}

                def pack(x: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
                    storage = x.untyped_storage()
                    if storage.data_ptr() not in own:
                        kept[storage.data_ptr()] = storage.nbytes()
                    return x

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                    made = make(record, mean_heads=True) if mean_heads else make(record)
                    if not mean_heads:
                        made = made.mean(2 if make is AttentionRecord.same_site_map else 1)
                made.pow(2).sum().backward()
                found.append((made.detach(), record.query.grad, record.key.grad, sum(kept.values())))
            for a, b in zip(found[0][:3], found[1][:3], strict=True):
                torch.testing.assert_close(a, b)
            assert found[1][3] <= 0.25 * found[0][3], (one.name, found[0][3], found[1][3])


def test_displacements_need_attention_over_places(tiny_checkpoint: Tiny) -> None:
    step = real_step(adapted(tiny_checkpoint("latte")))
    with pytest.raises(UsageError, match="stays at one place"):
        AttentionMotionFlow()(step)


def test_a_step_without_a_network_is_refused() -> None:
    with pytest.raises(UsageError, match="which network"):
        MotionFeatureMatching()(step_of(SCHEDULES["flow"], torch.ones(1, 2, 2, 2, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MotionFeatureMatching(temporal_weight=0.0, cross_weight=0.0),
        lambda: MotionFeatureMatching(temporal_weight=-1.0),
        lambda: MotionFeatureMatching(t_min=1000.0),
        lambda: MotionFeatureMatching(jump=0.0),
        lambda: MotionFeatureMatching(depth=0.0),
        lambda: FrameResidual(kind="noise"),  # type: ignore[arg-type]
        lambda: FrameResidual(mode="abs"),  # type: ignore[arg-type]
        lambda: AppearanceDebiased(beta=-1.0),
        lambda: MotionFeatures(channels=0.0),
        lambda: AttentionMotionFlow(temperature=0.0),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Loss]) -> None:
    with pytest.raises(UsageError, match="expected"):
        make()
