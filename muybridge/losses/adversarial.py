"""DMD2's adversarial term: a discriminator on what the critic's motion attention sees."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muybridge.backbones.base import Backbone
from muybridge.diffusion.steps import ScoreStep
from muybridge.errors import UsageError
from muybridge.losses.base import Loss


class Adversarial(Loss):
    """``softplus(-D)`` of the noised sample, the student's half of a non-saturating GAN (DMD2).

    ``D`` reads the outputs of some of the critic's attention layers while the critic runs, token by token, and takes the mean.
    Its other half, :meth:`verdict`, is added to the critic's loss: the critic and ``D`` learn to tell the student's clips from
    real ones, so the job needs real clips.

    Args:
        layers: Full-match regex of the critic's linear layers that are read; the output projections of its motion-carrying
            attention where not given.
        every: Of these, every so many-th is read, the last always.
        width: Hidden units of ``D``.
        critic_weight: Weight of :meth:`verdict` in the critic's loss.
    """

    def __init__(
        self, layers: Optional[str] = None, every: int = 8, width: int = 64, critic_weight: float = 0.01
    ) -> None:
        super().__init__()
        if every < 1 or width < 1 or not critic_weight >= 0:
            raise UsageError(
                f"Adversarial every is {every}, width is {width} and critic_weight is {critic_weight}",
                "every and width 1 or more, critic_weight 0 or more",
            )
        self.layers, self.every, self.width, self.critic_weight = layers, every, width, critic_weight
        self.heads = nn.ModuleList()
        self.names: list[str] = []

    def read_layers(self, critic: Backbone) -> list[str]:
        """The layers that are read; refuses a regex that hits none, before weights load."""
        names = critic.matching(self.layers if self.layers is not None else critic.motion_projections(["o"]))
        return names[:: -self.every][::-1]

    def attach(self, critic: Backbone, seed: int = 0) -> None:
        """Make ``D`` for a loaded critic, before adapters are put on it; its weights are the same on all ranks."""
        self.names = self.read_layers(critic)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self.names:
                size: Any = critic.network.get_submodule(name).out_features
                # Attention outputs differ in size by orders of magnitude between layers.
                parts = (nn.LayerNorm(size), nn.Linear(size, self.width), nn.SiLU(), nn.Linear(self.width, 1))
                self.heads.append(nn.Sequential(*parts))

    @contextmanager
    def reading(self, critic: Backbone) -> Iterator[dict[str, Tensor]]:
        """Inside it the critic's forward fills what is given: the output of each layer by its name."""
        found: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            # During a backward pass it is a recomputation of what was read already.
            if torch._C._current_graph_task_id() == -1:
                found[name] = output

        layers = {name: critic.network.get_submodule(name) for name in self.names}
        handles = [layer.register_forward_hook(functools.partial(note, name)) for name, layer in layers.items()]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def judge(self, outputs: dict[str, Tensor], batch: int) -> Tensor:
        """``D`` of each sample, (B,), from what :meth:`reading` found.

        Args:
            outputs: One tensor a layer, tokens of one sample next to one another, features last.
            batch: B.
        """
        votes = [
            head(outputs[name].reshape(batch, -1, outputs[name].shape[-1]).float()).mean((1, 2))
            for name, head in zip(self.names, self.heads, strict=True)
        ]
        return torch.stack(votes).mean(0)

    def forward(self, step: ScoreStep) -> Tensor:
        if step.logits is None:
            raise UsageError(
                "Adversarial was given a step without a discriminator's verdict",
                "a job that trains one",
                "lightning_modules.Distillation does",
            )
        return F.softplus(-step.logits.double())

    def verdict(self, fake: Tensor, real: Tensor) -> Tensor:
        """``softplus(D(fake)) + softplus(-D(real))``, (B,): what ``D`` and the critic learn from."""
        return F.softplus(fake.double()) + F.softplus(-real.double())
