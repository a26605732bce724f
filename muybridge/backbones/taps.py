"""Attention of any family, read while the network runs.

Every family ends in ``torch.nn.functional.scaled_dot_product_attention``. Watching that one function gives queries and keys
after all norms and rotations, in one layout, without rewriting any attention processor; the model keeps its fast attention
and maps are computed only where someone asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from muybridge.backbones.attention import AttentionRecord, Role
from muybridge.backbones.base import Backbone
from muybridge.errors import UsageError

Kind = Literal["temporal", "cross"]


class _Reached(Exception):
    """Everything that was tapped has run. Raised by a tap, swallowed by the same tap's :meth:`AttentionTap.run`."""


@dataclass
class _Call:
    """What one attention call was given, made uniform."""

    query: Tensor
    key: Tensor
    mask: Optional[Tensor]
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        enable_gqa: bool = False,
    ) -> _Call:
        """From the arguments of ``scaled_dot_product_attention``."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            attn_mask = attn_mask.view(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
        return cls(query, key, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


@dataclass
class _Visit:
    """One call of a tapped module: the batch it was given, and the attention calls it made."""

    name: str
    batch: int
    calls: list[_Call]
    unturned: Optional[Tensor] = None

    def joined(self) -> _Call:
        """Its attention as one call: Mochi makes one for each sample, without the padding of its prompt."""
        if not self.calls:
            raise UsageError(
                f"the attention of {self.name} did not go through torch's scaled_dot_product_attention",
                "diffusers' native attention backend, not compiled and not sliced",
                'call set_attention_backend("native") on the network, or run inside '
                'diffusers.models.attention_dispatch.attention_backend("native")',
            )
        if sum(call.query.shape[0] for call in self.calls) != self.batch:
            raise UsageError(
                f"{self.name} was given a batch of {self.batch} and made {len(self.calls)} attention calls of "
                + ", ".join(str(call.query.shape[0]) for call in self.calls),
                "a regex of attention modules alone, not of the blocks that hold them",
            )
        if len(self.calls) == 1:
            return self.calls[0]
        if any(call.mask is not None or call.query.shape[2] != call.key.shape[2] for call in self.calls):
            raise RuntimeError(
                f"{self.name} made masked or cross attention calls sample by sample; these can't be joined"
            )
        lengths = [call.query.shape[2] for call in self.calls]
        query, key = (
            torch.cat([F.pad(x, (0, 0, 0, max(lengths) - x.shape[2])) for x in parts])
            for parts in ([call.query for call in self.calls], [call.key for call in self.calls])
        )
        counts = [n for n, call in zip(lengths, self.calls, strict=True) for _ in range(call.query.shape[0])]
        real = torch.arange(max(lengths), device=query.device) < torch.tensor(counts, device=query.device)[:, None]
        return _Call(query, key, None if min(lengths) == max(lengths) else real[:, None, None], self.calls[0].scale)


class _Watch(TorchFunctionMode):
    """Hands the arguments of every attention call to ``see``."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.see(*args, **kwargs)
        return func(*args, **kwargs)


def _recomputing() -> bool:
    """Whether a backward pass is running: what then runs forward is a recomputation of what was recorded already."""
    return bool(torch._C._current_graph_task_id() != -1)


class AttentionTap:
    """Records the attention of a network while it runs.

    ::

        tap = AttentionTap(backbone, kind="temporal")
        prediction = tap.run(lambda: backbone.denoise(noisy, t, conditioning))
        maps = [record.same_site_map() for record in tap.records]

    or ``with tap: ...`` around any code that calls the network, a diffusers pipeline too. Records come in the order of the
    calls, one for each call of a module. They keep the graph; under gradient checkpointing each is taken once, in the forward
    pass. Records hold on to activations: let go of them (``tap.records.clear()``) when the maps are made.

    Args:
        target: A backbone, whose latents then give the token grid; or a bare network or module.
        pattern: Full-match regex of attention modules, where ``kind`` is not enough (such as some blocks only).
        kind: ``temporal``: the attention that carries motion. ``cross``: from video to text; in joint families that is the
            same attention, see :meth:`AttentionRecord.cross_map`. Or both.
        early_exit: Stop the forward pass as soon as every tapped module has run; only under :meth:`run`, which then returns
            ``None``. Gradients of the maps are the same, and the rest of the network is never computed.
        grid: Tokens along (F, h, w), for a bare module.
        unturned: Record the keys of unified attention also as they are before their rotation.
    """

    def __init__(
        self,
        target: Backbone | nn.Module,
        pattern: Optional[str] = None,
        kind: Kind | Sequence[Kind] = "temporal",
        early_exit: bool = False,
        grid: Optional[tuple[int, int, int]] = None,
        unturned: bool = False,
    ) -> None:
        self.unturned = unturned
        self.records: list[AttentionRecord] = []
        self.early_exit = early_exit
        self._grid = grid
        self._backbone = target if isinstance(target, Backbone) else None
        if isinstance(target, Backbone):
            target.network  # noqa: B018 - refuses a backbone that is not loaded
            self._networks = dict(target.networks.items())
        else:
            self._networks = {"": target}
        self._pattern = pattern if pattern is not None else self._pattern_of([kind] if isinstance(kind, str) else kind)
        self._tapped = {network: self._matches(network) for network in self._networks}
        if not any(self._tapped.values()):
            raise self._no_module()
        if early_exit and any(is_sharded(network) for network in self._networks.values()):
            raise UsageError(
                "early_exit on a sharded network",
                "early_exit: false under FSDP: leaving a forward pass in its middle leaves its weights gathered",
                "the records are the same without it",
            )
        self._visits: list[_Visit] = []
        self._seen: set[str] = set()
        self._latents: Optional[torch.Size] = None
        self._batch = 0
        self._stack: Optional[ExitStack] = None
        self._may_stop = False

    # -- which modules ---------------------------------------------------------------------------------------------

    def _pattern_of(self, kinds: Sequence[Kind]) -> str:
        backbone = self._backbone
        unknown = [k for k in kinds if k not in ("temporal", "cross")]
        if unknown or not kinds:
            raise UsageError(f"tap kind {list(kinds)}", "temporal, cross, or both")
        if backbone is None:
            raise UsageError(
                "a tap on a bare module without a pattern",
                "a regex of its attention modules",
                "or give the tap the backbone",
            )
        parts = []
        for kind in kinds:
            joint = kind == "cross" and backbone.cross_attention is None and backbone.text_tokens is not None
            part = backbone.temporal_attention if kind == "temporal" or joint else backbone.cross_attention
            if part is None:
                raise UsageError(f"{backbone.family} has no attention to text", "kind: temporal")
            parts.append(f"(?:{part})")
        return "|".join(dict.fromkeys(parts))

    def _matches(self, network: str) -> list[str]:
        try:
            compiled = re.compile(self._pattern)
        except re.error as error:
            raise UsageError(f"{self._pattern!r} is no regular expression ({error})", "a Python regex") from error
        return [n for n, _ in self._networks[network].named_modules() if n and compiled.fullmatch(n)]

    def _no_module(self) -> UsageError:
        network = next(iter(self._networks.values()))
        names = [n for n, m in network.named_modules() if re.fullmatch(r".*Attention", type(m).__name__)]
        near = [n for n in names if re.search(self._pattern, n)][:3] or names[:3]
        return UsageError(
            f"the tap's regex {self._pattern!r} hits no module",
            f"a regex that matches whole names of attention modules, such as {', '.join(near) or 'blocks.0.attn1'}",
            "check the name of the blocks, and that the whole name matches",
        )

    def _role(self, name: str) -> Role:
        backbone = self._backbone
        if backbone is None:
            return "unified" if self._grid is not None else "other"
        if re.fullmatch(backbone.temporal_attention, name):
            return backbone.attention_kind
        if backbone.cross_attention is not None and re.fullmatch(backbone.cross_attention, name):
            return "cross"
        return "other"

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` with the tap open; what it returns, or ``None`` where ``early_exit`` stopped it.

        Args:
            function: What calls the network.
        """
        self._may_stop = self.early_exit
        try:
            with self:
                try:
                    return function()
                except _Reached as reached:
                    if reached.args[0] is not self:
                        raise
                    # Its frames hold on to what a checkpointed block, interrupted in its middle, would still have to undo.
                    reached.__traceback__ = None
                    self._check_experts()
                    return None
        finally:
            self._may_stop = False

    def __enter__(self) -> AttentionTap:
        if self._stack is not None:
            raise RuntimeError("this tap is open already")
        if self.early_exit and not self._may_stop:
            raise UsageError(
                "an early_exit tap opened by `with`",
                "tap.run(function): an exit out of the middle of a `with` block would skip the rest of it",
            )
        self.records.clear()
        self._visits.clear()
        with ExitStack() as stack:
            if self._backbone is not None:
                stack.enter_context(self._watch_latents(self._backbone))
            for network_name, network in self._networks.items():
                self._hook(stack, network_name, network)
            stack.enter_context(_Watch(self._see))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()
        if kind is None and not self.records:
            hit = sum(len(names) for names in self._tapped.values())
            raise UsageError(
                f"the tap on {self._pattern!r} recorded nothing: none of its {hit} modules ran",
                "a forward pass of the tapped network inside the tap",
                "of Wan 2.2's experts only one runs at a given time; Latte skips temporal attention for single frames",
            )

    @contextmanager
    def _watch_latents(self, backbone: Backbone) -> Iterator[None]:
        """Note the shape of the latents of every ``denoise``: it says the token grid, whatever layout the network takes."""
        inner = backbone._forward

        def forward(latents: Tensor, t: Tensor, conditioning: Any) -> Tensor:
            self._latents = latents.shape
            return inner(latents, t, conditioning)

        shadowed = backbone.__dict__.get("_forward")
        backbone.__dict__["_forward"] = forward
        try:
            yield
        finally:
            self._latents = None
            if shadowed is None:
                del backbone.__dict__["_forward"]
            else:
                backbone.__dict__["_forward"] = shadowed

    def _hook(self, stack: ExitStack, network_name: str, network: nn.Module) -> None:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _recomputing():
                self._batch = _first_tensor(args, kwargs).shape[0]
                self._seen.clear()

        if self._tapped[network_name]:
            stack.callback(network.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in self._tapped[network_name]:
            module = network.get_submodule(name)

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                self._visits.append(_Visit(name, _first_tensor(args, kwargs).shape[0], []))

            def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                visit = self._visits.pop()
                if output is not None and not _recomputing():
                    self._record(network_name, visit)
                    self._seen.add(name)
                    if self._may_stop and len(self._seen) == len(self._tapped[network_name]):
                        raise _Reached(self)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if self.unturned and self._role(name) == "unified":
                self._hook_keys(stack, module)
            # Always called, so that an exception inside the module does not leave it on the list of those being visited.
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _hook_keys(self, stack: ExitStack, module: Any) -> None:
        """Note what the layers of the key give, whatever their layout, before positions are turned into it."""
        lengths: list[int] = []

        def made(_: nn.Module, args: Any, output: Tensor) -> None:
            lengths[:] = [output.shape[1]]
            self._visits[-1].unturned = output

        def normed(_: nn.Module, args: Any, output: Tensor) -> None:
            if output.ndim == 4:
                # (B, heads, L, d) or (B, L, heads, d).
                output = (output if output.shape[1] == lengths[0] else output.transpose(1, 2)).flatten(2)
            self._visits[-1].unturned = output

        stack.callback(module.to_k.register_forward_hook(made).remove)
        if getattr(module, "norm_k", None) is not None:
            stack.callback(module.norm_k.register_forward_hook(normed).remove)

    def _see(self, *args: Any, **kwargs: Any) -> None:
        if self._visits:
            self._visits[-1].calls.append(_Call.of(*args, **kwargs))

    # -- records ---------------------------------------------------------------------------------------------------

    def _record(self, network: str, visit: _Visit) -> None:
        call = visit.joined()
        role = self._role(visit.name)
        text = self._backbone.text_tokens if self._backbone is not None and role == "unified" else None
        record = AttentionRecord(
            name=visit.name,
            network=network,
            role=role,
            query=call.query,
            key=call.key,
            mask=call.mask,
            scale=call.scale,
            batch=self._batch,
            grid=self._grid,
            text=text,
            unturned=visit.unturned,
        )
        self.records.append(record if self._grid is not None else replace(record, grid=self._grid_of(record)))

    def _grid_of(self, record: AttentionRecord) -> Optional[tuple[int, int, int]]:
        """Tokens along (F, h, w) at a layer, from the latents' shape: patches, or a level of a UNet."""
        if self._latents is None or self._backbone is None or record.role == "other":
            return None
        patch = self._backbone.geometry.patch
        frames, height, width = (n // p for n, p in zip(self._latents[2:], patch, strict=True))
        if self._backbone.attention_kind == "unified":
            return frames, height, width
        places = record.query.shape[0] // record.batch if record.role == "factorised" else record.query.shape[2]
        while height * width > places:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != places:
            raise RuntimeError(f"{record.name}: {places} places fit no level of latents {tuple(self._latents)}")
        return frames, height, width

    def _check_experts(self) -> None:
        """Early exit leaves a call at its first network; samples that another expert would have taken were not seen."""
        if self._latents is not None and self._batch != self._latents[0]:
            raise UsageError(
                f"early_exit stopped after {self._batch} of {self._latents[0]} samples: the others are for another expert",
                "times of one call all on one side of the experts' boundary",
                "split the batch by time, or leave early_exit out",
            )


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def is_sharded(network: nn.Module) -> bool:
    """Whether weights are spread over ranks, so that all must run the network together."""
    return any(hasattr(parameter, "full_tensor") for parameter in network.parameters())
