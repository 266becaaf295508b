"""RMSNorm with its tangent, and its primal backward; per head and with rotary positions for qk_norm_rope.

Formulas: imf_kernels/ops/rms_norm.py and qk_norm_rope.py. A rotation has tables, and strides of sample, head
and position; rows are then counted by sample, position and head, the memory order of projections and results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows, sum_of_row
from imf_kernels.backends.triton_kernels.rows import shares as shares


@triton.jit
def _place(row, rows, heads, length):
    """Returns sample, head and position of rows, () without heads; divides in 64 bits only if `rows` needs
    it."""
    if heads is None:
        return ()
    else:
        row = row.to(rows.dtype)
        sample, position, head = row // heads // length, row // heads % length, row % heads
        return sample.to(tl.int64), head.to(tl.int64), position.to(tl.int64)


@triton.jit
def _load(x, row, place, first, column, inside, strides, UNIT: tl.constexpr):
    """Loads rows of x, which begins with the row, or the sample of `place`, that has number `first`."""
    if len(place) > 0:
        at = (place[0] - first) * strides[0] + place[1] * strides[1] + place[2] * strides[2]
    else:
        at = (row - first) * strides
    return tl.load(x + at * UNIT + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _angles(cos, sin, place, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the row of the tables [length, WIDTH / 2] for each position; returns () without tables."""
    if cos is None:
        return ()
    else:
        pair = tl.arange(0, BLOCK // 2)[None, :]
        at, inside = place[2] * (WIDTH // 2) + pair, inside & (pair < WIDTH // 2)
        return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _rotate(n, angles, SIGN: tl.constexpr):
    """Rotates pairs (2i, 2i + 1) of columns of n [ROWS, BLOCK] by angle i, backwards if SIGN is −1."""
    if len(angles) > 0:
        cos, sin = angles[0], angles[1] * SIGN
        even, odd = tl.split(tl.reshape(n, (n.shape[0], n.shape[1] // 2, 2)))
        turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
        return tl.reshape(turned, n.shape)
    else:
        return n


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
    """Returns the gradient of x for the cotangent g of n = x r."""
    return r * (g - n * (sum_of_row(g * n) * (1.0 / WIDTH)))


@triton.jit(do_not_specialize=["first_tangent", "heads", "length", "rows"])
def rms_norm_forward(
    x, x_dot, weight, cos, sin, y, y_dot, rstd,
    x_strides, x_dot_strides, first_tangent, heads, length, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    place = _place(row, rows, heads, length)
    angles = _angles(cos, sin, place, row < rows, WIDTH, BLOCK)
    xi = _load(x, row, place, 0, column, inside, x_strides, UNIT)
    r = inverse_rms(xi, eps, WIDTH)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, _rotate(xi * r * w, angles, 1), mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        if heads is not None:
            t_row = row - first_tangent.to(tl.int64) * heads * length
        inside &= t_row >= 0
        ti = _load(x_dot, row, place, first_tangent, column, inside, x_dot_strides, UNIT)
        out_dot = _rotate(tangent_of_norm(xi, ti, r, WIDTH) * w, angles, 1)
        tl.store(y_dot + t_row * WIDTH + column, out_dot, mask=inside)


@triton.jit(do_not_specialize=["heads", "length", "rows", "share"])
def rms_norm_backward(
    x, dy, weight, cos, sin, rstd, dx, partial, x_strides, dy_strides, heads, length, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        place = _place(row, rows, heads, length)
        angles = _angles(cos, sin, place, row < rows, WIDTH, BLOCK)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        n = _load(x, row, place, 0, column, inside, x_strides, UNIT) * r
        # The rotation is orthogonal: its transpose rotates back.
        dn = _rotate(_load(dy, row, place, 0, column, inside, dy_strides, UNIT), angles, -1)
        dw += dn * n
        dxi = backward_of_norm(n, dn * w, r, WIDTH)
        tl.store(dx + row * WIDTH + column, dxi, mask=inside)
    dw = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(partial + program * WIDTH + column, dw, mask=column < WIDTH)


_FORWARD, _BACKWARD = RowKernel(rms_norm_forward), RowKernel(rms_norm_backward)


def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float
) -> None:
    width, rows = weight.numel(), rstd.numel()
    numbers = rows - count_rows(x_dot, width), None, None, float(eps)
    _FORWARD.launch((x, x_dot), (x, x_dot, weight, None, None, y, y_dot, rstd), numbers, width, rows)


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, partial: Tensor, dweight: Tensor
) -> None:
    tensors = x, dy, weight, None, None, rstd, dx
    _BACKWARD.sum((x, dy), tensors, (None, None), rstd.numel(), partial, dweight)
