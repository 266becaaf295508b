"""Rules for arithmetic and activations inside `imf_kernels.jvp`.

The backward nodes of PyTorch save the tensors that they need with their tangents, which then live until `jvp`
returns: with explicit attention a matrix of weights per layer. Here nodes see primals alone. The tangent of a
product takes two passes instead of three, that of an activation one, by PyTorch's kernel of its backward.

While torch.compile traces, PyTorch's rules use symbolic zeros if only one operand has a tangent; their
kernels (2.13) turn dynamic lengths into constants, and every new length would compile again. The rules of
arithmetic are without zeros, also because 0 · ∞ would be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends.layout import in_dtype
from imf_kernels.dual import Dual, is_differentiable, tangent_graph, unchecked, unpack
from imf_kernels.ops.arithmetic import ARITHMETIC
from imf_kernels.transforms.rules import _ALSO, Rule, serves

_aten = torch.ops.aten
_PLAIN = (Dual, Tensor, torch.nn.Parameter, int, float)


def _are_operands(*operands: Any) -> bool:
    """Returns whether the tensors among these are of no subclass."""
    return all([type(x) in _PLAIN or not isinstance(x, Tensor) for x in operands])


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
        (a, a_dot), (b, b_dot) = map(unpack, operands)
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
    return t.clone() if t.shape == y.shape else t.expand_as(y).clone(memory_format=torch.contiguous_format)


def _same(t: Tensor, a: Any, b: Any, y: Tensor) -> Tensor:
    return _copy(t, y)


_negative = ARITHMETIC["sub"][2]
_add = _arithmetic(torch.add, _same, _same, lambda a_dot, b_dot, a, b, y: a_dot + b_dot, reads=False)
_sub = _arithmetic(torch.sub, _same, _negative, lambda a_dot, b_dot, a, b, y: a_dot - b_dot, reads=False)


def _of_product(a_dot: Tensor, b_dot: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    part = a_dot * b
    if part.shape != y.shape or part.dtype != y.dtype or part.requires_grad or b_dot.requires_grad:
        return torch.addcmul(part, a, b_dot)
    return part.addcmul_(a, b_dot)


_mul = _arithmetic(torch.mul, *ARITHMETIC["mul"][1:], _of_product)
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
