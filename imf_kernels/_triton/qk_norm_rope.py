"""Per-head RMSNorm and rotary positions with their tangent, and the primal backward. The formulas are in
imf_kernels/ops/qk_norm_rope.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rms_norm import inverse_rms, normalized_backward, normalized_dot
from imf_kernels._triton.rows import Tile
from imf_kernels.layout import count_rows


@triton.jit
def _rotate(n, cos, sin):
    """Pairs (2i, 2i + 1) of columns of n [ROWS, BLOCK] turned by angle i of the tables [ROWS, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(n, (n.shape[0], n.shape[1] // 2, 2)))
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
    return tl.reshape(turned, n.shape)


@triton.jit
def _offset(row, heads, length, strides):
    """Where row (b, h, l), counted in this order, begins."""
    position, head, sample = row % length, row // length % heads, row // length // heads
    return sample * strides[0] + head * strides[1] + position * strides[2]


@triton.jit
def _table(table, row, rows, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The row of a table [length, WIDTH / 2] for each row's position."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    inside = (row < rows) & (pair < WIDTH // 2)
    return tl.load(table + row % length * (WIDTH // 2) + pair, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "first_tangent", "length"])
def _forward(
    x, x_dot, weight, cos, sin, y, y_dot, rstd,
    first_tangent, heads, length, x_strides, x_dot_strides, eps, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    c = _table(cos, row, rows, length, WIDTH, BLOCK)
    s = _table(sin, row, rows, length, WIDTH, BLOCK)
    at = x + _offset(row, heads, length, x_strides) + column
    xi = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    r = inverse_rms(xi, WIDTH, eps)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, _rotate(xi * r * w, c, s), mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        at = x_dot + _offset(t_row, heads, length, x_dot_strides) + column
        ti = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        n_dot = normalized_dot(xi, ti, r, WIDTH) * w
        tl.store(y_dot + t_row * WIDTH + column, _rotate(n_dot, c, s), mask=inside)


@triton.jit(do_not_specialize=["rows", "share", "length"])
def _backward(
    x, dy, weight, cos, sin, rstd, dx,
    heads, length, x_strides, dy_strides, dx_strides, dweight, rows, share,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        c = _table(cos, row, rows, length, WIDTH, BLOCK)
        s = _table(sin, row, rows, length, WIDTH, BLOCK)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        at = x + _offset(row, heads, length, x_strides) + column
        n = tl.load(at, mask=inside, other=0.0).to(tl.float32) * r
        at = dy + _offset(row, heads, length, dy_strides) + column
        # The turn is orthogonal: its transpose turns back.
        dn = _rotate(tl.load(at, mask=inside, other=0.0).to(tl.float32), c, -s)
        dw += dn * n
        at = dx + _offset(row, heads, length, dx_strides) + column
        tl.store(at, normalized_backward(dn * w, n, r, WIDTH), mask=inside)
    dw = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(dweight + program * WIDTH + column, dw, mask=column < WIDTH)


def forward(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    y_dot: Tensor | None,
    rstd: Tensor,
    eps: float,
) -> None:
    _, heads, length, width = x.shape
    rows, x_dot_strides = count_rows(x), None if x_dot is None else x_dot.stride()[:3]
    Tile.whole_rows(width).launch(
        *(_forward, rows, x, x_dot, weight.contiguous(), cos, sin, y, y_dot, rstd),
        *(rows - count_rows(x_dot), heads, length, x.stride()[:3], x_dot_strides, eps),
    )


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dx: Tensor
) -> Tensor:
    """Fills dx; the gradient of the weight in fp32."""
    _, heads, length, width = x.shape
    return Tile.whole_rows(width).sum_over_rows(
        *(_backward, count_rows(x), x, dy, weight.contiguous(), cos, sin, rstd, dx, heads, length),
        *(x.stride()[:3], dy.stride()[:3], dx.stride()[:3]),
    )
