"""Manual optimisation of several trained roles, each by its own optimizer, on any number of ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Optional

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.base import DiffusionModule
from lightning_modules.finetuning import MAX_SKIPPED
from lightning_modules.gradients import exchange, scale, total_norm, whole_ones
from muybridge.backbones.sharding import reshard
from muybridge.errors import UsageError


class TwoOptimizers(DiffusionModule):
    """A job whose trained roles are updated at different times.

    A subclass gives every trained role its optimizer and schedule, in the order of ``clip_of``, calls :meth:`back` and
    :meth:`update`, and counts ``iterations``. The last role's step is what Lightning counts as a step of the run.

    Attributes:
        clip_of: Largest norm of a role's gradient, ``None`` where it is not clipped; the trained roles in their order.
        iterations: What the run has done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clip_of: dict[str, Optional[float]] = {}
        self.iterations = 0
        self._skipped_in_a_row: dict[str, int] = {}

    def back(self, loss: Tensor) -> None:
        """A backward pass; ranks exchange gradients before an update, not here.

        DDP's own exchange expects every backward pass to reach all trained parameters, and a turn reaches those of one role.
        FSDP2 sums the gradients of what it sharded as they come.
        """
        strategy = self.trainer.strategy
        alone = strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        with alone:
            self.manual_backward(loss)

    def update(self, role: str) -> bool:
        """Exchange, measure, clip, step; a gradient that is not finite skips the step, on all ranks together."""
        index = list(self.clip_of).index(role)
        wrapped: Any = self.optimizers()
        optimizer = wrapped[index].optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.trainer.world_size > 1:
            exchange(self.trainer.strategy, whole_ones(p.grad for p in parameters))
        norm = total_norm([p.grad for p in parameters])
        finite = self.trainer.strategy.reduce(torch.isfinite(norm).float().reshape(1), reduce_op="min")
        self.log(f"{role}/grad_norm", norm.float())
        self.log(f"{role}/lr", optimizer.param_groups[0]["lr"])
        fine = bool(finite.item())
        if fine:
            self._skipped_in_a_row[role] = 0
            limit = self.clip_of[role]
            size = float(norm)
            if limit is not None and size > limit:
                scale(parameters, limit / size)
        else:
            self._skip(role, parameters)
        if index == len(self.clip_of) - 1:
            # Only this one is counted by Lightning, so that its step is an iteration.
            wrapped[index].step()
        else:
            self.trainer.strategy.optimizer_step(optimizer, lambda: None, model=self)
        if fine:
            schedulers: Any = self.lr_schedulers()
            schedulers[index].step()
        optimizer.zero_grad(set_to_none=True)
        # Forwards without gradients leave the outermost weights gathered, and the next one would find them as they were.
        reshard(self.roles()[role])
        return fine

    def _skip(self, role: str, parameters: list[nn.Parameter]) -> None:
        self._skipped_in_a_row[role] = self._skipped_in_a_row.get(role, 0) + 1
        if self._skipped_in_a_row[role] >= MAX_SKIPPED:
            raise UsageError(
                f"the {role}'s gradient was not finite in {MAX_SKIPPED} updates in a row, the last in iteration"
                f" {self.iterations}",
                "a run that has not diverged",
                f"go on from an earlier checkpoint with a smaller learning rate, or a smaller {role}_clip",
            )
        rank_zero_warn(f"iteration {self.iterations}: the {role}'s gradient is not finite, its step is skipped")
        for parameter in parameters:
            parameter.grad = None


def check_fused(role: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a fused optimizer of sharded weights and whole ones, which torch would refuse at the first step.

    Args:
        role: Whose it is.
        optimizer: It.
    """
    for group in optimizer.param_groups:
        kinds = {hasattr(p, "full_tensor") for p in group["params"]}
        if group.get("fused") and len(kinds) > 1:
            raise UsageError(
                f"a fused {type(optimizer).__name__} for the {role}, which has whole weights (a discriminator's) and sharded",
                "an optimizer that takes both",
                f"set {role}_optimizer's fused to null",
            )
