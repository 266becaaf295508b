"""What `Dual`s share with tensors: + − × ÷, indexing, and the methods that are linear in the tensor.

A tangent may be stored for the last rows of the batch alone (imf_kernels/dual.py). What keeps the rows apart
and in order works on those; everything else first completes the tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.dual import Dual, align, complete, unpack

Operand = Any  # Tensor | Dual | float


def _tangent_in(y: Tensor, x: Operand, tangent: Tensor | None) -> Tensor | None:
    """An operand's tangent as one of the result's: [n, *y.shape[1:]] for the last n rows of y."""
    if tangent is None or y.dim() == 0:
        return tangent
    if x.dim() == y.dim() and x.shape[0] == y.shape[0]:
        return tangent.expand(tangent.shape[0], *y.shape[1:])
    return complete(tangent, x.shape[0] if x.dim() else 1).expand(y.shape)


def _beside(y: Tensor, x: Operand, like: Tensor) -> Operand:
    """The values of an operand in the rows of the result that `like`, a tangent, belongs to."""
    if not isinstance(x, Tensor) or x.dim() < y.dim() or x.dim() == 0 or x.shape[0] != y.shape[0]:
        return x
    return x[y.shape[0] - like.shape[0] :]


def _of_two(
    a: Operand,
    b: Operand,
    y: Callable[[Any, Any], Tensor],
    of_a: Callable[[Tensor, Any, Any, Tensor], Tensor],
    of_b: Callable[[Tensor, Any, Any, Tensor], Tensor],
) -> Dual:
    """y(a, b), whose derivative is of_a(ȧ, a, b, y) + of_b(ḃ, a, b, y)."""
    (a, a_dot), (b, b_dot) = unpack(a), unpack(b)
    result = y(a, b)
    parts = []
    with torch.no_grad():
        for x, tangent, derivative in ((a, a_dot, of_a), (b, b_dot, of_b)):
            tangent = _tangent_in(result, x, tangent)
            if tangent is not None:
                values = (_beside(result, v, tangent) for v in (a, b, result))
                part = derivative(tangent, *values)
                parts.append(part.expand(tangent.shape).to(result.dtype))
        if not parts:
            return Dual(result, None)
        return Dual(result, reduce(torch.add, cast(list[Tensor], align(*parts))))


def add(a: Operand, b: Operand) -> Dual:
    return _of_two(a, b, lambda a, b: a + b, lambda t, a, b, y: t, lambda t, a, b, y: t)


def sub(a: Operand, b: Operand) -> Dual:
    return _of_two(a, b, lambda a, b: a - b, lambda t, a, b, y: t, lambda t, a, b, y: -t)


def mul(a: Operand, b: Operand) -> Dual:
    return _of_two(a, b, lambda a, b: a * b, lambda t, a, b, y: t * b, lambda t, a, b, y: a * t)


def div(a: Operand, b: Operand) -> Dual:
    return _of_two(a, b, lambda a, b: a / b, lambda t, a, b, y: t / b, lambda t, a, b, y: -y * t / b)


def neg(x: Dual) -> Dual:
    return mul(x, -1.0)


def cat(tensors: Sequence[Tensor | Dual], dim: int = 0) -> Any:
    """`torch.cat` of tensors and `Dual`s: a `Dual` where one of them is.

    Args:
        tensors: of equal shape but for `dim`; those without a tangent have one of zeros in the result.
        dim: along which they are joined.
    """
    tensors = list(tensors)
    y = torch.cat([unpack(x)[0] for x in tensors], dim)
    if not any(isinstance(x, Dual) for x in tensors):
        return y
    primals, tangents = zip(*map(unpack, tensors), strict=True)
    if all(t is None for t in tangents):
        return Dual(y, None)
    with torch.no_grad():
        if dim % y.dim() == 0:
            rows = [x.shape[0] for x in primals]
        else:
            stored = max(t.shape[0] for t in tangents if t is not None)
            rows = [stored] * len(primals)
        parts = [
            x.new_zeros((n, *x.shape[1:])) if t is None else complete(t, n)
            for x, t, n in zip(primals, tangents, rows, strict=True)
        ]
        return Dual(y, torch.cat(parts, dim).to(y.dtype))


def _on_both(
    x: Dual, on_primal: Callable[[Tensor], Any], on_rows: Callable[[Tensor, Any], Any] | None
) -> Any:
    """A linear method of primal and tangent.

    `on_rows(tangent, y)` is the method where the rows stay apart and in order, given what the primal became;
    with `None` they do not, and the tangent is completed before `on_primal` takes it too.
    """
    primal, tangent = unpack(x)
    y = on_primal(primal)
    if tangent is None:
        return pytree.tree_map(lambda part: Dual(part, None), y)
    with torch.no_grad():
        if on_rows is None:
            y_dot = on_primal(complete(tangent, primal.shape[0] if primal.dim() else 1))
        else:
            y_dot = on_rows(tangent, y)
    return pytree.tree_map(Dual, y, y_dot)


def _is_first(dim: int, of: Tensor) -> bool:
    return dim % max(of.dim(), 1) == 0


def index(x: Dual, at: Any) -> Any:
    """x[at]: the rows of the batch stay where the first index takes all of them."""
    first = at[0] if isinstance(at, tuple) and at else at
    if first is Ellipsis:
        taken = sum(1 for i in at[1:] if i is not None) if isinstance(at, tuple) else 0
        keeps = taken < x.primal.dim()
    else:
        keeps = isinstance(first, slice) and first == slice(None)
    return _on_both(x, lambda t: t[at], (lambda t, y: t[at]) if keeps else None)


def reshaped(name: str) -> Callable[..., Any]:
    """`reshape` and `view`."""

    def method(x: Dual, *shape: Any) -> Any:
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            raise TypeError(f"Dual.{name}: takes a shape, got {shape[0]}; .to(dtype) casts")
        y = getattr(x.primal, name)(*shape)
        keeps = x.primal.dim() > 0 and y.dim() > 0 and y.shape[0] == x.primal.shape[0]
        rows = (lambda t, y: getattr(t, name)(t.shape[0], *y.shape[1:])) if keeps else None
        return _on_both(x, lambda t: getattr(t, name)(*shape), rows)

    return method


def expand(x: Dual, *shape: Any) -> Any:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    keeps = len(shape) == x.primal.dim() and shape[0] in (-1, x.primal.shape[0])
    rows = (lambda t, y: t.expand(-1, *shape[1:])) if keeps else None
    return _on_both(x, lambda t: t.expand(*shape), rows)


def linear(name: str, dims: Callable[..., Sequence[int]]) -> Callable[..., Any]:
    """A linear method; dims(x, *its arguments) are the dimensions that it works along."""

    def method(x: Dual, *args: Any, **kwargs: Any) -> Any:
        of_batch = any(_is_first(d, x.primal) for d in dims(x.primal, *args, **kwargs))

        def on_primal(t: Tensor) -> Any:
            return getattr(t, name)(*args, **kwargs)

        return _on_both(x, on_primal, None if of_batch else lambda t, y: on_primal(t))

    return method


def _all(x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[int]:
    return range(x.dim()) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)


def _from_to(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Sequence[int]:
    return (start_dim,)


def _two(x: Tensor, dim0: int, dim1: int) -> Sequence[int]:
    return dim0, dim1


def _moved(x: Tensor, *dims: Any) -> Sequence[int]:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return () if _is_first(order[0], x) else (0,)


def _by_parts(x: Tensor, size: Any, dim: int = 0) -> Sequence[int]:
    return (dim,)


def _one(x: Tensor, dim: int = 0) -> Sequence[int]:
    return (dim,)


def _none(x: Tensor, *args: Any, **kwargs: Any) -> Sequence[int]:
    return ()


def _inserted(x: Tensor, dim: int) -> Sequence[int]:
    return (0,) if dim % (x.dim() + 1) == 0 else ()


def _unflattened(x: Tensor, dim: int, sizes: Any) -> Sequence[int]:
    return (dim,)


def _repeated(x: Tensor, *sizes: Any) -> Sequence[int]:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return () if len(sizes) == x.dim() and sizes[0] == 1 else (0,)


def _flipped(x: Tensor, *dims: Any) -> Sequence[int]:
    return dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims


def _rolled(x: Tensor, shifts: Any, dims: Any = None) -> Sequence[int]:
    return _all(x, dims)


METHODS: dict[str, Callable[..., Any]] = {
    "reshape": reshaped("reshape"),
    "view": reshaped("view"),
    "expand": expand,
    **{
        name: linear(name, _none)
        for name in ("to", "float", "double", "bfloat16", "half", "contiguous", "clone")
    },
    **{name: linear(name, _two) for name in ("transpose", "swapaxes", "swapdims")},
    **{name: linear(name, _by_parts) for name in ("chunk", "split", "tensor_split")},
    **{name: linear(name, _all) for name in ("sum", "mean", "squeeze")},
    "flatten": linear("flatten", _from_to),
    "flip": linear("flip", _flipped),
    "movedim": linear("movedim", lambda x, source, to: (*_all(x, source), *_all(x, to))),
    "permute": linear("permute", _moved),
    "repeat": linear("repeat", _repeated),
    "roll": linear("roll", _rolled),
    "unbind": linear("unbind", _one),
    "unflatten": linear("unflatten", _unflattened),
    "unsqueeze": linear("unsqueeze", _inserted),
}
FUNCTIONS: dict[str, Callable[[Any, Any], Dual]] = {"add": add, "sub": sub, "mul": mul, "div": div}
