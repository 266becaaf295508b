"""Arithmetic of `Dual`s: + − × ÷, powers, indexing, and the tensor methods that are linear.

A tangent may be stored for the last samples of the batch only (imf_kernels/dual.py). Operations that keep
samples apart and in order work on those; all others complete the tangent first.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.dual import (
    Dual,
    align,
    is_differentiable,
    last_rows,
    pad_with_zeros,
    primal,
    tangent_graph,
    unpack,
)

Operand = Any  # Tensor | Dual | float
_OPERANDS = (Tensor, Dual, int, float, complex, torch.SymInt, torch.SymFloat)


def operand(x: Any) -> Operand | None:
    """Returns an operand of + − × ÷, a NumPy number as a Python number; `None` for anything else."""
    if isinstance(x, _OPERANDS):
        return x
    return x.item() if isinstance(x, numbers.Number) and hasattr(x, "item") else None


def _tangent_in(y: Tensor, x: Operand, tangent: Tensor | None) -> Tensor | None:
    """Expands an operand's tangent to the result: [n, *y.shape[1:]] for the last n samples of y."""
    if tangent is None or y.dim() == 0:
        return tangent
    if x.dim() == y.dim() and x.shape[0] == y.shape[0]:
        return tangent.expand(tangent.shape[0], *y.shape[1:])
    return pad_with_zeros(tangent, x.shape[0] if x.dim() else 1).expand(y.shape)


def _values_for(y: Tensor, x: Operand, like: Tensor) -> Operand:
    """Returns an operand's values for the samples of the result to which the tangent `like` belongs."""
    if not isinstance(x, Tensor) or x.dim() < y.dim() or x.dim() == 0 or x.shape[0] != y.shape[0]:
        return x
    return x[y.shape[0] - like.shape[0] :]


def _of_two(rule: tuple[Callable[..., Tensor], ...], a: Operand, b: Operand) -> Dual:
    """Returns y(a, b) with the tangent of_a(ȧ, a, b, y) + of_b(ḃ, a, b, y), for a rule of `ARITHMETIC`."""
    differentiable = is_differentiable(a, b)
    (a, a_dot), (b, b_dot), (y, of_a, of_b) = unpack(a), unpack(b), rule
    result = y(a, b)
    parts = []
    with tangent_graph(differentiable):
        for x, tangent, derivative in ((a, a_dot, of_a), (b, b_dot, of_b)):
            tangent = _tangent_in(result, x, tangent)
            if tangent is not None:
                values = (_values_for(result, v, tangent) for v in (a, b, result))
                part = derivative(tangent, *values)
                parts.append(part.expand(tangent.shape).to(result.dtype))
        if not parts:
            return Dual(result, None)
        y_dot = reduce(torch.add, cast(list[Tensor], align(*parts)))
        return Dual(result, y_dot, differentiable=differentiable)


# y(a, b), and its derivatives along ȧ and ḃ as functions of the tangent, a, b and y.
ARITHMETIC: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "add": (operator.add, lambda t, a, b, y: t, lambda t, a, b, y: t),
    "sub": (operator.sub, lambda t, a, b, y: t, lambda t, a, b, y: -t),
    "mul": (operator.mul, lambda t, a, b, y: t * b, lambda t, a, b, y: a * t),
    "div": (operator.truediv, lambda t, a, b, y: t / b, lambda t, a, b, y: -y * t / b),
}
FUNCTIONS = {name: partial(_of_two, rule) for name, rule in ARITHMETIC.items()}


def neg(x: Dual) -> Dual:
    return FUNCTIONS["mul"](x, -1.0)


def power(x: Dual, n: float) -> Dual:
    """Returns xⁿ for a number n, with the tangent n xⁿ⁻¹ ẋ."""
    y, tangent = x.primal**n, x.tangent_rows
    if tangent is None:
        return Dual(y, None)
    with tangent_graph(x.differentiable):
        y_dot = n * last_rows(x.primal, tangent) ** (n - 1) * tangent if n != 0 else torch.zeros_like(tangent)
        return Dual(y, y_dot, differentiable=x.differentiable)


def cat(tensors: Sequence[Tensor | Dual], dim: int = 0) -> Any:
    """Concatenates tensors and `Dual`s as `torch.cat` does, to a `Dual` if one of them is.

    Args:
        tensors: of equal shape except along `dim`; those without a tangent contribute zeros to it.
        dim: the dimension to concatenate along.
    """
    tensors = list(tensors)
    y = torch.cat([unpack(x)[0] for x in tensors], dim)
    if not any(isinstance(x, Dual) for x in tensors):
        return y
    primals, tangents = zip(*map(unpack, tensors), strict=True)
    differentiable = is_differentiable(*tensors)
    if all(t is None for t in tangents):
        return Dual(y, None)
    with tangent_graph(differentiable):
        if dim % y.dim() == 0:
            rows = [x.shape[0] for x in primals]
        else:
            stored = max(t.shape[0] for t in tangents if t is not None)
            rows = [stored] * len(primals)
        parts = [
            x.new_zeros((n, *x.shape[1:])) if t is None else pad_with_zeros(t, n)
            for x, t, n in zip(primals, tangents, rows, strict=True)
        ]
        return Dual(y, torch.cat(parts, dim).to(y.dtype), differentiable=differentiable)


def _on_both(
    x: Dual, y: Any, on_whole: Callable[[Tensor], Any], on_rows: Callable[[Tensor], Any] | None
) -> Any:
    """Makes Duals of y, the result of a linear method on the primal.

    `on_rows` is the method for a stored tangent if samples stay apart and in order; with `None` they do not,
    and the tangent is completed before `on_whole` takes it.
    """
    tangent, made = x.tangent_rows, partial(Dual, differentiable=x.differentiable)
    if tangent is None:
        return pytree.tree_map(made, y)
    with tangent_graph(x.differentiable):
        if on_rows is None:
            y_dot = on_whole(pad_with_zeros(tangent, x.primal.shape[0] if x.primal.dim() else 1))
        else:
            y_dot = on_rows(tangent)
    return pytree.tree_map(made, y, y_dot)


def _is_first(dim: int, of: Tensor) -> bool:
    return dim % max(of.dim(), 1) == 0


def index(x: Dual, at: Any) -> Any:
    """Returns x[at]."""

    def taken(t: Tensor) -> Any:
        return t[at]

    y = x.primal[at]
    return _on_both(x, y, taken, taken if _takes_all_rows(at, x.primal.dim()) else None)


def _takes_all_rows(at: Any, dims: int) -> bool:
    """Returns whether an index surely keeps dimension 0 complete and first; else the tangent is completed."""
    first, *others = at if isinstance(at, tuple) and at else (at,)
    begun = ended = False  # tensors and lists; if separated, their dimension comes first
    for i in others:
        if isinstance(i, (slice, int)) or i is None or i is Ellipsis:
            ended = begun
            if isinstance(i, bool):
                return False
        elif ended:
            return False
        else:
            begun = True
    if first is not Ellipsis:
        return isinstance(first, slice) and first == slice(None)
    rest = [_dims_indexed(i) for i in others]
    return None not in rest and sum(cast(list[int], rest)) < dims


def _dims_indexed(i: Any) -> int | None:
    """Returns how many dimensions an element of an index takes; `None` if only its values tell."""
    if i is None or isinstance(i, (int, slice)):
        return int(i is not None)
    if isinstance(i, Tensor):
        return i.dim() if i.dtype in (torch.bool, torch.uint8) else 1
    return None


def _listed(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns numbers given one by one, or as one sequence."""
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def reshaped(name: str) -> Callable[..., Any]:
    """Makes `reshape` or `view`; the tangent is copied if only its strides do not allow a view."""

    def method(x: Dual, *shape: Any, **named: Any) -> Any:
        for given in (*shape[:1], *named.values()):
            if isinstance(given, torch.dtype):
                raise TypeError(f"Dual.{name}: takes a shape, got {given}; .to(dtype) casts")
        y = getattr(x.primal, name)(*shape, **named)
        keeps = x.primal.dim() > 0 and y.dim() > 0 and y.shape[0] == x.primal.shape[0]
        rows = (lambda t: t.reshape(t.shape[0], *y.shape[1:])) if keeps else None
        return _on_both(x, y, lambda t: t.reshape(y.shape), rows)

    return method


def expand(x: Dual, *size: Any, **named: Any) -> Any:
    y = x.primal.expand(*size, **named)
    keeps = x.primal.dim() == y.dim() > 0 and y.shape[0] == x.primal.shape[0]
    rows = (lambda t: t.expand(-1, *y.shape[1:])) if keeps else None
    return _on_both(x, y, lambda t: t.expand(y.shape), rows)


_AS_IN_NUMPY = {"axis": "dim", "axis0": "dim0", "axis1": "dim1"}  # names that PyTorch takes too


def linear(name: str, dims: Callable[..., Sequence[int]]) -> Callable[..., Any]:
    """Makes a linear method; dims(x, *its arguments) are the dimensions that it works along.

    The arguments have PyTorch's names; PyTorch sees them first and refuses wrong ones.
    """

    def method(x: Dual, *args: Any, **kwargs: Any) -> Any:
        def of(t: Tensor) -> Any:
            return getattr(t, name)(*args, **kwargs)

        y = of(x.primal)
        named = {_AS_IN_NUMPY.get(key, key): value for key, value in kwargs.items()}
        of_batch = any(_is_first(d, x.primal) for d in dims(x.primal, *args, **named))
        return _on_both(x, y, of, None if of_batch else of)

    return method


def _all(x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[int]:
    """Returns `dim`, a number or several; for none or an empty list all dimensions."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return range(x.dim())
    return dim if isinstance(dim, (tuple, list)) else (dim,)


def _permuted(x: Tensor, *order: Any, dims: Any = ()) -> Sequence[int]:
    order = _listed(order) or tuple(dims)
    return () if order and _is_first(order[0], x) else (0,)


def _none(x: Tensor, *args: Any, **kwargs: Any) -> Sequence[int]:
    return ()


def _repeated(x: Tensor, *times: Any, repeats: Any = ()) -> Sequence[int]:
    times = _listed(times) or tuple(repeats)
    return () if len(times) == x.dim() > 0 and times[0] == 1 else (0,)


def to(x: Dual, *args: Any, **kwargs: Any) -> Any:
    """Casts or moves like `Tensor.to`, also to the dtype and device of another tensor."""
    return linear("to", _none)(x, *map(primal, args), **kwargs)


METHODS: dict[str, Callable[..., Any]] = {
    "reshape": reshaped("reshape"),
    "view": reshaped("view"),
    "expand": expand,
    "to": to,
    **{name: linear(name, _none) for name in ("float", "double", "bfloat16", "half", "contiguous", "clone")},
    **{
        name: linear(name, lambda x, dim0, dim1: (dim0, dim1))
        for name in ("transpose", "swapaxes", "swapdims")
    },
    **{
        name: linear(name, lambda x, size=None, dim=0, **named_size: (dim,))
        for name in ("chunk", "split", "tensor_split")
    },
    **{name: linear(name, _all) for name in ("sum", "mean", "squeeze")},
    "flatten": linear("flatten", lambda x, start_dim=0, end_dim=-1: (start_dim,)),
    "flip": linear("flip", lambda x, *along, dims=(): _listed(along) or tuple(dims)),
    "movedim": linear("movedim", lambda x, source, destination: (*_all(x, source), *_all(x, destination))),
    "permute": linear("permute", _permuted),
    "repeat": linear("repeat", _repeated),
    "roll": linear("roll", lambda x, shifts, dims=None: _all(x, dims)),
    "unbind": linear("unbind", lambda x, dim=0: (dim,)),
    "unflatten": linear("unflatten", lambda x, dim, sizes: (dim,)),
    "unsqueeze": linear("unsqueeze", lambda x, dim: (0,) if dim % (x.dim() + 1) == 0 else ()),
}
