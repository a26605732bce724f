"""The noise schedules of the families, under the names tests call them by."""

from __future__ import annotations

from muybridge.diffusion import FlowSchedule, NoiseSchedule, VPSchedule

SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": FlowSchedule(),
    "flow_shift5": FlowSchedule(5.0),
    "modelscope": VPSchedule.from_betas(0.00085, 0.012, "scaled_linear"),
    "latte": VPSchedule.from_betas(0.0001, 0.02, "linear"),
    "cogvideox_2b": VPSchedule.from_betas(prediction="v", snr_shift=3.0, zero_terminal_snr=True),
    "cogvideox_5b": VPSchedule.from_betas(prediction="v", snr_shift=1.0, zero_terminal_snr=True),
}
