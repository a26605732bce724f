"""Switching adapters on and off: by hand, by time, and the same way again when activations are recomputed.

Everything here changes which adapters a layer applies and nothing else. peft's own switch also flips ``requires_grad``,
which would make frozen adapters trainable and change what a recomputation saves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from muybridge.backbones.base import Backbone
from muybridge.diffusion.boundaries import Boundary
from muybridge.errors import UsageError

ROUNDING = 1e-3
"""Times this near to an end of a range are in it: labels are float32, and some networks count them from the other end."""


def rounding(label: Tensor) -> Tensor:
    """How far a time may be from its label: half of what lies between two numbers of the label's dtype.

    Some pipelines give the network its label in bfloat16, where 984 follows 980: a range that begins at 984.4 begins there.

    Args:
        label: As the network is given it.
    """
    if label.dtype not in (torch.bfloat16, torch.float16):
        # Of others it is less than what a gate allows in any case, and gates are asked in every step.
        return torch.full_like(label, ROUNDING, dtype=torch.float32)
    _, exponent = torch.frexp(label.float())
    half = 0.5 * torch.finfo(label.dtype).eps * torch.exp2(exponent.float() - 1.0)
    return half.clamp(min=ROUNDING)


def adapter_layers(module: nn.Module, name: Optional[str] = None) -> dict[str, Any]:
    """The layers of ``module`` that carry adapters (those that carry ``name``), by their names."""
    if "peft" not in sys.modules:  # then nothing can carry any, and its import takes seconds
        return {}
    from peft.tuners.lora.layer import LoraLayer

    return {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer) and (name is None or name in m.lora_A)}


class Switches(AbstractContextManager[None]):
    """How the adapters of a module are switched at one moment. Entering puts it back to that; leaving undoes it.

    It may be entered any number of times, because a recomputation may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(adapter_layers(module).values())
        self._state = self._read()
        self._before: list[list[tuple[list[str], bool]]] = []

    def _read(self) -> list[tuple[list[str], bool]]:
        return [(list(layer.active_adapters), bool(layer.disable_adapters)) for layer in self._layers]

    def _write(self, state: list[tuple[list[str], bool]]) -> None:
        for layer, (active, disabled) in zip(self._layers, state, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled

    def layers(self, name: Optional[str] = None) -> list[Any]:
        """The layers that carry adapters (those that carry ``name``)."""
        return [layer for layer in self._layers if name is None or name in layer.lora_A]

    def restore(self) -> None:
        """Put the switches back to what they were when this was made."""
        self._write(self._state)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __enter__(self) -> None:
        self._before.append(self._read())
        self._write(self._state)

    def __exit__(self, *_: object) -> None:
        self._write(self._before.pop())


def switch_off(module: nn.Module, name: Optional[str] = None) -> Switches:
    """Switch off the adapter ``name``, or all; returns how they were switched before."""
    before = Switches(module)
    # The layers are looked up once: a gate does this in every step of a sampler.
    for layer in before.layers(name):
        left = [a for a in layer.active_adapters if name is not None and a != name]
        if left:
            layer._active_adapter = left
        else:
            layer._disable_adapters = True
    return before


# -- recomputation -----------------------------------------------------------------------------------------------------


def same_switches(module: nn.Module) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """The ``context_fn`` of a checkpointed ``module``: its recomputation sees the adapters as the forward saw them.

    The backward pass comes after the gate or :func:`disabled` has been left, and would otherwise recompute another function
    than the one it differentiates.
    """
    switches = Switches(module)
    return (lambda: (nullcontext(), switches)) if switches else noop_context_fn


def recompute(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call ``module`` and forget its activations; the function that diffusers' networks checkpoint their blocks with."""
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=same_switches(module), **kwargs)


@contextmanager
def disabled(backbone: Backbone | nn.Module, name: Optional[str] = None) -> Iterator[None]:
    """Inside it the base model runs: all adapters are off, or the one called ``name``.

    For teachers, reference features and priors that share the weights of an adapted network. Gradients may flow through
    such a pass, and ``backward()`` may come after the context is left: with gradient checkpointing enabled through
    ``Backbone.enable_gradient_checkpointing`` every block recomputes with the switches of its forward. A network whose
    checkpointing was enabled by diffusers' own method does not know the switches; there ``backward()`` must come inside,
    and torch raises ``CheckpointError`` if it does not.

    Args:
        backbone: A backbone, or any module with adapters.
        name: The adapter to switch off; all of them where not given.
    """
    before = switch_off(backbone, name)
    try:
        yield
    finally:
        before.restore()


def switch_to(module: nn.Module, name: str) -> Switches:
    """Switch on the adapter ``name`` and off all others; returns how they were switched before."""
    before = Switches(module)
    for layer in adapter_layers(module).values():
        layer._disable_adapters = name not in layer.lora_A
        if name in layer.lora_A:
            layer._active_adapter = [name]
    return before


@contextmanager
def only(backbone: Backbone | nn.Module, name: str) -> Iterator[None]:
    """Inside it the adapter ``name`` is on and all others are off: several models that share one base.

    As for :func:`disabled`, gradients may flow and ``backward()`` may come after the context is left.

    Args:
        backbone: A backbone, or any module with adapters.
        name: The adapter that acts.
    """
    before = switch_to(backbone, name)
    try:
        yield
    finally:
        before.restore()


# -- time --------------------------------------------------------------------------------------------------------------


class Gate:
    """Keeps an adapter off outside a range of times; :meth:`remove` ends that.

    It reads the ``timestep`` that the network is really called with, so it works in training, in our samplers and inside
    diffusers pipelines alike, and it leaves all switches as it found them after every call.

    Args:
        name: The adapter; all of them where ``None``.
        t_min: Off below this time, 0 clean to 1000 noise.
        t_max: Off above this time.
        to_time: The network's timestep label as our time.
    """

    def __init__(self, name: Optional[str], t_min: float, t_max: float, to_time: Callable[[Tensor], Tensor]) -> None:
        self.name, self.t_min, self.t_max, self.to_time = name, t_min, t_max, to_time
        self._handles: list[Any] = []

    def attach(self, network: nn.Module) -> None:
        """Watch over ``network`` too."""
        hook = _GateHook(self.name, self.t_min, self.t_max, self.to_time)
        self._handles.append(network.register_forward_pre_hook(hook.before, with_kwargs=True))
        # Prepended, so that several gates undo their switching in the opposite order; always called, so that an
        # exception inside the network (an early exit of a tap is one) leaves no adapter switched off.
        self._handles.append(network.register_forward_hook(hook.after, prepend=True, always_call=True))

    def remove(self) -> None:
        """The adapter acts at all times again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _GateHook:
    """The hooks of one network. They refer to the network they are called with, so a deep copy gates the copy."""

    def __init__(self, name: Optional[str], t_min: float, t_max: float, to_time: Callable[[Tensor], Tensor]) -> None:
        self.name, self.t_min, self.t_max, self.to_time = name, t_min, t_max, to_time
        self._undo: list[Optional[Switches]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _GateHook:
        # to_time may be a method of the backbone: copying one network must not copy the others along.
        return memo.setdefault(id(self), _GateHook(self.name, self.t_min, self.t_max, self.to_time))

    def before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._undo.append(None)
        label = kwargs["timestep"] if "timestep" in kwargs else self._bound(network, args, kwargs)
        if not self._open(network, torch.as_tensor(label)):
            self._undo[-1] = switch_off(network, self.name)

    def after(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        undo = self._undo.pop()
        if undo is not None:
            undo.restore()

    @staticmethod
    def _bound(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = inspect.signature(network.forward).bind(*args, **kwargs).arguments
        if "timestep" not in arguments:
            raise TypeError(
                f"{type(network).__name__} was called without a timestep, so its adapter can't be gated by time"
            )
        return arguments["timestep"]

    def _open(self, network: nn.Module, label: Tensor) -> bool:
        label = label.detach()
        times, near = self.to_time(label.float()).flatten(), rounding(label).flatten()
        if label.ndim == 2 and bool((times > 0).any()):
            # One time per token: tokens of given, clean frames are at 0 and say nothing of where the sampling is.
            times, near = times[times > 0], near[times > 0]
        inside = (times >= self.t_min - near) & (times <= self.t_max + near)
        if bool(inside.all()):
            return True
        if not bool(inside.any()):
            return False
        if all(layer.disable_adapters for layer in adapter_layers(network, self.name).values()):
            # A pass of the base model may hold any times: there is nothing to switch.
            return True
        raise UsageError(
            f"one call holds times on both sides of the adapter's range {self.t_min:g} to {self.t_max:g}: "
            + ", ".join(f"{t:g}" for t in times[:8].tolist()),
            "times of one call all inside or all outside the range",
            "in training, draw times inside it (low and high of timesteps); in sampling, give a call one time",
        )


def resolve_range(
    backbone: Backbone, t_min: Optional[Boundary | float], t_max: Optional[Boundary | float]
) -> tuple[float, float]:
    """The two ends as times of this backbone; 0 and 1000 where not given."""
    low, high = (
        default if end is None else end.resolve(backbone.schedule) if isinstance(end, Boundary) else float(end)
        for end, default in ((t_min, 0.0), (t_max, 1000.0))
    )
    if not 0.0 <= low < high <= 1000.0:
        raise UsageError(
            f"an adapter that acts from time {low:g} to {high:g}",
            "t_min below t_max, on the scale 0 (clean) to 1000 (noise)",
            "a fraction counts sampling steps from noise, so its larger value is the smaller time",
        )
    return low, high


def gate_by_time(
    backbone: Backbone,
    t_min: Optional[Boundary | float] = None,
    t_max: Optional[Boundary | float] = None,
    name: Optional[str] = None,
) -> Gate:
    """Let adapters act only while ``t_min <= t <= t_max``; call ``remove()`` on the result to end it.

    Below and above, the network runs exactly its base weights. A call must lie on one side.

    Args:
        backbone: With adapters on it. A diffusers pipeline built around ``backbone.network`` is gated too.
        t_min: Lower end, a boundary or a time; 0 where not given.
        t_max: Upper end; 1000 where not given.
        name: The adapter; all of them where not given.
    """
    gate = Gate(name, *resolve_range(backbone, t_min, t_max), backbone._scheduler_time)
    networks = [network for network in backbone.networks.values() if adapter_layers(network, name)]
    if not networks:
        raise UsageError(
            f"{backbone.family} carries no adapter" + (f" called {name!r}" if name else ""),
            "an adapter to gate",
            "inject or load one first",
        )
    for network in networks:
        gate.attach(network)
    return gate
