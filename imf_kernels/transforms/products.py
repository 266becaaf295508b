"""Rules for convolutions and matrix products inside `imf_kernels.jvp`.

y is linear in each operand, so ẏ is the sum of y with one operand's tangent in its place, over the operands
that have one; a bias is left out. Where one of two operands has a tangent this is two products, and PyTorch's
own rule, which multiplies the zeros of the other, three. Where both have one these are as many as PyTorch's,
whose nodes save the operands with their tangents, here without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends.layout import in_dtype
from imf_kernels.dual import Dual, is_differentiable, map_both, primal, tangent_graph, unpack
from imf_kernels.transforms.rules import _ALSO, _PARAMETER, Rule, _plain, serves


def _convolution(function: Callable[..., Tensor]) -> Rule:
    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **options: Any) -> Any:
        if not isinstance(input, Dual) or not _plain(weight, bias):
            return _PARAMETER
        y = function(input.primal, weight, bias, *args, **options)
        with tangent_graph(input.differentiable):
            y_dot = function(cast(Tensor, input.tangent_rows), weight, None, *args, **options)
            return Dual(y, y_dot.to(y.dtype), differentiable=input.differentiable)

    return rule


for _function in (
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.convolution),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
):
    serves(_function)(_convolution(_function))


@serves(F.bilinear)
def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """Serves two operands with tangents too, for which PyTorch computes four products instead of three."""
    if not _plain(weight, bias):
        return _PARAMETER
    differentiable = is_differentiable(input1, input2)
    (a, a_dot), (b, b_dot) = unpack(input1), unpack(input2)
    y = F.bilinear(a, b, weight, bias)
    with tangent_graph(differentiable):
        pairs = [(p, q) for p, q in ((a_dot, b), (a, b_dot)) if p is not None and q is not None]
        parts = [F.bilinear(p, q, weight) for p, q in pairs]
        return Dual(y, sum(parts[1:], parts[0]).to(y.dtype), differentiable=differentiable)


def _are_plain(operands: Sequence[Any]) -> bool:
    return all(isinstance(x, Dual) or (isinstance(x, Tensor) and _plain(x)) for x in operands)


def _product(function: Callable[..., Tensor], *operands: Any) -> Any:
    """Serves a function that is linear in each of its operands."""
    if not _are_plain(operands):
        return _ALSO
    differentiable, primals = is_differentiable(*operands), [primal(x) for x in operands]
    y = function(*primals)
    with tangent_graph(differentiable):
        parts = (
            function(*primals[:i], x.tangent_rows, *primals[i + 1 :])
            for i, x in enumerate(operands)
            if isinstance(x, Dual)
        )
        y_dot = next(parts)
        for part in parts:
            y_dot = y_dot + part if differentiable or torch.compiler.is_compiling() else y_dot.add_(part)
        return Dual(y, y_dot.to(y.dtype), differentiable=differentiable)


def _matmul(a: Any, b: Any) -> Any:
    """Serves products of matrices batch by batch, whose operands are laid out once for all three products."""
    batch = tuple(a.shape[:-2])
    if len(batch) < 1 or batch != tuple(b.shape[:-2]) or len(b.shape) != len(a.shape):
        return _product(torch.matmul, a, b)
    if torch.compiler.is_compiling() or not _are_plain((a, b)):
        return _product(torch.matmul, a, b)
    folded = [x if len(batch) == 1 else map_both(lambda t: t.flatten(0, -3), x) for x in (a, b)]
    differentiable = is_differentiable(a, b)
    (a, a_dot), (b, b_dot) = map(unpack, folded)
    y, y_dot = torch.bmm(a, b), None
    with tangent_graph(differentiable):
        for p, q in ((a_dot, b), (a, b_dot)):
            if p is None or q is None:
                continue
            if y_dot is None:
                y_dot = torch.bmm(p, q)
            elif differentiable:
                y_dot = y_dot + torch.bmm(p, q)
            else:
                y_dot.baddbmm_(in_dtype(p, y_dot.dtype), in_dtype(q, y_dot.dtype))
        dual = Dual(y, y_dot, differentiable=differentiable)
    if len(batch) == 1:
        return dual
    return map_both(lambda t: torch.ops.aten._unsafe_view(t, (*batch, *t.shape[1:])), dual)


def _positional(names: Sequence[str], args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...] | None:
    """Returns the arguments of these names in order; `None` if others are given, or some missing."""
    rest = names[len(args) :]
    return None if len(args) > len(names) or {*named} != {*rest} else (*args, *map(named.get, rest))


def _of_two(function: Callable[..., Any], second: str) -> Rule:
    """Makes the rule of a product of `input` and an operand named `second`."""

    def rule(*args: Any, **named: Any) -> Any:
        operands = _positional(("input", second), args, named)
        return _ALSO if operands is None else function(*operands)

    return rule


for _name, _second in (
    *(("mm", "mat2"), ("bmm", "mat2"), ("mv", "vec")),
    *(("inner", "other"), ("outer", "vec2"), ("ger", "vec2")),
):
    _function = getattr(torch, _name)
    serves(_function, getattr(Tensor, _name))(_of_two(partial(_product, _function), _second))
serves(torch.matmul, Tensor.matmul, torch.linalg.matmul)(_of_two(_matmul, "other"))


@serves(torch.tensordot)
def _tensordot(a: Any, b: Any, dims: Any = 2) -> Any:
    return _product(lambda a, b: torch.tensordot(a, b, dims), a, b)


@serves(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    """Serves two operands and more: of one PyTorch returns views."""
    if len(operands) < 2:
        return _ALSO
    return _product(lambda *operands: torch.einsum(equation, *operands), *operands)


def _added(function: Callable[..., Tensor], names: tuple[str, str]) -> Rule:
    """Makes the rule of y = β input + α a b: each product is added to ẏ by the call that computes it."""

    def rule(*args: Any, beta: Any = 1, alpha: Any = 1, **named: Any) -> Any:
        operands = _positional(("input", *names), args, named)
        if operands is None or not _are_plain(operands):
            return _ALSO
        differentiable = is_differentiable(*operands)
        (x, x_dot), (a, a_dot), (b, b_dot) = map(unpack, operands)
        y = function(x, a, b, beta=beta, alpha=alpha)
        with tangent_graph(differentiable):
            y_dot, factor = (x, 0) if x_dot is None else (x_dot, beta)
            for p, q in ((a_dot, b), (a, b_dot)):
                if p is not None and q is not None:
                    y_dot, factor = function(y_dot, p, q, beta=factor, alpha=alpha), 1
            if a_dot is None and b_dot is None:
                y_dot = (beta * y_dot if beta != 0 else torch.zeros_like(y_dot)).expand_as(y).contiguous()
            return Dual(y, y_dot.to(y.dtype), differentiable=differentiable)

    return rule


for _name, _names in {
    **dict.fromkeys(("baddbmm", "addbmm"), ("batch1", "batch2")),
    **{"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "addr": ("vec1", "vec2")},
}.items():
    _function = getattr(torch, _name)
    serves(_function, getattr(Tensor, _name))(_added(_function, _names))
