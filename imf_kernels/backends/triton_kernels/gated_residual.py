"""Gated residual with its tangent, its primal backward and that of the pair.

Formulas: imf_kernels/ops/gated_residual.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    add_product,
    load_cotangents,
    load_dual,
    store_gradients,
    times,
)
from imf_kernels.backends.triton_kernels.rows import (
    RowKernel,
    count_rows,
    dual_row_of_group,
    group_and_position,
    load_rows,
    row_of_group,
    store_sums,
)
from imf_kernels.backends.triton_kernels.rows import shares as shares_of_rows
from imf_kernels.backends.triton_launch import replayed

_WIDEST = 1024


@triton.jit(do_not_specialize=["length", "first_tangent"])
def gated_residual_forward(
    x, x_dot, branch, branch_dot, gate, gate_dot, y, y_dot,
    x_stride, x_dot_stride, branch_stride, branch_dot_stride, first_tangent, length,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, ROWS)
    position = first + tl.arange(0, ROWS)[:, None]
    row = group * length + position
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (position < length) & (column < WIDTH)
    g = row_of_group(gate, group, column, WIDTH)
    b = load_rows(branch, row, branch_stride, column, inside, UNIT)
    stream = load_rows(x, row, x_stride, column, inside, UNIT)
    tl.store(y + row * WIDTH + column, tl.fma(b, g, stream), mask=inside)
    if y_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        out_dot = tl.zeros((ROWS, BLOCK), tl.float32)
        if x_dot is not None:
            out_dot += load_rows(x_dot, t_row, x_dot_stride, column, inside, UNIT)
        if branch_dot is not None:
            out_dot = tl.fma(
                load_rows(branch_dot, t_row, branch_dot_stride, column, inside, UNIT), g, out_dot
            )
        if gate_dot is not None:
            t_group = group - first_tangent // length
            g_dot = row_of_group(gate_dot, t_group, column, WIDTH)
            out_dot = tl.fma(b, g_dot, out_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["first_tangent", "length", "share"])
def gated_residual_backward(
    dy, dy_dot, branch, branch_dot, gate, gate_dot, dbranch, dbranch_dot, partial,
    dy_stride, dy_dot_stride, branch_stride, branch_dot_stride, first_tangent, length, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, share)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = dual_row_of_group(gate, group, gate_dot, group - first_tangent // length, column, WIDTH)
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    dg_dot = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        position = first + start + tl.arange(0, ROWS)[:, None]
        row = group * length + position
        inside = (position < length) & (column < WIDTH)
        t_row = row - first_tangent
        moves = inside & (t_row >= 0)
        at, at_dot = row * (dy_stride * UNIT) + column, t_row * (dy_dot_stride * UNIT) + column
        d = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
        at, at_dot = row * (branch_stride * UNIT) + column, t_row * (branch_dot_stride * UNIT) + column
        b = load_dual(branch, at, inside, branch_dot, at_dot, moves)
        dg = add_product(dg, d, b)
        if dy_dot is not None:
            dg_dot = tl.fma(d[0], b[0], dg_dot)
        at, at_dot = row * WIDTH + column, t_row * WIDTH + column
        store_gradients(dbranch, at, inside, dbranch_dot, at_dot, moves, times(d, g))
    if dy_dot is None:
        store_sums(partial, (dg,), column, WIDTH)
    else:
        store_sums(partial, (dg, dg_dot), column, WIDTH)


_FORWARD, _BACKWARD = (
    RowKernel(gated_residual_forward, widest=_WIDEST),
    RowKernel(gated_residual_backward, widest=_WIDEST),
)


def shares(groups: int, length: int, width: int, count: int) -> int:
    """Returns the number of partial sums per group of `length` rows [width]."""
    return shares_of_rows(groups, length, min(width, _WIDEST), count)


@replayed
def forward(
    x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None,
    gate: Tensor, gate_dot: Tensor | None, y: Tensor, y_dot: Tensor | None,
) -> None:  # fmt: skip
    width = x.shape[-1]
    rows, groups = count_rows(x, width), 1 if gate.dim() == 1 else gate.shape[0]
    tensors = x, x_dot, branch, branch_dot, gate, gate_dot, y, y_dot
    _FORWARD.launch(tensors[:4], tensors, (rows - count_rows(y_dot, width),), width, rows, groups)


def backward(
    dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor, partial: Tensor, dgate: Tensor
) -> None:
    pair_backward(dy, None, branch, None, gate, None, dbranch, None, partial, dgate)


@replayed
def pair_backward(
    dy: Tensor, dy_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None, gate: Tensor,
    gate_dot: Tensor | None, dbranch: Tensor, dbranch_dot: Tensor | None, partial: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    width, strided = branch.shape[-1], (dy, dy_dot, branch, branch_dot)
    rows, tensors = count_rows(branch, width), (*strided, gate, gate_dot, dbranch, dbranch_dot)
    _BACKWARD.sum(strided, tensors, (rows - count_rows(dy_dot, width),), rows, partial, sums)
