"""Gated residual with its tangent, and its primal backward. The formulas are in
imf_kernels/ops/gated_residual.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile, group_and_position, in_units, row_of_group
from imf_kernels.layout import count_rows, groups_of, last_contiguous, rows_of


@triton.jit(do_not_specialize=["length", "first_tangent"])
def _forward(
    x, x_dot, branch, branch_dot, gate, gate_dot, y, y_dot, first_tangent,
    x_stride, x_dot_stride, branch_stride, branch_dot_stride, gate_stride, gate_dot_stride, length,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, ROWS)
    position = first + tl.arange(0, ROWS)[:, None]
    row = group * length + position
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (position < length) & (column < WIDTH)
    g = row_of_group(gate, group, gate_stride * UNIT, column, WIDTH)
    b = tl.load(branch + row * (branch_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(x + row * (x_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, tl.fma(b, g, stream), mask=inside)
    if y_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        out_dot = tl.zeros((ROWS, BLOCK), tl.float32)
        if x_dot is not None:
            out_dot += tl.load(x_dot + t_row * (x_dot_stride * UNIT) + column, mask=inside, other=0.0).to(
                tl.float32
            )
        if branch_dot is not None:
            at = branch_dot + t_row * (branch_dot_stride * UNIT) + column
            out_dot = tl.fma(tl.load(at, mask=inside, other=0.0).to(tl.float32), g, out_dot)
        if gate_dot is not None:
            t_group = group - first_tangent // length
            g_dot = row_of_group(gate_dot, t_group, gate_dot_stride * UNIT, column, WIDTH)
            out_dot = tl.fma(b, g_dot, out_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["length", "share"])
def _backward(
    dy, branch, gate, dbranch, dy_stride, branch_stride, gate_stride, dgate, length, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, share)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = row_of_group(gate, group, gate_stride * UNIT, column, WIDTH)
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        position = first + start + tl.arange(0, ROWS)[:, None]
        row = group * length + position
        inside = (position < length) & (column < WIDTH)
        d = tl.load(dy + row * (dy_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(branch + row * (branch_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        dg = tl.fma(d, b, dg)
        tl.store(dbranch + row * WIDTH + column, d * g, mask=inside)
    dg = tl.sum(dg, axis=0, keep_dims=True)
    tl.store(dgate + tl.program_id(0).to(tl.int64) * WIDTH + column, dg, mask=column < WIDTH)


def forward(
    x: Tensor,
    x_dot: Tensor | None,
    branch: Tensor,
    branch_dot: Tensor | None,
    gate: Tensor,
    gate_dot: Tensor | None,
    y: Tensor,
    y_dot: Tensor | None,
) -> None:
    groups, length = groups_of(gate, x)
    gates = [None if g is None else last_contiguous(g) for g in (gate, gate_dot)]
    rows, strides = zip(*(rows_of(t) for t in (x, x_dot, branch, branch_dot, *gates)), strict=True)
    unit, in_unit = in_units(*strides)
    Tile.part_of_rows(x.shape[-1]).launch(
        *(_forward, length, *rows, y, y_dot, count_rows(x) - count_rows(y_dot), *in_unit),
        groups=groups,
        UNIT=unit,
    )


def backward(dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor) -> Tensor:
    """Fills dbranch; the gradient of the gate, [groups, d] in fp32."""
    groups, length = groups_of(gate, branch)
    rows, strides = zip(*(rows_of(t) for t in (dy, branch, last_contiguous(gate))), strict=True)
    unit, in_unit = in_units(*strides)
    return Tile.part_of_rows(dy.shape[-1]).sum_over_groups(
        *(_backward, groups, length, 1, *rows, dbranch, *in_unit), UNIT=unit
    )[:, 0]
