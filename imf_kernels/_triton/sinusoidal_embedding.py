"""Sinusoidal embedding of scalars with its tangent. The formula is in
imf_kernels/ops/sinusoidal_embedding.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile


@triton.jit(do_not_specialize=["rows", "first_tangent"])
def _forward(
    t, t_dot, frequencies, y, y_dot, first_tangent, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    f = tl.load(frequencies + column, mask=column < WIDTH, other=0.0)
    angle = tl.load(t + row, mask=row < rows, other=0.0).to(tl.float32) * f
    cos, sin = tl.cos(angle), tl.sin(angle)
    at = y + row * (2 * WIDTH) + column
    tl.store(at, cos, mask=inside)
    tl.store(at + WIDTH, sin, mask=inside)
    if t_dot is not None:
        t_row = row - first_tangent
        inside &= t_row >= 0
        angle_dot = tl.load(t_dot + t_row, mask=inside & (column >= 0), other=0.0).to(tl.float32) * f
        at = y_dot + t_row * (2 * WIDTH) + column
        tl.store(at, -sin * angle_dot, mask=inside)
        tl.store(at + WIDTH, cos * angle_dot, mask=inside)


def forward(t: Tensor, t_dot: Tensor | None, frequencies: Tensor, y: Tensor, y_dot: Tensor | None) -> None:
    """t, t_dot and the `frequencies` in fp32 contiguous."""
    first_tangent = t.numel() - (0 if t_dot is None else t_dot.numel())
    Tile.part_of_rows(frequencies.numel()).launch(
        _forward, t.numel(), t, t_dot, frequencies, y, y_dot, first_tangent
    )
