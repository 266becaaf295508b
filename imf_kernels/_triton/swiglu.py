"""SwiGLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/swiglu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile, in_units
from imf_kernels._triton.silu import sigmoid, silu_derivative
from imf_kernels.layout import count_rows, rows_of


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def _forward(
    x, x_dot, y, y_dot, first_tangent, x_stride, x_dot_stride, rows,
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


def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
    (x, x_stride), (x_dot, x_dot_stride), rows = rows_of(x), rows_of(x_dot), count_rows(x)
    unit, strides = in_units(x_stride, x_dot_stride)
    Tile.part_of_rows(y.shape[-1]).launch(
        _forward, rows, x, x_dot, y, y_dot, rows - count_rows(x_dot), *strides, UNIT=unit
    )


def backward(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    (x, x_stride), (dy, dy_stride) = rows_of(x), rows_of(dy)
    unit, strides = in_units(x_stride, dy_stride)
    Tile.part_of_rows(dy.shape[-1]).launch(_backward, count_rows(x), x, dy, dx, *strides, UNIT=unit)
