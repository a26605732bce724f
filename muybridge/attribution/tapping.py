"""Parameters whose every use is differentiated per clip: what the batched engine puts in their place.

While :func:`tapped` holds, a chosen parameter is a tensor of a class of its own. What torch is asked to do with it comes here:

- a linear layer, a convolution, a look-up: an autograd Function whose backward forms each clip's gradient from its rows;
- a norm: the same without its parameters, then a product and a sum;
- a sum, difference, product or quotient with an activation: the parameter is spread to a copy per clip, which autograd treats;
- anything with the parameter alone (a cast, a slice, the cosine of a frequency): a tensor that is tapped itself, whose gradients
  per clip go back through what it was computed by.

Anything else is an error that names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from muybridge.errors import UsageError

BY_PLACE = {
    *("add", "__add__", "__radd__", "__iadd__", "add_"),
    *("sub", "__sub__", "__rsub__", "__isub__", "sub_", "rsub"),
    *("mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply"),
    *("div", "__truediv__", "__rtruediv__", "div_", "true_divide"),
}
"""Functions of two tensors that are matched by place."""


class Taps:
    """One run: which tensor is which parameter, how many clips there are, and where gradients go.

    Args:
        names: Name of each chosen parameter by its ``id``.
        sink: Takes the gradients.
        count: Number of clips.
    """

    def __init__(self, names: Mapping[int, str], sink: Callable[[str, Tensor, int], None], count: int) -> None:
        self.names, self.sink, self.count = names, sink, count

    def name(self, tensors: tuple[Tensor, ...]) -> str:
        """What to call a tensor in an error."""
        return " and ".join(self.names[id(t)] for t in tensors)

    def emit(self, inner: Tensor, roots: tuple[Tensor, ...], gradient: Tensor) -> None:
        """Give away the gradients per clip, (B, *shape), of a parameter or of what was computed from some."""
        if id(inner) in self.names:
            self.sink(self.names[id(inner)], gradient.reshape(self.count, -1), 0)
            return
        with torch.enable_grad():
            found = torch.autograd.grad(
                inner, roots, gradient.to(inner.dtype), is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        for root, part in zip(roots, found, strict=True):
            if part is not None:
                self.sink(self.names[id(root)], part.reshape(self.count, -1), 0)

    def rows(self, x: Tensor, what: tuple[Tensor, ...]) -> None:
        """Refuse an activation whose first axis does not hold the clips."""
        if x.ndim == 0 or x.shape[0] % self.count:
            raise UsageError(
                f"{self.name(what)} meets an activation of shape {tuple(x.shape)} in a batch of {self.count} clips",
                "clips along the first axis",
                "engine: parameter, which takes one clip at a time and covers everything",
            )

    def per_clip(self, x: Tensor) -> Tensor:
        """(B, rows, ...)."""
        return x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:])


class Tapped(Tensor):
    """A parameter, or what was computed from parameters alone, inside a run."""

    inner: Any
    """The tensor in its own small graph."""
    roots: tuple[Tensor, ...]
    """The parameters it comes from."""
    taps: Taps

    @staticmethod
    def of(inner: Tensor, roots: tuple[Tensor, ...], taps: Taps) -> Tapped:
        """Stand in for a tensor."""
        made: Any = torch.Tensor._make_subclass(Tapped, inner.detach())
        made.inner, made.roots, made.taps = inner, roots, taps
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Optional[Any] = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name in _LAYERS:
                return _LAYERS[name](func, *args, **kwargs)
            leaves = tree_leaves((args, kwargs))
            others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Tapped)]
            mine = [x for x in leaves if isinstance(x, Tapped)]
            if name in BY_PLACE and len(others) == 1 and len(mine) == 1 and _is_activation(others[0], mine[0]):
                put = _spread(mine[0], others[0])
                return func(*(put if isinstance(a, Tapped) else a for a in args), **kwargs)
            return _derive(func, name, args, kwargs, mine, others)


def _is_activation(x: Tensor, tap: Tapped) -> bool:
    """Whether a tensor belongs to clips. All inputs of the network require gradients, so what comes of them does too."""
    if x.requires_grad:
        return True
    count = tap.taps.count
    if count > 1 and x.ndim >= tap.inner.ndim and x.ndim > 0 and x.shape[0] % count == 0:
        raise UsageError(
            f"{tap.taps.name(tap.roots)} meets a tensor of shape {tuple(x.shape)} that may or may not hold {count} clips",
            "an activation that comes of the network's inputs",
            "engine: parameter, which takes one clip at a time and covers everything",
        )
    return False


def _derive(func: Any, name: str, args: Any, kwargs: Any, mine: list[Tapped], others: list[Tensor]) -> Any:
    """What a function makes of parameters and constants alone."""
    taps = mine[0].taps
    roots = tuple({id(r): r for tap in mine for r in tap.roots}.values())
    if any(x.requires_grad for x in others) or name == "__set__":
        raise UsageError(
            f"{taps.name(roots)} meets an activation in {name}, which the batched engine does not know",
            "a linear layer, convolution, look-up, norm, sum or product",
            "engine: parameter, which takes one clip at a time and covers everything",
        )

    # Not under the hooks of checkpointing: a saved tensor of it may be asked for once per use.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Tapped) else x, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)

    def wrap(x: Any) -> Any:
        return Tapped.of(x, roots, taps) if isinstance(x, Tensor) and x.requires_grad else x

    return tree_map(wrap, result)


# -- spread over clips ---------------------------------------------------------------------------------------------------------


class _Spread(torch.autograd.Function):
    """A tensor of shape (1, ...) once for every row of an activation."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, tap: Tapped, shape: tuple[int, ...], rows: int) -> Tensor:
        ctx.tap, ctx.shape = tap, inner.shape
        return inner.detach().reshape(shape).expand(rows, *shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        taps: Taps = ctx.tap.taps
        per_clip = taps.per_clip(gradient).sum(1).reshape(taps.count, *ctx.shape)
        taps.emit(ctx.tap.inner, ctx.tap.roots, per_clip)
        return None, None, None, None


def _spread(tap: Tapped, x: Tensor, shape: Optional[tuple[int, ...]] = None) -> Tensor:
    """A tapped tensor as one copy per row of an activation that it is matched with by place."""
    inner = tap.inner
    if shape is None:
        shape = (1,) * (x.ndim - inner.ndim) + tuple(inner.shape)
    if len(shape) != x.ndim or shape[0] != 1:
        raise UsageError(
            f"{tap.taps.name(tap.roots)} of shape {tuple(inner.shape)} meets an activation of shape {tuple(x.shape)}",
            "a parameter that is the same for every row of the first axis",
            "engine: parameter, which takes one clip at a time and covers everything",
        )
    tap.taps.rows(x, tap.roots)
    return _Spread.apply(inner, tap, shape, x.shape[0])


def _add_bias(y: Tensor, bias: Any, axis: int) -> Tensor:
    if bias is None:
        return y
    shape = [1] * y.ndim
    shape[axis] = bias.shape[0] if not isinstance(bias, Tapped) else bias.inner.shape[0]
    if not isinstance(bias, Tapped):
        return y + bias.reshape(shape)
    return y + _spread(bias, y, tuple(shape)).to(y.dtype)


# -- layers --------------------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, bias: Any, tap: Tapped, bias_tap: Optional[Tapped]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.bias_tap = tap, bias_tap
        return nn.functional.linear(x, inner, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], None, None, None, None]:
        (x,) = ctx.saved_tensors
        tap: Tapped = ctx.tap
        taps = tap.taps
        g = taps.per_clip(gradient).flatten(1, -2)
        a = taps.per_clip(x).flatten(1, -2).to(g.dtype)
        taps.emit(tap.inner, tap.roots, torch.bmm(g.mT, a))
        if ctx.bias_tap is not None:
            taps.emit(ctx.bias_tap.inner, ctx.bias_tap.roots, g.sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        back = gradient @ tap.inner.detach().to(gradient.dtype)
        return back.to(x.dtype), None, None, None, None


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, Tapped) or not isinstance(weight, Tapped):
        return _other_layer(func, input, weight, bias)
    if not (input.requires_grad or input.shape[0] % weight.taps.count == 0):
        return _derive(func, "linear", (input, weight, bias), {}, _tapped_of(weight, bias), [])
    weight.taps.rows(input, weight.roots)
    bias_tap = bias if isinstance(bias, Tapped) else None
    return _Linear.apply(input, weight.inner, bias_tap.inner if bias_tap is not None else bias, weight, bias_tap)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, tap: Tapped, func: Any, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.how = tap, how
        return func(x, inner, None, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], None, None, None, None]:
        (x,) = ctx.saved_tensors
        tap: Tapped = ctx.tap
        taps, (stride, padding, dilation, groups) = tap.taps, ctx.how
        weight, axes = tap.inner.detach().to(gradient.dtype), tap.inner.ndim - 2
        stride, padding, dilation = ([v] * axes if isinstance(v, int) else list(v) for v in (stride, padding, dilation))

        def backward(g: Tensor, a: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                g, a, weight, None, stride, padding, dilation, False, [0] * axes, groups, mask
            )

        a = x.to(gradient.dtype)
        pairs = zip(taps.per_clip(gradient), taps.per_clip(a), strict=True)
        each = [backward(g.contiguous(), clip.contiguous(), [False, True, False])[1] for g, clip in pairs]
        taps.emit(tap.inner, tap.roots, torch.stack(each))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return backward(gradient, a, [True, False, False])[0].to(x.dtype), None, None, None, None


def _conv(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(input, Tapped) or not isinstance(weight, Tapped) or isinstance(padding, str):
        return _other_layer(func, input, weight, bias, stride, padding, dilation, groups)
    weight.taps.rows(input, weight.roots)
    return _add_bias(_Conv.apply(input, weight.inner, weight, func, (stride, padding, dilation, groups)), bias, 1)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, index: Tensor, tap: Tapped) -> Tensor:
        ctx.index, ctx.tap = index, tap
        return nn.functional.embedding(index, inner)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        tap: Tapped = ctx.tap
        taps, (words, width) = tap.taps, tap.inner.shape
        found = gradient.new_zeros(taps.count * words, width)
        clip = torch.arange(taps.count, device=gradient.device)[:, None] * words
        found.index_add_(0, (taps.per_clip(ctx.index).flatten(1) + clip).flatten(), gradient.reshape(-1, width))
        taps.emit(tap.inner, tap.roots, found.view(taps.count, words, width))
        return None, None, None


def _embedding(
    func: Any,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq:
        raise UsageError(
            f"{weight.taps.name(weight.roots)} is looked up with a padding index, a norm or gradients by frequency",
            "a plain look-up",
            "engine: parameter, which takes one clip at a time and covers everything",
        )
    weight.taps.rows(input, weight.roots)
    return _Embedding.apply(weight.inner, input, weight)


def _layer_norm(func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return _affine(func(input, shape, None, None, eps), weight, bias, len(shape))


def _rms_norm(func: Any, input: Any, shape: Any, weight: Any = None, eps: Optional[float] = None) -> Any:
    return _affine(func(input, shape, None, eps), weight, None, len(shape))


def _group_norm(func: Any, input: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    y = func(input, groups, None, None, eps)
    shape = (1, y.shape[1], *(1,) * (y.ndim - 2))
    if isinstance(weight, Tapped):
        y = y * _spread(weight, y, shape)
    elif weight is not None:
        y = y * weight.reshape(shape)
    return _add_bias(y, bias, 1)


def _affine(y: Tensor, weight: Any, bias: Any, axes: int) -> Tensor:
    """``y * weight + bias`` over the last axes."""
    if weight is not None:
        y = y * (_spread(weight, y) if isinstance(weight, Tapped) else weight)
    if bias is not None:
        y = y + (_spread(bias, y) if isinstance(bias, Tapped) else bias)
    return y


def _tapped_of(*values: Any) -> list[Tapped]:
    return [v for v in values if isinstance(v, Tapped)]


def _other_layer(func: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any) -> Any:
    """A layer of which the bias alone is tapped, or whose input is no activation."""
    mine = _tapped_of(input, weight, bias)
    if mine == [bias] and not rest and func is torch.nn.functional.linear:
        return _add_bias(func(input, weight), bias, -1)
    if mine == [bias] and rest and not isinstance(rest[1], str):
        return _add_bias(func(input, weight, None, *rest), bias, 1)
    others = [v for v in (input, weight, bias) if isinstance(v, Tensor) and not isinstance(v, Tapped)]
    return _derive(func, func.__name__, (input, weight, bias, *rest), named, mine, others)


_LAYERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}


# -- in place of parameters ----------------------------------------------------------------------------------------------------


@contextmanager
def tapped(
    module: nn.Module, chosen: Mapping[str, nn.Parameter], sink: Callable[[str, Tensor, int], None], count: int
) -> Iterator[Taps]:
    """Put taps in the place of parameters, and let gradients reach every activation.

    Args:
        module: Holds them.
        chosen: The parameters by name.
        sink: Takes the gradients.
        count: Number of clips.
    """
    taps = Taps({id(p): name for name, p in chosen.items()}, sink, count)
    stands = {id(p): Tapped.of(p, (p,), taps) for p in chosen.values()}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    quiet: list[nn.Parameter] = []
    handles = [root.register_forward_pre_hook(_want_gradients, with_kwargs=True) for root in _networks(module)]
    try:
        for part in module.modules():
            for key, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) in stands:
                    places.append((part, key, parameter))
                elif parameter.requires_grad:
                    quiet.append(parameter)
        for parameter in quiet:
            parameter.requires_grad_(False)
        for part, key, parameter in places:
            part._parameters[key] = stands[id(parameter)]  # type: ignore[assignment]
        yield taps
        missed = [name for name, p in chosen.items() if p.grad is not None]
        if missed:
            raise UsageError(
                f"{missed[0]} is used by way of a reference that no module holds",
                "parameters that are read from their modules",
                "engine: parameter, which takes one clip at a time and covers everything",
            )
    finally:
        for handle in handles:
            handle.remove()
        for part, key, parameter in places:
            part._parameters[key] = parameter
        for parameter in quiet:
            parameter.requires_grad_(True)


def _networks(module: nn.Module) -> list[nn.Module]:
    """What is called with tensors: the module, or the networks it holds."""
    held = getattr(module, "networks", module)
    return list(held.children()) if isinstance(held, nn.ModuleDict | nn.ModuleList) else [module]


def _want_gradients(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def mark(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
            # A copy: a leaf that requires gradients can't be written to, as some networks do.
            return x.detach().requires_grad_().clone()
        return x

    # Masks are numbers in some networks, which count them; they are data of the clips and no way for a gradient.
    return tree_map(mark, args), {k: v if "mask" in k else tree_map(mark, v) for k, v in kwargs.items()}
