"""Schedulers that hold a student's steps as it was trained with them, for pipelines that others load.

Most pipelines ask a scheduler for a number of steps and it lays them out itself; few-step schedulers of diffusers lay them out
under the family's shift, which trained steps are under already. For flow models whose steps are those of some shift, diffusers'
own Euler scheduler with two numbers solved for gives exactly these. For all others, and for families whose pipelines hand the
scheduler noise levels of their own, the directory carries a scheduler whose code lies beside its configuration.

Either way the configuration says which steps were trained and what the family's own shift is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from muybridge.backbones.noise import _COGVIDEOX, _OTHERS, TRAINED_SHIFT, TRAINED_STEPS
from muybridge.diffusion.schedules import T_MAX, FlowSchedule, NoiseSchedule

MODULE, CLASS = "few_step", "FewStepScheduler"

FLOW_KEYS = (
    "shift",
    "flow_shift",
    "use_flow_sigmas",
    "invert_sigmas",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
)
"""Of a flow model's scheduler, what its pipeline or whoever trains on reads."""

CODE = '''"""Few-step sampling at trained steps: estimate the clean clip, add fresh noise for the next step, repeat."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class FewStepOutput(BaseOutput):
    prev_sample: torch.Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Always takes the steps in its configuration, whatever number a pipeline asks for; sample without guidance.

    Args:
        trained_steps: The student's times, as its network is given them.
        trained_alphas: Share of the clip in the noisy latent at each.
        trained_sigmas: Share of the noise.
        prediction_type: flow_prediction, epsilon, v_prediction or sample.
        invert_sigmas: The pipeline's network counts time from noise, and predicts the clip less the noise.
    The other arguments say how the teacher was trained, and are kept for whoever trains on.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        trained_steps=(1000.0,),
        trained_alphas=(0.0,),
        trained_sigmas=(1.0,),
        prediction_type="flow_prediction",
        num_train_timesteps=1000,
        shift=1.0,
        flow_shift=None,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=False,
        use_flow_sigmas=None,
        invert_sigmas=False,
        use_dynamic_shifting=False,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift_terminal=None,
    ):
        self.init_noise_sigma = 1.0
        self.begin_index = None
        self.set_timesteps()

    def set_begin_index(self, begin_index=0):
        self.begin_index = begin_index

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        steps = self.config.trained_steps
        if self.config.invert_sigmas:
            steps = [self.config.num_train_timesteps - step for step in steps]
        whole = all(float(step).is_integer() for step in steps) and self.config.prediction_type != "flow_prediction"
        self.timesteps = torch.tensor(steps, dtype=torch.int64 if whole else torch.float32, device=device)
        self.alphas = torch.tensor(self.config.trained_alphas, dtype=torch.float32)
        self.sigmas = torch.tensor([*self.config.trained_sigmas, 0.0], dtype=torch.float32)
        self.num_inference_steps = len(steps)

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        at = int((self.timesteps.cpu().float() - float(timestep)).abs().argmin())
        alpha, sigma = self.alphas[at], self.sigmas[at]
        z, p, kind = sample.float(), model_output.float(), self.config.prediction_type
        if self.config.invert_sigmas:
            p = -p
        if kind == "flow_prediction":
            clean = (z - sigma * p) / (alpha + sigma)
        elif kind == "v_prediction":
            clean = (alpha * z - sigma * p) / (alpha**2 + sigma**2)
        elif kind == "epsilon":
            clean = (z - sigma * p) / alpha
        else:
            clean = p
        if at + 1 < len(self.timesteps):
            noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
            clean = self.alphas[at + 1] * clean + self.sigmas[at + 1] * noise
        clean = clean.to(sample.dtype)
        return FewStepOutput(prev_sample=clean) if return_dict else (clean,)
'''


def stock(steps: Sequence[float], tolerance: float = 1e-3) -> Optional[dict[str, Any]]:
    """The configuration with which diffusers' own Euler scheduler takes exactly these steps; ``None`` where none does.

    It lays ``n`` levels evenly from 1, shifts them by ``s``, and stretches them to end at a given one. Steps of any shift,
    evenly spaced before it, are of that form; so are any one, two or three.

    Args:
        steps: Falling times of a flow model.
        tolerance: On the scale of 1000.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if abs(steps[0] - T_MAX) > tolerance:
        return None
    wanted = [step / T_MAX for step in steps]

    def ratio(shift: float) -> float:
        """``(1 - σ₂)/(1 - σₙ)`` before the stretch, which leaves it as it is."""
        last = shift / (T_MAX - 1.0 + shift)
        second = 1.0 + (last - 1.0) / (len(steps) - 1)
        return (1.0 - second) / (1.0 + (shift - 1.0) * second) / ((1.0 - last) / (1.0 + (shift - 1.0) * last))

    low, high, shift = -7.0, 9.0, 1.0
    if len(steps) > 2:
        for _ in range(200):
            middle = (low + high) / 2.0
            shift = 2.718281828459045**middle
            low, high = (middle, high) if ratio(shift) > (1.0 - wanted[1]) / (1.0 - wanted[-1]) else (low, middle)
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": int(T_MAX),
        "shift": shift,
        "shift_terminal": wanted[-1] if len(steps) > 1 else None,
        "stochastic_sampling": True,
    }
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(len(steps))
    off = (scheduler.timesteps.double() - torch.tensor(list(steps), dtype=torch.float64)).abs().max()
    return config if float(off) <= tolerance else None


def write_scheduler(
    folder: Path,
    schedule: NoiseSchedule,
    trained: dict[str, Any],
    steps: Sequence[float],
    lays_own_levels: bool = False,
) -> list[str]:
    """Write ``scheduler_config.json`` (and code, where it takes some); returns the entry of ``model_index.json``.

    Args:
        folder: The pipeline's scheduler folder, new or of the teacher's scheduler, which is replaced.
        schedule: The family's noise schedule.
        trained: Configuration of the teacher's scheduler.
        steps: The student's times.
        lays_own_levels: The family's pipeline hands its scheduler noise levels, rather than a number of steps.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    config = None
    if isinstance(schedule, FlowSchedule) and not lays_own_levels:
        config = stock(steps)
        if config is not None:
            config |= {TRAINED_STEPS: list(steps), TRAINED_SHIFT: schedule.shift}
    entry = ["diffusers", str(config["_class_name"])] if config is not None else [MODULE, CLASS]
    if config is None:
        t = schedule.snap(torch.tensor(list(steps), dtype=torch.float64))
        alphas, sigmas = schedule.coefficients(t)
        names = {"flow": "flow_prediction", "v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}
        keys = (*FLOW_KEYS, *_OTHERS, "num_train_timesteps", "rescale_betas_zero_snr")
        defaults = _COGVIDEOX if str(trained.get("_class_name", "")).startswith("CogVideoX") else _OTHERS
        kept = {} if isinstance(schedule, FlowSchedule) else dict(defaults)
        config = {
            "_class_name": CLASS,
            "trained_steps": t.tolist(),
            "trained_alphas": alphas.tolist(),
            "trained_sigmas": sigmas.tolist(),
            "prediction_type": names[schedule.prediction],
            **{k: v for k, v in (kept | trained).items() if k in keys},
        }
        (folder / f"{MODULE}.py").write_text(CODE, encoding="utf-8")
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return entry
