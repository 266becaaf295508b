"""LayerNorm with its tangent, its primal backward and that of the pair. Formulas:
imf_kernels/ops/layer_norm{,_modulate}.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    add_product,
    dual,
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
    dual_row_of_group,
    group_and_position,
    load_rows,
    row_of_group,
    store_sums,
    sum_of_row,
)
from imf_kernels.backends.triton_kernels.rows import shares as shares
from imf_kernels.backends.triton_launch import replayed


@triton.jit
def _center(x, inside, width: tl.constexpr):
    """Returns the mean of each row of x [ROWS, BLOCK], its correction, and x less both; 0 outside."""
    mean = tl.div_rn(sum_of_row(x), 1.0 * width)
    x = tl.where(inside, x - mean, 0.0)
    correction = tl.div_rn(sum_of_row(x), 1.0 * width)
    return mean, correction, tl.where(inside, x - correction, 0.0)


@triton.jit(do_not_specialize=["length", "first_tangent"])
def layer_norm_forward(
    x, x_dot, scale, scale_dot, shift, shift_dot, y, y_dot, statistics,
    x_stride, x_dot_stride, first_tangent, one, eps, length,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, ROWS)
    position = first + tl.arange(0, ROWS)[:, None]
    row = group * length + position
    column = tl.arange(0, BLOCK)[None, :]
    inside = (position < length) & (column < WIDTH)
    gain = one + row_of_group(scale, group, column, WIDTH)
    xi = load_rows(x, row, x_stride, column, inside, UNIT)
    mean, correction, c = _center(xi, inside, WIDTH)
    r = tl.div_rn(1.0, tl.sqrt_rn(sum_of_row(c * c) * (1.0 / WIDTH) + eps))
    tl.store(statistics + row * 3, mean, mask=position < length)
    tl.store(statistics + row * 3 + 1, correction, mask=position < length)
    tl.store(statistics + row * 3 + 2, r, mask=position < length)
    n = c * r
    out = tl.fma(n, gain, row_of_group(shift, group, column, WIDTH))
    tl.store(y + row * WIDTH + column, out, mask=inside)
    if y_dot is not None:
        t_row = row - first_tangent
        t_group = group - first_tangent // length
        inside &= t_row >= 0
        out_dot = tl.zeros((ROWS, BLOCK), tl.float32)
        out_dot += row_of_group(shift_dot, t_group, column, WIDTH)
        if scale_dot is not None:
            gain_dot = row_of_group(scale_dot, t_group, column, WIDTH)
            out_dot = tl.fma(n, gain_dot, out_dot)
        if x_dot is not None:
            at = x_dot + t_row * (x_dot_stride * UNIT) + column
            _, _, c_dot = _center(tl.load(at, mask=inside, other=0.0).to(tl.float32), inside, WIDTH)
            r_dot = -r * r * r * (sum_of_row(c * c_dot) * (1.0 / WIDTH))
            out_dot = tl.fma(c_dot * r + c * r_dot, gain, out_dot)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["first_tangent", "length", "share"])
def layer_norm_backward(
    x, x_dot, dy, dy_dot, scale, scale_dot, statistics, dx, dx_dot, partial,
    x_stride, x_dot_stride, dy_stride, dy_dot_stride, first_tangent, one, length, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first = group_and_position(length, share)
    column = tl.arange(0, BLOCK)[None, :]
    gain = dual_row_of_group(scale, group, scale_dot, group - first_tangent // length, column, WIDTH)
    gain = minus(gain, (-one,))
    dscale = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    dscale_dot = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift_dot = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        position = first + start + tl.arange(0, ROWS)[:, None]
        row = group * length + position
        inside = (position < length) & (column < WIDTH)
        mean = tl.load(statistics + row * 3, mask=position < length, other=0.0)
        correction = tl.load(statistics + row * 3 + 1, mask=position < length, other=0.0)
        r = tl.load(statistics + row * 3 + 2, mask=position < length, other=0.0)
        t_row = row - first_tangent
        moves = inside & (t_row >= 0)
        at, at_dot = row * (x_stride * UNIT) + column, t_row * (x_dot_stride * UNIT) + column
        xi = load_dual(x, at, inside, x_dot, at_dot, moves)
        c_dot = None
        if len(xi) > 1:
            _, _, c_dot = _center(xi[1], moves, WIDTH)
        c = dual(tl.where(inside, xi[0] - mean - correction, 0.0), c_dot)
        r = dual_rstd(c, r, WIDTH)
        n = times(c, r)
        at, at_dot = row * (dy_stride * UNIT) + column, t_row * (dy_dot_stride * UNIT) + column
        d = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
        dscale = add_product(dscale, d, n)
        dshift += of_primal(d)
        if dy_dot is not None:
            dscale_dot = tl.fma(d[0], n[0], dscale_dot)
            dshift_dot += d[0]
        g = times(d, gain)
        of_n = minus(minus(g, mean_of_row(g, WIDTH)), times(n, mean_of_row(times(g, n), WIDTH)))
        at, at_dot = row * WIDTH + column, t_row * WIDTH + column
        store_gradients(dx, at, inside, dx_dot, at_dot, moves, times(r, of_n))
    if dy_dot is None:
        store_sums(partial, (dscale, dshift), column, WIDTH)
    else:
        store_sums(partial, (dscale, dshift, dscale_dot, dshift_dot), column, WIDTH)


_FORWARD, _BACKWARD = RowKernel(layer_norm_forward), RowKernel(layer_norm_backward)


@replayed
def forward(
    x: Tensor, x_dot: Tensor | None, scale: Tensor | None, scale_dot: Tensor | None,
    shift: Tensor | None, shift_dot: Tensor | None, y: Tensor, y_dot: Tensor | None, statistics: Tensor,
    one: float, eps: float,
) -> None:  # fmt: skip
    width = x.shape[-1]
    rows, groups = count_rows(x, width), 1 if scale is None or scale.dim() == 1 else scale.shape[0]
    numbers = rows - count_rows(y_dot, width), float(one), float(eps)
    tensors = x, x_dot, scale, scale_dot, shift, shift_dot, y, y_dot, statistics
    _FORWARD.launch((x, x_dot), tensors, numbers, width, rows, groups)


def backward(
    x: Tensor, dy: Tensor, scale: Tensor | None, statistics: Tensor, dx: Tensor, partial: Tensor,
    sums: Tensor, one: float,
) -> None:  # fmt: skip
    pair_backward(x, None, dy, None, scale, None, statistics, dx, None, partial, sums, one)


@replayed
def pair_backward(
    x: Tensor, x_dot: Tensor | None, dy: Tensor, dy_dot: Tensor | None, scale: Tensor | None,
    scale_dot: Tensor | None, statistics: Tensor, dx: Tensor, dx_dot: Tensor | None, partial: Tensor,
    sums: Tensor, one: float,
) -> None:  # fmt: skip
    width, strided = x.shape[-1], (x, x_dot, dy, dy_dot)
    rows, tensors = count_rows(x, width), (*strided, scale, scale_dot, statistics, dx, dx_dot)
    _BACKWARD.sum(strided, tensors, (rows - count_rows(dy_dot, width), float(one)), rows, partial, sums)
