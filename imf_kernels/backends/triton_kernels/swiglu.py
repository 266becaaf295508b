"""SwiGLU with its tangent, and its primal backward. Formulas: imf_kernels/ops/swiglu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.elementwise import sigmoid, silu_derivative
from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows


@triton.jit
def _load(x, row, column, inside, stride, WIDTH: tl.constexpr):
    """Loads both halves of rows of x."""
    at = x + row * stride + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def swiglu_forward(
    x, x_dot, y, y_dot, x_stride, x_dot_stride, first_tangent, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    gate, up = _load(x, row, column, inside, x_stride * UNIT, WIDTH)
    s = sigmoid(gate)
    tl.store(y + row * WIDTH + column, gate * s * up, mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        gate_dot, up_dot = _load(x_dot, t_row, column, inside, x_dot_stride * UNIT, WIDTH)
        out_dot = tl.fma(silu_derivative(gate, s) * gate_dot, up, gate * s * up_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward(
    x, dy, dx, x_stride, dy_stride, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    gate, up = _load(x, row, column, inside, x_stride * UNIT, WIDTH)
    d = tl.load(dy + row * (dy_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    at_dx = dx + row * (2 * WIDTH) + column
    tl.store(at_dx, d * up * silu_derivative(gate, s), mask=inside)
    tl.store(at_dx + WIDTH, d * (gate * s), mask=inside)


_FORWARD, _BACKWARD = RowKernel(swiglu_forward, widest=1024), RowKernel(swiglu_backward, widest=1024)


def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
    width = y.shape[-1]
    rows = count_rows(y, width)
    first_tangent = rows - count_rows(y_dot, width)
    _FORWARD.launch((x, x_dot), (x, x_dot, y, y_dot), (first_tangent,), width, rows)


def backward(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    width = dy.shape[-1]
    _BACKWARD.launch((x, dy), (x, dy, dx), (), width, count_rows(dy, width))
