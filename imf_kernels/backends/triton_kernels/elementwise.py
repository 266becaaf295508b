"""SiLU and GELU with their tangents, their primal backward and that of the pair.

Formulas: imf_kernels/ops/elementwise.py.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    chain,
    load_cotangents,
    load_dual,
    store_gradients,
    times,
)
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
def silu_curvature(x, s):
    """Returns the derivative of silu_derivative: s (1 − s) (2 + x (1 − 2 s))."""
    return s * (1.0 - s) * tl.fma(x, 1.0 - 2.0 * s, 2.0)


@triton.jit
def dual_silu(x):
    """Returns SiLU and its derivative, of a dual."""
    s = sigmoid(x[0])
    slope = silu_derivative(x[0], s)
    return chain(x[0] * s, slope, x), chain(slope, silu_curvature(x[0], s), x)


@triton.jit
def _gate(x, FUNCTION: tl.constexpr):
    """Returns the factor s of y = x s, and y's first and second derivative."""
    if FUNCTION == "silu":
        s = sigmoid(x)
        slope, curvature = silu_derivative(x, s), silu_curvature(x, s)
    elif FUNCTION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        s_slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = tl.fma(x, s_slope, s)
        curvature = tl.fma(x, -x * s_slope, 2.0 * s_slope)
    else:
        # (1 + tanh(v / 2)) / 2 = 1 / (1 + e^(−v)). Its values at |v| and −|v| are computed without
        # cancellation from e^(−|v|), which cannot overflow; their product is its derivative on either side.
        square = x * x
        v = 1.5957691216057308 * x * tl.fma(square, 0.044715, 1.0)
        e = tl.exp(-tl.abs(v))
        above = 1.0 / (1.0 + e)
        below = e * above
        s = tl.where(v < 0.0, below, above)
        v_slope = 1.5957691216057308 * tl.fma(square, 3 * 0.044715, 1.0)
        s_slope = above * below * v_slope
        slope = tl.fma(x, s_slope, s)
        # s″ = s (1 − s) ((1 − 2 s) v′² + v″), with 1 − 2 s = s(−v) − s(v).
        turned = tl.where(v < 0.0, above - below, below - above)
        v_curvature = 1.5957691216057308 * 6 * 0.044715 * x
        s_curvature = tl.fma(s_slope, turned * v_slope, above * below * v_curvature)
        curvature = tl.fma(x, s_curvature, 2.0 * s_slope)
    return s, slope, curvature


@triton.jit(do_not_specialize=["first_tangent", "elements"])
def elementwise_forward(
    x, x_dot, y, y_dot, first_tangent, elements,
    FUNCTION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements.to(tl.int64) * UNIT
    xi = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    s, slope, _ = _gate(xi, FUNCTION)
    tl.store(y + i, xi * s, mask=inside)
    if x_dot is not None:
        j = i - first_tangent.to(tl.int64) * UNIT
        inside &= j >= 0
        ti = tl.load(x_dot + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot + j, slope * ti, mask=inside)


@triton.jit(do_not_specialize=["first_tangent", "elements"])
def elementwise_backward(
    x, x_dot, dy, dy_dot, dx, dx_dot, first_tangent, elements,
    FUNCTION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements.to(tl.int64) * UNIT
    j = i - first_tangent.to(tl.int64) * UNIT
    moves = inside & (j >= 0)
    xi = load_dual(x, i, inside, x_dot, j, moves)
    d = load_cotangents(dy, i, inside, dy_dot, j, moves)
    _, slope, curvature = _gate(xi[0], FUNCTION)
    store_gradients(dx, i, inside, dx_dot, j, moves, times(d, chain(slope, curvature, xi)))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


class Elementwise:
    """The launchers of an elementwise function; kernels take contiguous tensors.

    They count elements in units of the largest power of two up to 16 that divides their number: a
    constant, by which the compiler knows that several elements at once are inside.
    """

    def __init__(self, function: str) -> None:
        self._forward, self._backward = (
            {unit: Launcher(kernel, FUNCTION=function, UNIT=unit, BLOCK=_BLOCK) for unit in (1, 2, 4, 8, 16)}
            for kernel in (elementwise_forward, elementwise_backward)
        )

    def forward(self, x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
        unit, grid, numbers = self._counts(x, x_dot)
        self._forward[unit](grid, (*map(_contiguous, (x, x_dot)), y, y_dot), *numbers)

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        self.pair_backward(x, None, dy, None, dx, None)

    def pair_backward(
        self, x: Tensor, x_dot: Tensor | None, dy: Tensor, dy_dot: Tensor | None, dx: Tensor,
        dx_dot: Tensor | None,
    ) -> None:  # fmt: skip
        unit, grid, numbers = self._counts(x, x_dot)
        self._backward[unit](grid, (*map(_contiguous, (x, x_dot, dy, dy_dot)), dx, dx_dot), *numbers)

    def _counts(self, x: Tensor, x_dot: Tensor | None) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """Returns the unit, the grid, and the first tangent and the number of elements in units."""
        elements = x.numel()
        first_tangent = elements - (0 if x_dot is None else x_dot.numel())
        unit = math.gcd(16, elements, first_tangent)
        return unit, (-(-elements // _BLOCK), 1), (first_tangent // unit, elements // unit)


silu, gelu, gelu_tanh = Elementwise("silu"), Elementwise("gelu"), Elementwise("gelu_tanh")
