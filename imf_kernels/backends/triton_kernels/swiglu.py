"""SwiGLU with its tangent, and its primal backward. Formulas: imf_kernels/ops/swiglu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.elementwise import sigmoid, silu_derivative
from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows, row_stride


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def _forward(
    x, x_dot, y, y_dot, x_stride, x_dot_stride, first_tangent, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    at = x + row * (x_stride * UNIT) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    tl.store(y + row * WIDTH + column, gate * s * up, mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        at_dot = x_dot + t_row * (x_dot_stride * UNIT) + column
        gate_dot = tl.load(at_dot, mask=inside, other=0.0).to(tl.float32)
        up_dot = tl.load(at_dot + WIDTH, mask=inside, other=0.0).to(tl.float32)
        out_dot = tl.fma(silu_derivative(gate, s) * gate_dot, up, gate * s * up_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, dy, dx, x_stride, dy_stride, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    at = x + row * (x_stride * UNIT) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * (dy_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    at_dx = dx + row * (2 * WIDTH) + column
    tl.store(at_dx, d * up * silu_derivative(gate, s), mask=inside)
    tl.store(at_dx + WIDTH, d * (gate * s), mask=inside)


_FORWARD, _BACKWARD = RowKernel(_forward, widest=1024), RowKernel(_backward, widest=1024)


def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
    width = y.shape[-1]
    rows = count_rows(y, width)
    strides = row_stride(x, 2 * width), row_stride(x_dot, 2 * width)
    _FORWARD.launch(width, strides, (x, x_dot, y, y_dot), (rows - count_rows(y_dot, width),), rows)


def backward(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    width = dy.shape[-1]
    strides = row_stride(x, 2 * width), row_stride(dy, width)
    _BACKWARD.launch(width, strides, (x, dy, dx), (), count_rows(dy, width))
