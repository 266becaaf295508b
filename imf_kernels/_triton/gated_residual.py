"""Gated residual with its tangent, and its primal backward. The formulas are in
imf_kernels/ops/gated_residual.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile, in_units
from imf_kernels.layout import count_rows, rows_of


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def _forward(
    x, x_dot, branch, branch_dot, gate, y, y_dot, first_tangent,
    x_stride, x_dot_stride, branch_stride, branch_dot_stride, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    g = tl.load(gate + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(branch + row * (branch_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(x + row * (x_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, tl.fma(b, g, stream), mask=inside)
    if y_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        # The map is linear for a given gate: the tangent is the same sum of the tangents.
        out_dot = tl.zeros((ROWS, BLOCK), tl.float32)
        if x_dot is not None:
            out_dot += tl.load(x_dot + t_row * (x_dot_stride * UNIT) + column, mask=inside, other=0.0).to(
                tl.float32
            )
        if branch_dot is not None:
            at = branch_dot + t_row * (branch_dot_stride * UNIT) + column
            out_dot = tl.fma(tl.load(at, mask=inside, other=0.0).to(tl.float32), g, out_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _backward(
    dy, branch, gate, dbranch, dy_stride, branch_stride, dgate, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = tl.load(gate + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        d = tl.load(dy + row * (dy_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(branch + row * (branch_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        dg = tl.fma(d, b, dg)
        tl.store(dbranch + row * WIDTH + column, d * g, mask=inside)
    dg = tl.sum(dg, axis=0, keep_dims=True)
    tl.store(dgate + program * WIDTH + column, dg, mask=column < WIDTH)


def forward(
    x: Tensor,
    x_dot: Tensor | None,
    branch: Tensor,
    branch_dot: Tensor | None,
    gate: Tensor,
    y: Tensor,
    y_dot: Tensor | None,
) -> None:
    (x, x_stride), (x_dot, x_dot_stride), rows = rows_of(x), rows_of(x_dot), count_rows(x)
    (branch, branch_stride), (branch_dot, branch_dot_stride) = rows_of(branch), rows_of(branch_dot)
    unit, strides = in_units(x_stride, x_dot_stride, branch_stride, branch_dot_stride)
    Tile.part_of_rows(x.shape[-1]).launch(
        *(_forward, rows, x, x_dot, branch, branch_dot, gate.contiguous(), y, y_dot),
        *(rows - count_rows(y_dot), *strides),
        UNIT=unit,
    )


def backward(dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor) -> Tensor:
    """Fills dbranch; the gradient of the gate in fp32."""
    (dy, dy_stride), (branch, branch_stride) = rows_of(dy), rows_of(branch)
    unit, strides = in_units(dy_stride, branch_stride)
    return Tile.part_of_rows(dy.shape[-1]).sum_over_rows(
        _backward, count_rows(dy), dy, branch, gate.contiguous(), dbranch, *strides, UNIT=unit
    )
