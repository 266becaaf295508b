"""Condition tokens put before the patch tokens, with the tangent. The formula is in
imf_kernels/ops/prepend_tokens.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels._triton.rows import Tile


@triton.jit(do_not_specialize=["rows", "first_tangent", "length"])
def _forward(
    x, x_dot, tokens, embeddings, embedding_dots, y, y_dot, first_tangent, length, rows,
    COUNTS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    index = row.to(rows.dtype)  # 64-bit division only if `rows` needs it
    sample, position = (index // (PREFIX + length)).to(tl.int64), index % (PREFIX + length)
    in_x = inside & (position >= PREFIX)
    out = tl.load(x + (sample * length + position - PREFIX) * WIDTH + column, mask=in_x, other=0.0)
    start = 0
    for g in tl.static_range(len(COUNTS)):
        in_group = inside & (position >= start) & (position < start + COUNTS[g])
        token = tl.load(tokens[g] + (position - start) * WIDTH + column, mask=in_group, other=0.0)
        embedding = tl.load(embeddings[g] + sample * WIDTH + column, mask=in_group, other=0.0)
        both = token.to(tl.float32) + embedding.to(tl.float32)
        out = tl.where(in_group, both.to(out.dtype), out)
        start += COUNTS[g]
    tl.store(y + row * WIDTH + column, out, mask=inside)
    if y_dot is not None:
        t_sample = sample - first_tangent
        inside &= t_sample >= 0
        out = tl.zeros((ROWS, BLOCK), out.dtype)
        if x_dot is not None:
            at = x_dot + (t_sample * length + position - PREFIX) * WIDTH + column
            out = tl.load(at, mask=inside & (position >= PREFIX), other=0.0)
        start = 0
        for g in tl.static_range(len(COUNTS)):
            if embedding_dots[g] is not None:
                in_group = inside & (position >= start) & (position < start + COUNTS[g])
                at = embedding_dots[g] + t_sample * WIDTH + column
                out = tl.where(in_group, tl.load(at, mask=in_group, other=0.0), out)
            start += COUNTS[g]
        at = y_dot + (row - first_tangent * (PREFIX + length)) * WIDTH + column
        tl.store(at, out, mask=inside)


def forward(
    x: Tensor,
    x_dot: Tensor | None,
    tokens: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    embedding_dots: Sequence[Tensor | None],
    y: Tensor,
    y_dot: Tensor | None,
) -> None:
    batch, length, width = x.shape
    first_tangent = batch - (0 if y_dot is None else y_dot.shape[0])
    counts = tuple(t.shape[0] for t in tokens)
    Tile.part_of_rows(width).launch(
        *(_forward, batch * y.shape[1], x, x_dot, tuple(tokens), tuple(embeddings), tuple(embedding_dots)),
        *(y, y_dot, first_tangent, length),
        COUNTS=counts,
        PREFIX=sum(counts),
    )
