r"""Exact gradients of each clip's own loss, ``∇_θ L(θ; clip)``, given away one parameter at a time and never kept.

Three engines, one face: :class:`ParameterEngine` (one clip a rank, every parameter, plain or FSDP2), :class:`BatchedEngine`
(several clips in one backward) and :class:`ShardedEngine` (one clip on all ranks, each giving away its part).

An engine calls a *sink* with ``(name, gradient, start)``: the gradient is (B, n), the stretch of each clip's flattened gradient
of that parameter from coordinate ``start`` on. It may come in several pieces, also of the same coordinates: what is made
of them must be linear, as a projection is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.attribution.names import chosen_parameters
from muybridge.attribution.tapping import tapped
from muybridge.errors import UsageError

Sink = Callable[[str, Tensor, int], None]
Losses = Callable[[], Tensor]
"""Runs the network and gives one loss per clip, (B,)."""
EngineName = Literal["parameter", "batched", "sharded"]


class PerSample(ABC):
    """Per-sample gradients of some parameters of a module.

    Args:
        module: The network; its mode, flags and gradients are left as they were.
        parameters: Full-match regex of canonical names; all that is trained where not given.
    """

    def __init__(self, module: nn.Module, parameters: Optional[str] = None) -> None:
        from muybridge.backbones.sharding import reshard

        # Of a network that was left gathered, the parameters are others than those that a backward pass leaves gradients in.
        reshard(module)
        self.module = module
        self.chosen = chosen_parameters(module, parameters)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each chosen parameter, whole."""
        return {name: parameter.numel() for name, parameter in self.chosen.items()}

    @abstractmethod
    def run(self, losses: Losses, sink: Sink, count: int = 1) -> Tensor:
        """One forward and backward; returns the losses, (B,).

        Args:
            losses: The forward.
            sink: Takes the gradients.
            count: Number of clips, B.
        """

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """In eval mode, with gradients, and with whatever gradients a training run holds set aside."""
        modes = [(m, m.training) for m in self.module.modules()]
        held = [(p, p.grad) for p in self.module.parameters() if p.grad is not None]
        try:
            self.module.eval()
            for parameter, _ in held:
                parameter.grad = None
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in self.module.parameters():
                parameter.grad = None
            for parameter, gradient in held:
                parameter.grad = gradient


def _check_losses(values: Tensor, able: int, count: int) -> None:
    if count > able:
        raise UsageError(
            f"this engine was given {count} clips", f"{able} at a time", "engine: batched, or one clip a call"
        )
    if values.shape != (count,):
        raise UsageError(f"the loss returned shape {tuple(values.shape)}", f"one number per clip, ({count},)")
    if not values.requires_grad:
        raise UsageError(
            "the loss does not depend on any parameter that is trained",
            "a loss of the network's output, at times at which what is trained acts",
            "an adapter with a range of times, as a customization's, has gradients inside it alone: times of GradientCapture",
        )


# -- one clip, every parameter -------------------------------------------------------------------------------------------------


class ParameterEngine(PerSample):
    """One clip at a time: a hook takes each parameter's gradient the moment it is complete, and drops it.

    Exact for every kind of parameter, whatever a forward does with it. Memory: one parameter's gradient. Under FSDP2 the hook
    sits on the *gathered* parameter, so the gradient is this rank's own clip's, before any average; nothing is left to
    reduce and FSDP2 then sends nothing. Every rank must take the same number of steps, since weights are gathered.

    Args:
        module: The network.
        parameters: Full-match regex of canonical names; all that is trained where not given.
    """

    def run(self, losses: Losses, sink: Sink, count: int = 1) -> Tensor:
        with self._apart(), ExitStack() as stack:
            self._hook(stack, sink)
            values = losses()
            _check_losses(values, 1, count)
            values.sum().backward()
            return values.detach()

    def _hook(self, stack: ExitStack, sink: Sink) -> None:
        units = [m for m in self.module.modules() if hasattr(m, "set_custom_reduce_scatter")]
        names = {id(p): n for n, p in self.chosen.items()}
        if not units:
            for name, parameter in self.chosen.items():
                stack.enter_context(_taken(parameter, name, sink))
            # What is not asked for is not computed.
            for parameter in self.module.parameters():
                if parameter.requires_grad and id(parameter) not in names:
                    parameter.requires_grad_(False)
                    stack.callback(parameter.requires_grad_, True)
            return
        whole = _sharded_names(self.module, self.chosen)
        seen: set[int] = set()

        def gathered(unit: nn.Module, arguments: Any) -> None:
            for owner, key, name in whole[unit]:
                parameter: Any = owner._parameters[key]
                if id(parameter) not in seen and parameter.requires_grad:
                    seen.add(id(parameter))
                    # Of a parameter that is not asked for the gradient is dropped too, or FSDP2 would send it.
                    stack.enter_context(_taken(parameter, name, sink))

        for unit in units:
            handle = unit.register_forward_pre_hook(gathered)
            stack.callback(handle.remove)


@contextmanager
def _taken(parameter: Tensor, name: Optional[str], sink: Sink) -> Iterator[None]:
    def take(p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if name is not None and gradient is not None:
            with torch.no_grad():
                sink(name, gradient.reshape(1, -1), 0)

    handle = parameter.register_post_accumulate_grad_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _sharded_names(
    module: nn.Module, chosen: dict[str, nn.Parameter]
) -> dict[nn.Module, list[tuple[nn.Module, str, Optional[str]]]]:
    """For every FSDP2 unit the places of its own parameters, and their canonical names where they are chosen.

    Called while the parameters are shards: gathered, each place holds another tensor.
    """
    from muybridge.backbones.sharding import reshard

    reshard(module)
    names = {id(p): n for n, p in chosen.items()}
    found: dict[nn.Module, list[tuple[nn.Module, str, Optional[str]]]] = {}

    def walk(part: nn.Module, unit: nn.Module) -> None:
        unit = part if hasattr(part, "set_custom_reduce_scatter") else unit
        for key, parameter in part._parameters.items():
            if parameter is not None:
                found.setdefault(unit, []).append((part, key, names.get(id(parameter))))
        for child in part.children():
            walk(child, unit)

    walk(module, module)
    units = {m for m in module.modules() if hasattr(m, "set_custom_reduce_scatter")}
    outside = [name for unit, places in found.items() if unit not in units for _, _, name in places if name]
    if outside:
        raise UsageError(
            f"{len(outside)} parameters are in no FSDP2 unit, such as {outside[0]}",
            "a network that is sharded as a whole",
            "shard with muybridge.backbones.sharding.shard, or attribute to other parameters",
        )
    return {unit: found.get(unit, []) for unit in units}


# -- several clips in one backward ---------------------------------------------------------------------------------------------


class BatchedEngine(PerSample):
    """Several clips in one forward and backward.

    Each use of a parameter is replaced by an autograd Function whose backward forms the gradients of all clips from what was
    saved for it, in place of the sum over them: linear layers and convolutions from their input, everything that is broadcast
    (norms, biases, tables) from a copy per clip, and what is computed from a parameter alone by the chain rule. Saved
    tensors are autograd's own, so checkpointing drops and recomputes them as always. Used twice, or tied, a parameter's
    gradient comes in two pieces.

    What can't be told apart by clip raises an error with the parameter's name. Clips must lie along the first axis of every
    activation, also where an axis is folded into it (``(batch frames)``, not ``(frames batch)``). Not for sharded networks.

    Args:
        module: The network.
        parameters: Full-match regex of canonical names; all that is trained where not given.
    """

    def run(self, losses: Losses, sink: Sink, count: int = 1) -> Tensor:
        if any(hasattr(p, "full_tensor") for p in self.chosen.values()):
            raise UsageError(
                "the batched engine was given a sharded network", "engine: parameter, or sharded", "or strategy: ddp"
            )
        with self._apart(), tapped(self.module, self.chosen, sink, count):
            values = losses()
            _check_losses(values, count, count)
            values.sum().backward()
            return values.detach()


# -- one clip on several ranks -------------------------------------------------------------------------------------------------


class ShardedEngine(PerSample):
    """One clip on all ranks: each gives away the part of the gradient that it holds, by its place in the whole.

    For clips that take several ranks. The backward is that of training, with its reduce-scatter (all ranks have the same
    gradient, and their average is it); afterwards what the sinks of all ranks made is to be summed. Parameters that
    are not sharded are split evenly.

    Args:
        module: The network.
        parameters: Full-match regex of canonical names; all that is trained where not given.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, module: nn.Module, parameters: Optional[str] = None, rank: int = 0, world: int = 1) -> None:
        super().__init__(module, parameters)
        self.rank, self.world = rank, world

    def run(self, losses: Losses, sink: Sink, count: int = 1) -> Tensor:
        from muybridge.backbones.sharding import reshard

        reshard(self.module)
        with self._apart():
            values = losses()
            _check_losses(values, 1, count)
            values.sum().backward()
            for name, parameter in self.chosen.items():
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    continue
                piece, start = self._mine(gradient)
                if piece.numel():
                    with torch.no_grad():
                        sink(name, piece.reshape(1, -1), start)
            return values.detach()

    def _mine(self, gradient: Tensor) -> tuple[Tensor, int]:
        """This rank's stretch of a flattened gradient, and where it begins."""
        if hasattr(gradient, "to_local"):
            return local_stretch(gradient)
        flat, count = gradient.flatten(), gradient.numel()
        first, last = (count * r // self.world for r in (self.rank, self.rank + 1))
        return flat[first:last], first


def local_stretch(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's stretch of a flattened FSDP2 shard, and where it begins in the whole; of replicas the first has it all."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, own = tensor.device_mesh, True
    if [p for p in tensor.placements if not isinstance(p, Replicate)] != [Shard(0)]:
        raise UsageError(
            f"a parameter is sharded as {tensor.placements}", "a split of its first axis, as FSDP2 makes it"
        )
    for axis, placement in enumerate(tensor.placements):
        own &= not isinstance(placement, Replicate) or mesh.get_local_rank(axis) == 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    part = tensor.to_local().flatten()
    return (part if own else part[:0]), int(offset[0]) * (tensor.numel() // max(tensor.shape[0], 1))


# -- whole gradients -----------------------------------------------------------------------------------------------------------

ENGINES: dict[EngineName, type[PerSample]] = {
    "parameter": ParameterEngine,
    "batched": BatchedEngine,
    "sharded": ShardedEngine,
}


def per_sample_gradients(
    module: nn.Module,
    losses: Losses,
    parameters: Optional[str] = None,
    engine: EngineName = "parameter",
    count: int = 1,
) -> dict[str, Tensor]:
    """The gradients themselves, (B, numel) by canonical name, for small models; zero where the loss does not reach.

    Args:
        module: The network.
        losses: Runs it and gives one loss per clip.
        parameters: Full-match regex of canonical names; all that is trained where not given.
        engine: Which engine.
        count: Number of clips.
    """
    made = ENGINES[engine](module, parameters)
    pieces: list[tuple[str, Tensor, int]] = []
    values = made.run(losses, lambda name, gradient, start: pieces.append((name, gradient.clone(), start)), count)
    found = {
        name: torch.zeros(len(values), size, device=values.device, dtype=made.chosen[name].dtype)
        for name, size in made.sizes.items()
    }
    for name, gradient, start in pieces:
        found[name][:, start : start + gradient.shape[1]] += gradient
    return found
