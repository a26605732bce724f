"""Noise, predictions, times and samplers: pure, small, one copy."""

from muybridge.diffusion.boundaries import Boundary
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_generator, keyed_noise, shared_noise
from muybridge.diffusion.predictions import Prediction, convert, guide
from muybridge.diffusion.samplers import few_step, many_step
from muybridge.diffusion.schedules import FlowSchedule, NoiseSchedule, VPSchedule, shift_level, shifted_steps
from muybridge.diffusion.steps import DenoisingStep, ScoreStep, TrajectoryStep
from muybridge.diffusion.timesteps import LogitNormal, Shifted, TimestepSampler, Uniform

__all__ = [
    "Boundary",
    "Conditioning",
    "DenoisingStep",
    "FlowSchedule",
    "LogitNormal",
    "NoiseSchedule",
    "Prediction",
    "ScoreStep",
    "Shifted",
    "TimestepSampler",
    "TrajectoryStep",
    "Uniform",
    "VPSchedule",
    "convert",
    "few_step",
    "guide",
    "keyed_generator",
    "keyed_noise",
    "many_step",
    "shared_noise",
    "shift_level",
    "shifted_steps",
]
