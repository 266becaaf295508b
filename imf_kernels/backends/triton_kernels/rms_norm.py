"""RMSNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/rms_norm.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.rows import RowKernel, count_rows, row_stride, shares

__all__ = ["backward", "forward", "shares"]


@triton.jit
def inverse_rms(x, width: tl.constexpr, eps):
    """Returns (mean(x²) + eps)^(−½) of each row of x [ROWS, BLOCK], zeros beyond `width`: [ROWS, 1]."""
    mean = tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / width)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def normalized_dot(x, x_dot, r, width: tl.constexpr):
    """Returns the tangent of n = x · r: ẋ r + x ṙ with ṙ = −r³ mean(x ẋ)."""
    r_dot = -r * r * r * (tl.sum(x * x_dot, axis=1, keep_dims=True) * (1.0 / width))
    return x_dot * r + x * r_dot


@triton.jit
def normalized_backward(g, n, r, width: tl.constexpr):
    """Returns the cotangent of x for g, that of n = x · r: r (g − n mean(g n))."""
    return r * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) * (1.0 / width)))


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def _forward(
    x, x_dot, weight, y, y_dot, rstd, x_stride, x_dot_stride, first_tangent, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    xi = tl.load(x + row * (x_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    r = inverse_rms(xi, WIDTH, eps)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * WIDTH + column, xi * r * w, mask=inside)
    if x_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        ti = tl.load(x_dot + t_row * (x_dot_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot + t_row * WIDTH + column, normalized_dot(xi, ti, r, WIDTH) * w, mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _backward(
    x, dy, weight, rstd, dx, partial, x_stride, dy_stride, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        n = tl.load(x + row * (x_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32) * r
        d = tl.load(dy + row * (dy_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        dw += d * n
        tl.store(dx + row * WIDTH + column, normalized_backward(d * w, n, r, WIDTH), mask=inside)
    dw = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(partial + program * WIDTH + column, dw, mask=column < WIDTH)


_FORWARD, _BACKWARD = RowKernel(_forward), RowKernel(_backward)


def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float
) -> None:
    width, rows = weight.numel(), rstd.numel()
    strides = row_stride(x, width), row_stride(x_dot, width)
    numbers = rows - count_rows(x_dot, width), float(eps)
    _FORWARD.launch(width, strides, (x, x_dot, weight, y, y_dot, rstd), numbers, rows)


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, partial: Tensor, dweight: Tensor
) -> None:
    width = weight.numel()
    strides = row_stride(x, width), row_stride(dy, width)
    _BACKWARD.sum(strides, (x, dy, weight, rstd, dx), partial, dweight, (), rstd.numel())
