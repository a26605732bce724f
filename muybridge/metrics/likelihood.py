"""How likely a clip's motion is under a motion model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from muybridge.backbones.base import Backbone
from muybridge.backbones.motion_model import MotionModel
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.differences import Differences
from muybridge.diffusion.draws import keyed_generator
from muybridge.diffusion.likelihood import log_likelihood
from muybridge.errors import UsageError
from muybridge.metrics.base import PerClip


def motion_likelihood(
    backbone: Backbone,
    differences: Differences,
    latents: Tensor,
    conditioning: Conditioning,
    ids: Sequence[str],
    steps: int = 50,
    probes: Optional[int] = 1,
    seed: int = 0,
) -> Tensor:
    """``log p(Δx)`` of each clip in nats per dimension, given its first frames where the model is; the latents' own unit.

    Args:
        backbone: A trained motion model, loaded.
        differences: What it models.
        latents: Clips (B, C, F, H, W).
        conditioning: One per clip.
        ids: Names of the clips: their probes depend on them and the seed alone.
        steps: Steps of the ODE.
        probes: Random probes of the trace; ``None`` is exact, and only for tiny clips.
        seed: Of the probes.
    """
    k = differences.context
    if latents.shape[2] < k + (1 if k else 2):
        raise UsageError(
            f"clips of {latents.shape[2]} latent frames", f"at least {k + (1 if k else 2)}: one frame has no motion"
        )
    # Tensors of inference mode, which Trainer's test loop runs in, take no part in any derivative: copies do.
    with torch.inference_mode(False), torch.no_grad():
        latents, conditioning = latents.clone(), conditioning._map(torch.clone)
        context = latents[:, :, :k] if k else None
        u = differences.apply(latents[:, :, k:], None if context is None else context[:, :, -1:])
        nats = log_likelihood(
            MotionModel(backbone, differences).denoiser(conditioning, context),
            u,
            backbone.schedule,
            differences.log_density_of_noise,
            steps,
            probes,
            [keyed_generator(seed, "likelihood", name) for name in ids],
        )
    # The density of the scaled differences, as one of the differences themselves.
    return nats / u[0].numel() + math.log(differences.scale)


class MotionLikelihood(PerClip):
    """Mean log-likelihood of clips' motion in nats per dimension; higher is more like what the model was trained on.

    Args:
        backbone: A trained motion model, loaded.
        differences: What it models.
        steps: Steps of the ODE.
        probes: Random probes of the trace.
        seed: Of the probes.
        options: As for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(
        self,
        backbone: Backbone,
        differences: Differences,
        steps: int = 50,
        probes: Optional[int] = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        # In a tuple: a metric is a module, and its state must not hold the model's weights.
        self._model = (backbone, differences)
        self.steps, self.probes, self.seed = steps, probes, seed

    def update(self, latents: Tensor, conditioning: Conditioning, ids: Sequence[str]) -> None:
        """Rate some clips.

        Args:
            latents: (B, C, F, H, W).
            conditioning: One per clip.
            ids: Their names.
        """
        backbone, differences = self._model
        self.keep(
            motion_likelihood(backbone, differences, latents, conditioning, ids, self.steps, self.probes, self.seed)
        )
