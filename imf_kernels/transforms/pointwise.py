"""Rules for arithmetic and activations inside `imf_kernels.jvp`.

The backward nodes of PyTorch save the tensors that they need with their tangents, which then live until `jvp`
returns: with explicit attention a matrix of weights per layer. Here nodes see primals alone. The tangent of a
product takes two passes instead of three, that of an activation one, by PyTorch's kernel of its backward.

While torch.compile traces, PyTorch's rules use symbolic zeros if only one operand has a tangent; their
kernels (2.13) turn dynamic lengths into constants, and every new length would compile again. The rules of
arithmetic are without zeros, also because 0 · ∞ would be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends import cpu, recompute
from imf_kernels.backends.dispatch import in_graph
from imf_kernels.backends.layout import as_floats, contiguous_like, in_dtype, in_rows, or_zeros, sums
from imf_kernels.backends.recompute import again, kept, kept_pair, scratch
from imf_kernels.dual import Dual, is_differentiable, tangent_graph, unchecked, unpack
from imf_kernels.ops.arithmetic import ARITHMETIC
from imf_kernels.transforms.rules import _ALSO, Rule, serves

_aten = torch.ops.aten
_PLAIN = (Dual, Tensor, torch.nn.Parameter, int, float)


def _are_operands(*operands: Any) -> bool:
    """Returns whether the tensors among these are of no subclass."""
    for x in operands:  # noqa: SIM110  (a generator takes twice the time)
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return False
    return True


def _of_shape_and_dtype(y_dot: Tensor, y: Tensor) -> Tensor:
    return in_dtype(y_dot if y_dot.shape == y.shape else y_dot.expand_as(y).contiguous(), y.dtype)


def _data(x: Any) -> Any:
    """Returns a value without its graph; `detach` takes a third of the time of no_grad."""
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _arithmetic(
    y: Callable[..., Tensor],
    of_a: Callable[..., Any],
    of_b: Callable[..., Any],
    of_both: Callable[..., Any] | None = None,
    reads: bool = True,
) -> Rule:
    """Makes the rule of y(a, b): ẏ is of_a(ȧ, a, b, y), of_b(ḃ, a, b, y) or of_both(ȧ, ḃ, a, b, y).

    reads: these functions use the values of a, b or y.
    """

    def rule(*operands: Any, **named: Any) -> Any:
        if len(operands) != 2 or named or not _are_operands(*operands):
            return _ALSO
        (a, a_dot), (b, b_dot) = unpack(operands[0]), unpack(operands[1])
        if a_dot is not None and b_dot is not None:
            if of_both is None or torch.compiler.is_compiling():
                return _ALSO
            differentiable = is_differentiable(*operands)
        else:
            differentiable = operands[a_dot is None].differentiable
        result = y(a, b)
        values = a, b, result
        if reads and not differentiable:
            values = _data(a), _data(b), _data(result)
        if a_dot is None:
            y_dot = of_b(b_dot, *values)
        elif b_dot is None:
            y_dot = of_a(a_dot, *values)
        else:
            y_dot = cast(Any, of_both)(a_dot, b_dot, *values)
        return unchecked(result, _of_shape_and_dtype(y_dot, result), differentiable)

    return rule


def _copy(t: Tensor, y: Tensor) -> Tensor:
    """Returns a copy of an operand's tangent in the shape of y: in-place calls may write into the result."""
    if t.shape == y.shape:
        return t.clone()
    return t.expand_as(y).clone(memory_format=torch.contiguous_format)


def _same(t: Tensor, a: Any, b: Any, y: Tensor) -> Tensor:
    return _copy(t, y)


_negative = ARITHMETIC["sub"][2]
_sub = _arithmetic(torch.sub, _same, _negative, lambda a_dot, b_dot, a, b, y: a_dot - b_dot, reads=False)


def _of_product(a_dot: Tensor, b_dot: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    part = a_dot * b
    if part.shape != y.shape or part.dtype != y.dtype or part.requires_grad or b_dot.requires_grad:
        return torch.addcmul(part, a, b_dot)
    return part.addcmul_(a, b_dot)


class _Product(torch.autograd.Function):
    """A product of large tensors, of one shape or with a factor per sample and channel, [B, 1, d].

    The former, of a gated unit, can be computed again for the layer that takes it. The latter, a norm's
    result modulated or a branch with a gate, has both gradients in one pass, and a norm's or an activation's
    result computed again.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        if a.shape == b.shape:
            ctx.recompute = _product_again
        (ctx.again_a, of_a), (ctx.again_b, of_b) = (
            kept(x) if x.numel() > other.numel() else (None, (x,)) for x, other in ((a, b), (b, a))
        )
        ctx.save_for_backward(*of_a, *of_b)
        ctx.count, ctx.shapes = len(of_a), (a.shape, b.shape)
        return torch.mul(a, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled() and not (ctx.again_a is ctx.again_b is None):
            raise RuntimeError(
                "imf_kernels.jvp: create_graph=True asks for second derivatives of a product with a result "
                "of this library's kernels, which do not have them"
            )
        saved = ctx.saved_tensors
        a = again(ctx.again_a, saved[: ctx.count], ctx.shapes[0])
        b = again(ctx.again_b, saved[ctx.count :], ctx.shapes[1])
        if a.shape == b.shape or torch.is_grad_enabled():
            return (dy * b).sum_to_size(a.shape), (dy * a).sum_to_size(b.shape)
        return _of_gated(dy, a, b) if b.numel() < a.numel() else _of_gated(dy, b, a)[::-1]


_GATE = cpu.kernels("gated_residual")


def _of_gated(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of branch [B, ..., d] and of gate [B, 1, ..., d], of their product."""
    branch, (groups, length) = in_rows(branch), (gate.shape[0], math.prod(branch.shape[1:-1]))
    dbranch = contiguous_like(branch)
    partial, dgate = sums(_GATE, branch, groups, length, branch.shape[-1], gate.shape)
    gates = as_floats(gate).view(groups, gate.shape[-1])
    _GATE.backward(in_rows(dy), branch, gates, dbranch, partial, dgate)
    return dbranch, in_dtype(dgate, gate.dtype)


class _PairProduct(torch.autograd.Function):
    """The product of branch [B, ..., d] and gate [B, 1, ..., d], and its tangent that carries gradients.

    The branch and its tangent are those of a norm, and computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, branch_dot: Tensor, gate: Tensor, gate_dot: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.again, parts = kept_pair(branch, branch_dot)
        ctx.save_for_backward(gate, gate_dot, *parts)
        ctx.recompute_pair = partial(_pair_product_again, ctx.again)
        ctx.set_materialize_grads(False)
        return branch * gate, torch.addcmul(branch_dot * gate, branch, gate_dot)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_dot: Tensor | None) -> Any:
        gate, gate_dot, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "imf_kernels.jvp: create_graph=True asks for second derivatives of a product with a result "
                "of this library's kernels, which do not have them"
            )
        branch, branch_dot = ctx.again(*parts)
        (groups, width), length = (gate.shape[0], gate.shape[-1]), math.prod(branch.shape[1:-1])
        gates, gates_dot = (as_floats(t).view(groups, width) for t in (gate, gate_dot))
        dbranch, dbranch_dot = contiguous_like(branch), contiguous_like(branch_dot)
        partial, total = sums(_GATE, branch, groups, length, width, (groups, 2, width), 2)
        cotangents = or_zeros(dy, branch), or_zeros(dy_dot, branch_dot)
        _GATE.pair_backward(
            *(*cotangents, branch, branch_dot, gates, gates_dot, dbranch, dbranch_dot, partial, total)
        )
        dgate, dgate_dot = (in_dtype(t.reshape(gate.shape), gate.dtype) for t in total.unbind(1))
        return dbranch, dbranch_dot, dgate, dgate_dot


def _pair_product_again(again: Any, gate: Tensor, gate_dot: Tensor, *parts: Tensor) -> Any:
    branch, branch_dot = again(*parts)
    return branch * gate, branch_dot.mul_(gate).addcmul_(branch, gate_dot)


class _PairSum(torch.autograd.Function):
    """The sum of such a product and a shift [B, 1, ..., d], and its tangent: both can be computed again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, a_dot: Tensor, shift: Tensor, shift_dot: Tensor) -> Any:
        again, parts = kept_pair(a, a_dot)
        ctx.save_for_backward(shift, shift_dot, *parts)
        ctx.recompute_pair, ctx.shape = partial(_pair_sum_again, again), shift.shape
        ctx.set_materialize_grads(False)
        return a + shift, a_dot + shift_dot

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_dot: Tensor | None) -> Any:
        dshift, dshift_dot = (None if t is None else t.sum_to_size(ctx.shape) for t in (dy, dy_dot))
        return dy, dy_dot, dshift, dshift_dot


def _pair_sum_again(again: Any, shift: Tensor, shift_dot: Tensor, *parts: Tensor) -> Any:
    a, a_dot = again(*parts)
    return a.add_(shift), a_dot.add_(shift_dot)


def _of_pairs(function: Any, one: Rule) -> Rule:
    """Makes the rule that modulates a norm's result by `function`, where tangents carry gradients."""

    def rule(*operands: Any, **named: Any) -> Any:
        if len(operands) == 2 and not named and all(type(x) is Dual and x.differentiable for x in operands):
            for x, of_sample in (operands, operands[::-1]):
                (a, a_dot), (b, b_dot) = unpack(x), unpack(of_sample)
                if (
                    not torch.compiler.is_compiling()
                    and torch.is_grad_enabled()
                    and a.dtype == b.dtype
                    and _is_gated(a, b)
                    and kept_pair(a, cast(Tensor, a_dot))[0] is not None
                ):
                    y, y_dot = function.apply(a, a_dot, b, b_dot)
                    return unchecked(y, y_dot, True)
        return one(*operands, **named)

    return rule


def _product_again(a: Tensor, b: Tensor) -> Tensor:
    return torch.mul(a, b, out=scratch(a, a.shape))


def _times(a: Any, b: Any) -> Tensor:
    """Computes a · b, of large operands so that backward keeps and does less."""
    if torch.compiler.is_compiling() or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return torch.mul(a, b)
    served = (
        max(a.numel(), b.numel()) >= recompute.SMALLEST
        and not in_graph()
        and torch.is_grad_enabled()
        and (a.requires_grad and not a.is_leaf)
        and (b.requires_grad and not b.is_leaf)
        and a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.bfloat16)
        and a.device.type == b.device.type == "cpu"
        and (a.shape == b.shape or _is_gated(a, b) or _is_gated(b, a))
    )
    return _Product.apply(a, b) if served else torch.mul(a, b)


def _is_gated(branch: Tensor, gate: Tensor) -> bool:
    """Returns whether the shapes are [B, ..., d] and [B, 1, ..., d]."""
    return branch.dim() == gate.dim() > 2 and gate.shape == (
        branch.shape[0],
        *(1,) * (branch.dim() - 2),
        branch.shape[-1],
    )


_add = _of_pairs(
    _PairSum, _arithmetic(torch.add, _same, _same, lambda a_dot, b_dot, a, b, y: a_dot + b_dot, reads=False)
)
_mul = _of_pairs(_PairProduct, _arithmetic(_times, *ARITHMETIC["mul"][1:], _of_product))
_div = _arithmetic(
    torch.div,
    *ARITHMETIC["div"][1:],
    lambda a_dot, b_dot, a, b, y: torch.addcmul(a_dot, y, b_dot, value=-1) / b,
)
_reflected_div = _arithmetic(lambda a, b: a.reciprocal() * b, lambda a_dot, a, b, y: -y * a_dot / a, _same)
serves(torch.add, Tensor.add)(_add)
serves(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract)(_sub)
serves(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply)(_mul)
serves(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide)(_div)
# By name: torch.compile does not find methods written in Python by identity.
ARITHMETIC_WHILE_COMPILING: dict[str, Rule] = {
    **dict.fromkeys(("add", "__radd__"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("rsub", "__rsub__"), _arithmetic(torch.rsub, _negative, _same, reads=False)),
    **dict.fromkeys(("mul", "multiply", "__rmul__"), _mul),
    **dict.fromkeys(("div", "true_divide"), _div),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), _reflected_div),
}


@serves(torch.addcmul, Tensor.addcmul)
def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    operands = input, tensor1, tensor2
    if torch.compiler.is_compiling() or not _are_operands(*operands):
        return _ALSO
    differentiable = is_differentiable(*operands)
    (x, x_dot), (a, a_dot), (b, b_dot) = map(unpack, operands)
    y = torch.addcmul(x, a, b, value=value)
    with tangent_graph(differentiable):
        y_dot = x_dot
        for p, q in ((a_dot, b), (a, b_dot)):
            if p is not None and q is not None:
                part = p * q if value == 1 else value * p * q
                y_dot = part if y_dot is None else torch.addcmul(y_dot, p, q, value=value)
        if y_dot is x_dot:
            y_dot = _copy(cast(Tensor, x_dot), y)
        return Dual(y, _of_shape_and_dtype(cast(Tensor, y_dot), y), differentiable=differentiable)


def _activation(function: Callable[..., Tensor], tangent: Callable[..., Tensor]) -> Rule:
    """Makes the rule of y = function(x, *options), whose ẏ is tangent(ẋ, x, y, *options)."""

    def rule(input: Any, *options: Any, inplace: bool = False, **named: Any) -> Any:
        if inplace or named or torch.compiler.is_compiling() or input.differentiable:
            return _ALSO
        if not input.dtype.is_floating_point:  # backward would conjugate
            return _ALSO
        x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
        y = function(x, *options)
        y_dot = tangent(x_dot, _data(x), _data(y), *options)
        return unchecked(y, in_dtype(y_dot, y.dtype))

    return rule


def _square(x_dot: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x * x_dot).mul_(2)


for _functions, _tangent in (
    ((torch.sigmoid, Tensor.sigmoid), lambda t, x, y: _aten.sigmoid_backward(t, y)),
    ((torch.tanh, Tensor.tanh), lambda t, x, y: _aten.tanh_backward(t, y)),
    ((torch.exp, Tensor.exp), lambda t, x, y: t * y),
    ((torch.rsqrt, Tensor.rsqrt), lambda t, x, y: (t * y / x).mul_(-0.5)),
    ((torch.square, Tensor.square), _square),
    ((F.relu, torch.relu, Tensor.relu), lambda t, x, y: _aten.threshold_backward(t, y, 0)),
    ((F.mish,), lambda t, x, y: _aten.mish_backward(t, x)),
    ((F.hardswish,), lambda t, x, y: _aten.hardswish_backward(t, x)),
):
    serves(*_functions)(_activation(_functions[0], _tangent))


_squared = _activation(torch.pow, lambda t, x, y, exponent: _square(t, x, y))


@serves(torch.pow, Tensor.pow)
def _pow(input: Any, exponent: Any) -> Any:
    if not isinstance(input, Dual) or not isinstance(exponent, (int, float)) or exponent != 2:
        return _ALSO
    return _squared(input, exponent)


# A method written in Python, whose guard in `RULES` torch.compile cannot check.
IN_EAGER_MODE: dict[Any, Rule] = {Tensor.__pow__: _pow}
