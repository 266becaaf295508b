"""SiLU and GELU with their tangents, and their primal backward. Formulas: imf_kernels/ops/elementwise.py."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_launch import Launcher

_BLOCK = 1024


@triton.jit
def sigmoid(x):
    """Returns 1 / (1 + e^(−x)), 0 where e^(−x) overflows."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x, s):
    """Returns s + x s (1 − s) for s = sigmoid(x), factored so that it is 0 where s is."""
    return s * tl.fma(x, 1.0 - s, 1.0)


@triton.jit
def _gate(x, FUNCTION: tl.constexpr):
    """Returns the factor s of y = x s, and y's derivative."""
    if FUNCTION == "silu":
        s = sigmoid(x)
        slope = silu_derivative(x, s)
    elif FUNCTION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = tl.fma(x, 0.3989422804014327 * tl.exp(-0.5 * x * x), s)
    else:
        # (1 + tanh(v / 2)) / 2 = 1 / (1 + e^(−v)). Its values at |v| and −|v| are computed without
        # cancellation from e^(−|v|), which cannot overflow; their product is its derivative on either side.
        square = x * x
        v = 1.5957691216057308 * x * tl.fma(square, 0.044715, 1.0)
        e = tl.exp(-tl.abs(v))
        above = 1.0 / (1.0 + e)
        below = e * above
        s = tl.where(v < 0.0, below, above)
        s_slope = above * below * (1.5957691216057308 * tl.fma(square, 3 * 0.044715, 1.0))
        slope = tl.fma(x, s_slope, s)
    return s, slope


@triton.jit(do_not_specialize=["first_tangent", "elements"])
def elementwise_forward(
    x, x_dot, y, y_dot, first_tangent, elements,
    FUNCTION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements.to(tl.int64) * UNIT
    xi = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    s, slope = _gate(xi, FUNCTION)
    tl.store(y + i, xi * s, mask=inside)
    if x_dot is not None:
        j = i - first_tangent.to(tl.int64) * UNIT
        inside &= j >= 0
        ti = tl.load(x_dot + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot + j, slope * ti, mask=inside)


@triton.jit(do_not_specialize=["elements"])
def elementwise_backward(
    x, dy, dx, elements, FUNCTION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements.to(tl.int64) * UNIT
    xi = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=inside, other=0.0).to(tl.float32)
    _, slope = _gate(xi, FUNCTION)
    tl.store(dx + i, d * slope, mask=inside)


class Elementwise:
    """The launchers of an elementwise function of contiguous tensors.

    Kernels count elements in units of the largest power of two up to 16 that divides their number: a
    constant, by which the compiler knows that several elements at once are inside.
    """

    def __init__(self, function: str) -> None:
        self._forward, self._backward = (
            {unit: Launcher(kernel, FUNCTION=function, UNIT=unit, BLOCK=_BLOCK) for unit in (1, 2, 4, 8, 16)}
            for kernel in (elementwise_forward, elementwise_backward)
        )

    def forward(self, x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
        elements = x.numel()
        first_tangent = elements - (0 if x_dot is None else x_dot.numel())
        unit = math.gcd(16, elements, first_tangent)
        grid = -(-elements // _BLOCK), 1
        self._forward[unit](grid, (x, x_dot, y, y_dot), first_tangent // unit, elements // unit)

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        elements = x.numel()
        unit = math.gcd(16, elements)
        self._backward[unit]((-(-elements // _BLOCK), 1), (x, dy, dx), elements // unit)


silu, gelu, gelu_tanh = Elementwise("silu"), Elementwise("gelu"), Elementwise("gelu_tanh")
