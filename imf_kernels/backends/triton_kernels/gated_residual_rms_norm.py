"""Gated residual and the RMSNorm that follows it, with tangents, the primal backward and that of the pair.

Formulas: imf_kernels/ops/gated_residual_rms_norm.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    add_product,
    cotangents,
    dual,
    dual_rstd,
    load_cotangents,
    of_primal,
    store_gradients,
    times,
)
from imf_kernels.backends.triton_kernels.rms_norm import backward_of_norm, inverse_rms, tangent_of_norm
from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows, load_rows, store_sums
from imf_kernels.backends.triton_kernels.rows import shares as shares
from imf_kernels.backends.triton_launch import replayed


@triton.jit(do_not_specialize=["first_tangent", "rows"])
def gated_residual_rms_norm_forward(
    x, x_dot, branch, branch_dot, gate, weight, stream, stream_dot, y, y_dot, rstd,
    x_stride, x_dot_stride, branch_stride, branch_dot_stride, first_tangent, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    g = tl.load(gate + column, mask=column < WIDTH, other=0.0)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    b = load_rows(branch, row, branch_stride, column, inside, UNIT)
    # The stream is normalised as rounded.
    s = tl.fma(b, g, load_rows(x, row, x_stride, column, inside, UNIT)).to(stream.dtype.element_ty)
    tl.store(stream + row * WIDTH + column, s, mask=inside)
    s = s.to(tl.float32)
    r = inverse_rms(s, eps, WIDTH)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, s * r * w, mask=inside)
    if y_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        s_dot = tl.zeros((ROWS, BLOCK), tl.float32)
        if x_dot is not None:
            s_dot += load_rows(x_dot, t_row, x_dot_stride, column, inside, UNIT)
        if branch_dot is not None:
            s_dot = tl.fma(load_rows(branch_dot, t_row, branch_dot_stride, column, inside, UNIT), g, s_dot)
        s_dot = s_dot.to(stream_dot.dtype.element_ty)
        tl.store(stream_dot + t_row * WIDTH + column, s_dot, mask=inside)
        out_dot = tangent_of_norm(s, s_dot.to(tl.float32), r, WIDTH) * w
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["first_tangent", "rows", "share"])
def gated_residual_rms_norm_backward(
    stream, x_dot, dstream, dstream_dot, dy, dy_dot, branch, branch_dot, gate, weight, rstd,
    dx, dx_dot, dbranch, dbranch_dot, partial,
    stream_stride, x_dot_stride, dstream_stride, dstream_dot_stride, dy_stride, dy_dot_stride,
    branch_stride, branch_dot_stride, first_tangent, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    g = tl.load(gate + column, mask=column < WIDTH, other=0.0)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        t_row = row - first_tangent
        moves = inside & (t_row >= 0)
        s_dot, b_dot = None, None
        if dy_dot is not None:
            s_dot = tl.zeros((ROWS, BLOCK), tl.float32)
            if x_dot is not None:
                s_dot += load_rows(x_dot, t_row, x_dot_stride, column, moves, UNIT)
            if branch_dot is not None:
                b_dot = load_rows(branch_dot, t_row, branch_dot_stride, column, moves, UNIT)
                s_dot = tl.fma(b_dot, g, s_dot)
            # It is normalised as rounded, like the stream.
            s_dot = s_dot.to(stream.dtype.element_ty).to(tl.float32)
        s = dual(load_rows(stream, row, stream_stride, column, inside, UNIT), s_dot)
        r = dual_rstd(s, tl.load(rstd + row, mask=row < rows, other=0.0), WIDTH)
        n = times(s, r)
        at, at_dot = row * (dy_stride * UNIT) + column, t_row * (dy_dot_stride * UNIT) + column
        dn = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
        dw += of_primal(times(dn, n))
        d = backward_of_norm(n, times(dn, (w,)), r, WIDTH)
        of_s, of_s_dot = of_primal(d), None
        if dstream is not None:
            of_s += load_rows(dstream, row, dstream_stride, column, inside, UNIT)
        if dy_dot is not None:
            of_s_dot = d[0]
            if dstream_dot is not None:
                of_s_dot += load_rows(dstream_dot, t_row, dstream_dot_stride, column, moves, UNIT)
        d = cotangents(of_s, of_s_dot)
        at, at_dot = row * WIDTH + column, t_row * WIDTH + column
        store_gradients(dx, at, inside, dx_dot, at_dot, moves, d)
        store_gradients(dbranch, at, inside, dbranch_dot, at_dot, moves, times(d, (g,)))
        b = dual(load_rows(branch, row, branch_stride, column, inside, UNIT), b_dot)
        dg = add_product(dg, d, b)
    store_sums(partial, (dg, dw), column, WIDTH)


_FORWARD, _BACKWARD = RowKernel(gated_residual_rms_norm_forward), RowKernel(gated_residual_rms_norm_backward)


@replayed
def forward(
    x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None, gate: Tensor, weight: Tensor,
    stream: Tensor, stream_dot: Tensor | None, y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    width, rows = weight.numel(), rstd.numel()
    tensors = x, x_dot, branch, branch_dot, gate, weight, stream, stream_dot, y, y_dot, rstd
    _FORWARD.launch(tensors[:4], tensors, (rows - count_rows(y_dot, width), float(eps)), width, rows)


def backward(
    stream: Tensor, dstream: Tensor | None, dy: Tensor, branch: Tensor, gate: Tensor, weight: Tensor,
    rstd: Tensor, dx: Tensor, dbranch: Tensor, partial: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    pair_backward(
        *(stream, None, dstream, None, dy, None, branch, None, gate, weight, rstd),
        *(dx, None, dbranch, None, partial, sums),
    )


@replayed
def pair_backward(
    stream: Tensor, x_dot: Tensor | None, dstream: Tensor | None, dstream_dot: Tensor | None, dy: Tensor,
    dy_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None, gate: Tensor, weight: Tensor,
    rstd: Tensor, dx: Tensor, dx_dot: Tensor | None, dbranch: Tensor, dbranch_dot: Tensor | None,
    partial: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    strided = stream, x_dot, dstream, dstream_dot, dy, dy_dot, branch, branch_dot
    tensors = *strided, gate, weight, rstd, dx, dx_dot, dbranch, dbranch_dot
    rows = rstd.numel()
    _BACKWARD.sum(strided, tensors, (rows - count_rows(dy_dot, weight.numel()),), rows, partial, sums)
