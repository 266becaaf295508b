"""GELU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/gelu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.triton_backend import launch


@triton.jit
def _gate(x, BY_TANH: tl.constexpr):
    """What multiplies x, and its derivative."""
    if BY_TANH:
        # (1 + tanh(v / 2)) / 2 = 1 / (1 + e^(−v)). Of e^(−|v|), which cannot overflow, both its values at |v|
        # and −|v| are made without cancellation; their product is its derivative on either side.
        square = x * x
        v = 1.5957691216057308 * x * tl.fma(square, 0.044715, 1.0)
        e = tl.exp(-tl.abs(v))
        above = 1.0 / (1.0 + e)
        below = e * above
        s = tl.where(v < 0.0, below, above)
        s_slope = above * below * (1.5957691216057308 * tl.fma(square, 3 * 0.044715, 1.0))
    else:
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        s_slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return s, s_slope


@triton.jit
def _forward(x, x_dot, y, y_dot, elements, first_tangent, BY_TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xi = tl.load(x + i, mask=i < elements, other=0.0).to(tl.float32)
    s, s_slope = _gate(xi, BY_TANH)
    tl.store(y + i, xi * s, mask=i < elements)
    if x_dot is not None:
        j = i - first_tangent
        inside = (i < elements) & (j >= 0)
        ti = tl.load(x_dot + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot + j, tl.fma(xi, s_slope, s) * ti, mask=inside)


@triton.jit
def _backward(x, dy, dx, elements, BY_TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xi = tl.load(x + i, mask=i < elements, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < elements, other=0.0).to(tl.float32)
    s, s_slope = _gate(xi, BY_TANH)
    tl.store(dx + i, d * tl.fma(xi, s_slope, s), mask=i < elements)


_BLOCK = 1024


def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None, by_tanh: bool) -> None:
    elements = x.numel()
    first_tangent = elements - (0 if x_dot is None else x_dot.numel())
    grid = (triton.cdiv(elements, _BLOCK),)
    launch(_forward, grid, x, x_dot, y, y_dot, elements, first_tangent, BY_TANH=by_tanh, BLOCK=_BLOCK)


def backward(x: Tensor, dy: Tensor, dx: Tensor, by_tanh: bool) -> None:
    elements = x.numel()
    grid = (triton.cdiv(elements, _BLOCK),)
    launch(_backward, grid, x, dy, dx, elements, BY_TANH=by_tanh, BLOCK=_BLOCK)
