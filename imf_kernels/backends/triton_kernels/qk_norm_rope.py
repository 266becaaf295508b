"""Per-head RMSNorm and RoPE with their tangent, and the primal backward. Formulas: ops/qk_norm_rope.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.rms_norm import inverse_rms, normalized_backward, normalized_dot
from imf_kernels.backends.triton_kernels.rows import RowKernel, shares

__all__ = ["backward", "forward", "shares"]


@triton.jit
def _rotate(n, cos, sin):
    """Rotates pairs (2i, 2i + 1) of columns of n [ROWS, BLOCK] by angle i of the tables [ROWS, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(n, (n.shape[0], n.shape[1] // 2, 2)))
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
    return tl.reshape(turned, n.shape)


@triton.jit
def _place(row, rows, heads, length):
    """Returns sample, head and position of rows counted by sample, position and head, the memory order of
    projections and results; divides in 64 bits only if `rows` needs it."""
    row = row.to(rows.dtype)
    sample, position, head = row // heads // length, row // heads % length, row % heads
    return sample.to(tl.int64), head.to(tl.int64), position.to(tl.int64)


@triton.jit
def _offset(place, strides, UNIT: tl.constexpr):
    return (place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]) * UNIT


@triton.jit
def _table(table, position, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the row of a table [length, WIDTH / 2] for each position."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    return tl.load(table + position * (WIDTH // 2) + pair, mask=inside & (pair < WIDTH // 2), other=0.0)


@triton.jit(do_not_specialize=["first_tangent", "heads", "length", "rows"])
def _forward(
    x, x_dot, weight, cos, sin, y, y_dot, rstd,
    x_strides, x_dot_strides, first_tangent, heads, length, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    place = _place(row, rows, heads, length)
    c = _table(cos, place[2], row < rows, WIDTH, BLOCK)
    s = _table(sin, place[2], row < rows, WIDTH, BLOCK)
    at = x + _offset(place, x_strides, UNIT) + column
    xi = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    r = inverse_rms(xi, WIDTH, eps)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, _rotate(xi * r * w, c, s), mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent.to(tl.int64) * heads * length
        inside &= t_row >= 0
        place = place[0] - first_tangent, place[1], place[2]
        at = x_dot + _offset(place, x_dot_strides, UNIT) + column
        ti = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        n_dot = normalized_dot(xi, ti, r, WIDTH) * w
        tl.store(y_dot + t_row * WIDTH + column, _rotate(n_dot, c, s), mask=inside)


@triton.jit(do_not_specialize=["heads", "length", "rows", "share"])
def _backward(
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
        c = _table(cos, place[2], row < rows, WIDTH, BLOCK)
        s = _table(sin, place[2], row < rows, WIDTH, BLOCK)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        at = x + _offset(place, x_strides, UNIT) + column
        n = tl.load(at, mask=inside, other=0.0).to(tl.float32) * r
        at = dy + _offset(place, dy_strides, UNIT) + column
        # The rotation is orthogonal: its transpose rotates back.
        dn = _rotate(tl.load(at, mask=inside, other=0.0).to(tl.float32), c, -s)
        dw += dn * n
        tl.store(dx + row * WIDTH + column, normalized_backward(dn * w, n, r, WIDTH), mask=inside)
    dw = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(partial + program * WIDTH + column, dw, mask=column < WIDTH)


_FORWARD, _BACKWARD = RowKernel(_forward), RowKernel(_backward)


def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor,
    y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    batch, heads, length, width = x.shape
    first_tangent = batch - (0 if x_dot is None else x_dot.shape[0])
    _FORWARD.launch(
        width,
        (x.stride()[:3], (0, 0, 0) if x_dot is None else x_dot.stride()[:3]),
        (x, x_dot, weight, cos, sin, y, y_dot, rstd),
        (first_tangent, heads, length, float(eps)),
        batch * heads * length,
    )


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dx: Tensor,
    partial: Tensor, dweight: Tensor,
) -> None:  # fmt: skip
    _, heads, length, _ = x.shape
    tensors, strides = (x, dy, weight, cos, sin, rstd, dx), (x.stride()[:3], dy.stride()[:3])
    _BACKWARD.sum(strides, tensors, partial, dweight, (heads, length), rstd.numel())
