"""Rows rounded to FP8, each with a scale of its own. What for is in imf_kernels/fp8.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile, in_units
from imf_kernels.layout import rows_of


@triton.jit
def rounded_to_e4m3(x):
    """The nearest number of 3 mantissa bits and a quantum of at least 2⁻⁹, ties to even, for |x| ≤ 448.

    The conversion that follows is then exact: Triton's interpreter is wrong where rounding carries.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 · 2²⁰ times: the sum's last bit is the quantum
    return (x + magic) - magic


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x, q, scale, x_stride, largest, smallest_scale, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    xi = tl.load(x + row * (x_stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.maximum(tl.div_rn(tl.max(tl.abs(xi), axis=1, keep_dims=True), largest), smallest_scale)
    # NaN where an element is not finite, which a maximum may leave out, and which e4m3 may not tell.
    s += tl.sum(xi * 0.0, axis=1, keep_dims=True)
    tl.store(scale + row, s, mask=row < rows)
    tl.store(q + row * WIDTH + column, rounded_to_e4m3(tl.div_rn(xi, s)).to(tl.float8e4nv), mask=inside)


def quantize(x: Tensor, q: Tensor, scale: Tensor, largest: float, smallest_scale: float) -> None:
    """Fills q, [rows, d], and scale, [rows, 1]."""
    (x, stride), rows = rows_of(x), len(x)
    unit, (stride,) = in_units(stride)
    Tile.whole_rows(x.shape[-1]).launch(
        _quantize, rows, x, q, scale, stride, largest, smallest_scale, UNIT=unit
    )
