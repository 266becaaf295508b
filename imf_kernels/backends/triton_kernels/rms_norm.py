"""RMSNorm with its tangent, its primal backward and that of the pair.

Formulas: imf_kernels/ops/rms_norm.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    dual_rstd,
    load_cotangents,
    load_dual,
    mean_of_row,
    minus,
    of_primal,
    store_gradients,
    times,
)
from imf_kernels.backends.triton_kernels.rows import (
    RowKernel,
    count_rows,
    load_rows,
    store_sums,
    sum_of_row,
)
from imf_kernels.backends.triton_kernels.rows import shares as shares
from imf_kernels.backends.triton_launch import replayed


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr):
    """Returns r = (mean(x²) + eps)^(−½) of rows [ROWS, BLOCK], as [ROWS, 1]."""
    return tl.div_rn(1.0, tl.sqrt_rn(sum_of_row(x * x) * (1.0 / WIDTH) + eps))


@triton.jit
def tangent_of_norm(x, x_dot, r, WIDTH: tl.constexpr):
    """Returns the tangent of x r."""
    r_dot = -r * r * r * (sum_of_row(x * x_dot) * (1.0 / WIDTH))
    return x_dot * r + x * r_dot


@triton.jit
def backward_of_norm(n, g, r, WIDTH: tl.constexpr):
    """Returns the gradient of x for the cotangent g of n = x r, of duals."""
    return times(r, minus(g, times(n, mean_of_row(times(g, n), WIDTH))))


@triton.jit(do_not_specialize=["first_tangent", "rows"])
def rms_norm_forward(
    x, x_dot, weight, y, y_dot, rstd, x_stride, x_dot_stride, first_tangent, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    xi = load_rows(x, row, x_stride, column, inside, UNIT)
    r = inverse_rms(xi, eps, WIDTH)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, xi * r * w, mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        ti = load_rows(x_dot, t_row, x_dot_stride, column, inside, UNIT)
        tl.store(y_dot + t_row * WIDTH + column, tangent_of_norm(xi, ti, r, WIDTH) * w, mask=inside)


@triton.jit(do_not_specialize=["first_tangent", "rows", "share"])
def rms_norm_backward(
    x, x_dot, dy, dy_dot, weight, rstd, dx, dx_dot, partial,
    x_stride, x_dot_stride, dy_stride, dy_dot_stride, first_tangent, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        t_row = row - first_tangent
        moves = inside & (t_row >= 0)
        at, at_dot = row * (x_stride * UNIT) + column, t_row * (x_dot_stride * UNIT) + column
        xi = load_dual(x, at, inside, x_dot, at_dot, moves)
        r = dual_rstd(xi, tl.load(rstd + row, mask=row < rows, other=0.0), WIDTH)
        n = times(xi, r)
        at, at_dot = row * (dy_stride * UNIT) + column, t_row * (dy_dot_stride * UNIT) + column
        dn = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
        dw += of_primal(times(dn, n))
        dxi = backward_of_norm(n, times(dn, (w,)), r, WIDTH)
        at, at_dot = row * WIDTH + column, t_row * WIDTH + column
        store_gradients(dx, at, inside, dx_dot, at_dot, moves, dxi)
    store_sums(partial, (dw,), column, WIDTH)


_FORWARD, _BACKWARD = RowKernel(rms_norm_forward), RowKernel(rms_norm_backward)


@replayed
def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float
) -> None:
    width, rows = weight.numel(), rstd.numel()
    numbers = rows - count_rows(x_dot, width), float(eps)
    _FORWARD.launch((x, x_dot), (x, x_dot, weight, y, y_dot, rstd), numbers, width, rows)


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, partial: Tensor, dweight: Tensor
) -> None:
    pair_backward(x, None, dy, None, weight, rstd, dx, None, partial, dweight)


@replayed
def pair_backward(
    x: Tensor, x_dot: Tensor | None, dy: Tensor, dy_dot: Tensor | None, weight: Tensor, rstd: Tensor,
    dx: Tensor, dx_dot: Tensor | None, partial: Tensor, dweight: Tensor,
) -> None:  # fmt: skip
    strided, rows = (x, x_dot, dy, dy_dot), rstd.numel()
    numbers = (rows - count_rows(x_dot, weight.numel()),)
    _BACKWARD.sum(strided, (*strided, weight, rstd, dx, dx_dot), numbers, rows, partial, dweight)
