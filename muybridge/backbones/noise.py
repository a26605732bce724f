"""Noise schedules from ``scheduler_config.json``, without importing diffusers.

A key that is missing means the default of the scheduler's class, and whatever would lead to another ``(α, σ)`` than the
one computed here is refused: noise of the wrong strength trains without complaint and samples badly.
"""

from __future__ import annotations

from typing import Any, Optional

from muybridge.diffusion.predictions import Prediction
from muybridge.diffusion.schedules import T_MAX, FlowSchedule, VPSchedule
from muybridge.errors import UsageError

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
"""diffusers' names of the variance-preserving predictions, and ours."""

TRAINED_STEPS, TRAINED_SHIFT = "_trained_steps", "_trained_shift"
"""What an exported few-step student adds to a configuration of diffusers' own scheduler, which passes over such names."""

_COGVIDEOX = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "snr_shift_scale": 3.0}
_OTHERS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "snr_shift_scale": 1.0}


def _refuse(config: dict[str, Any], key: str, expected: str) -> UsageError:
    return UsageError(
        f"the checkpoint's scheduler, a {config.get('_class_name', 'scheduler without a class name')}, has "
        f"{key}: {config.get(key)!r}",
        expected,
        "put the scheduler_config.json that the model was trained with into the checkpoint",
    )


def _check_steps(config: dict[str, Any]) -> None:
    if config.get("num_train_timesteps", 1000) != T_MAX:
        raise _refuse(config, "num_train_timesteps", "1000, the scale all times are given on")


def variance_preserving(config: dict[str, Any]) -> VPSchedule:
    """The schedule of DDIM, DDPM, DPM-Solver and the like, and of CogVideoX's two variants.

    Args:
        config: A scheduler configuration.
    """
    _check_steps(config)
    values: dict[str, Any] = (
        _COGVIDEOX if str(config.get("_class_name", "")).startswith("CogVideoX") else _OTHERS
    ) | config
    kind = values.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise _refuse(config, "prediction_type", f"one of {', '.join(PREDICTIONS)}")
    if values.get("use_flow_sigmas"):
        raise _refuse(config, "use_flow_sigmas", "false: the network was trained on a table of betas")
    if values.get("trained_betas") is not None:
        raise _refuse(config, "trained_betas", "null, and a beta_schedule that says how the betas are spaced")
    if values["beta_schedule"] not in ("linear", "scaled_linear"):
        raise _refuse(config, "beta_schedule", "linear or scaled_linear")
    return VPSchedule.from_betas(
        beta_start=float(values["beta_start"]),
        beta_end=float(values["beta_end"]),
        beta_schedule=values["beta_schedule"],
        prediction=PREDICTIONS[kind],
        snr_shift=float(values["snr_shift_scale"]),
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
    )


def rectified_flow(config: dict[str, Any], shift: float | None = None) -> FlowSchedule:
    """The schedule of ``FlowMatchEuler``, and of the solvers that were given ``use_flow_sigmas``.

    Args:
        config: A scheduler configuration.
        shift: The sampling shift, for families whose configuration does not hold it as one number.
    """
    _check_steps(config)
    # Solvers written for other models take flow models too, but only if told so; FlowMatch schedulers lack these keys.
    if not config.get("use_flow_sigmas", True):
        raise _refuse(config, "use_flow_sigmas", "true: the network is a flow model")
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise _refuse(config, "prediction_type", "flow_prediction: the network is a flow model")
    # An exported few-step student's scheduler has a shift that was solved for its steps, and the family's own beside it.
    given = config.get(TRAINED_SHIFT) or config.get("flow_shift") or config.get("shift") or 1.0
    return FlowSchedule(shift if shift is not None else float(given))


def trained_steps(config: dict[str, Any]) -> Optional[list[float]]:
    """The falling times of a few-step student that was exported here; ``None`` of any other model.

    Args:
        config: A scheduler configuration.
    """
    found = config.get("trained_steps") or config.get(TRAINED_STEPS)
    return None if found is None else [float(step) for step in found]
