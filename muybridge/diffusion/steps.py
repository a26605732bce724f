"""What one noised forward, or one distillation turn, produced. Losses read these and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

from torch import Tensor, nn

from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class DenoisingStep:
    """One noised forward of a network.

    Args:
        clean: Latents (B, C, F, H, W).
        noise: The noise that was added, same shape.
        noisy: ``α clean + σ noise``.
        t: Times, (B,) or (B, F), 0 clean to 1000 noise.
        prediction: The network's raw output, in the family's own kind.
        target: What it should have been, same kind.
        x0: The clean estimate that the prediction stands for.
        conditioning: What the network was conditioned on.
        weights: Motion weights on the latent grid, (B, 1, F, H, W), where the data has them.
        schedule: The family's noise schedule, for losses that need another kind of prediction.
        present: (B,), False for slots that count for nothing, whatever a loss says of them: for losses that compare the samples
            of a batch with one another. ``None``: all are there.
        network: What predicted, for losses that read more of it than its prediction.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    prediction: Tensor
    target: Tensor
    x0: Tensor
    conditioning: Conditioning
    weights: Optional[Tensor]
    schedule: NoiseSchedule
    present: Optional[Tensor] = None
    network: Optional[nn.Module] = None


def denoising_step(
    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor],
    schedule: NoiseSchedule,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    weights: Optional[Tensor] = None,
    present: Optional[Tensor] = None,
) -> DenoisingStep:
    """Noise the latents, run the network, collect all that a loss may want.

    Args:
        denoise: The network.
        schedule: Its noise schedule.
        clean: Latents (B, C, F, H, W).
        noise: Same shape.
        t: Times, (B,) or (B, F).
        conditioning: One per sample.
        weights: Motion weights, where the data has them.
        present: (B,), False for a sample that is a blank in the place of one that could not be read.
    """
    noisy = schedule.add_noise(clean, noise, t)
    prediction = denoise(noisy, t, conditioning)
    target, x0 = schedule.target(clean, noise, t), schedule.to_x0(prediction, noisy, t)
    return DenoisingStep(
        clean,
        noise,
        noisy,
        t,
        prediction,
        target,
        x0,
        conditioning,
        weights,
        schedule,
        present=present,
        network=denoise if isinstance(denoise, nn.Module) else None,
    )


@dataclass(frozen=True)
class ScoreStep:
    """One student turn of distribution matching.

    Args:
        sample: The student's output, with gradient, (B, C, F, H, W).
        noisy: The sample, noised to the score time.
        t: Score times, (B,) or (B, F).
        real_x0: The teacher's clean estimate, without gradient.
        fake_x0: The critic's clean estimate, without gradient.
        conditioning: What all three were conditioned on.
        target: What the teacher's own sampler made of the noise that the sample was made of in one step; only in jobs whose
            data holds such pairs, and only in turns that leave the rollout at its first step.
        logits: What a discriminator says of the noised sample, (B,), high for real, with gradient to the sample; only in jobs
            that train one.
    """

    sample: Tensor
    noisy: Tensor
    t: Tensor
    real_x0: Tensor
    fake_x0: Tensor
    conditioning: Conditioning
    target: Optional[Tensor] = None
    logits: Optional[Tensor] = None


@dataclass(frozen=True)
class TrajectoryStep:
    """One forward of a student on states of a teacher's trajectory.

    Args:
        clean: Where the trajectory ends, (B, C, F, H, W).
        noisy: The states that the student was given, each frame's at its own time.
        t: Their times, (B,) or (B, F); 0 where a frame was given clean.
        prediction: The student's raw output, in the family's own kind.
        x0: The clean estimate that the prediction stands for.
        conditioning: What the student was conditioned on.
        schedule: The family's noise schedule.
    """

    clean: Tensor
    noisy: Tensor
    t: Tensor
    prediction: Tensor
    x0: Tensor
    conditioning: Conditioning
    schedule: NoiseSchedule
