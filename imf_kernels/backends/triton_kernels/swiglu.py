"""SwiGLU with its tangent, its primal backward and that of the pair. Formulas: imf_kernels/ops/swiglu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import load_cotangents, load_dual, store_gradients, times
from imf_kernels.backends.triton_kernels.elementwise import dual_silu, sigmoid, silu_derivative
from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows
from imf_kernels.backends.triton_launch import replayed


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


@triton.jit(do_not_specialize=["first_tangent", "rows"])
def swiglu_backward(
    x, x_dot, dy, dy_dot, dx, dx_dot, x_stride, x_dot_stride, dy_stride, dy_dot_stride, first_tangent, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    t_row = row - first_tangent
    moves = inside & (t_row >= 0)
    at, at_dot = row * (x_stride * UNIT) + column, t_row * (x_dot_stride * UNIT) + column
    gate = load_dual(x, at, inside, x_dot, at_dot, moves)
    up = load_dual(x, at + WIDTH, inside, x_dot, at_dot + WIDTH, moves)
    at, at_dot = row * (dy_stride * UNIT) + column, t_row * (dy_dot_stride * UNIT) + column
    d = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
    silu, slope = dual_silu(gate)
    at, at_dot = row * (2 * WIDTH) + column, t_row * (2 * WIDTH) + column
    store_gradients(dx, at, inside, dx_dot, at_dot, moves, times(times(d, up), slope))
    store_gradients(dx, at + WIDTH, inside, dx_dot, at_dot + WIDTH, moves, times(d, silu))


_FORWARD, _BACKWARD = RowKernel(swiglu_forward, widest=1024), RowKernel(swiglu_backward, widest=1024)


@replayed
def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
    width = y.shape[-1]
    rows = count_rows(y, width)
    first_tangent = rows - count_rows(y_dot, width)
    _FORWARD.launch((x, x_dot), (x, x_dot, y, y_dot), (first_tangent,), width, rows)


def backward(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    pair_backward(x, None, dy, None, dx, None)


@replayed
def pair_backward(
    x: Tensor, x_dot: Tensor | None, dy: Tensor, dy_dot: Tensor | None, dx: Tensor, dx_dot: Tensor | None
) -> None:
    strided, width = (x, x_dot, dy, dy_dot), dy.shape[-1]
    rows = count_rows(dy, width)
    first_tangent = rows - count_rows(dy_dot, width)
    _BACKWARD.launch(strided, (*strided, dx, dx_dot), (first_tangent,), width, rows)
