"""Per-head RMSNorm and RoPE of a projection's queries and keys with their tangent, the primal backward and
that of the pair.

Formulas: imf_kernels/ops/qk_norm_rope.py. Rows are heads, counted by sample, position and head, the memory
order of projections: forward takes those of queries and keys, backward those of values too, which it copies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    cotangents,
    dual_rstd,
    load_dual,
    of_primal,
    store_gradients,
    times,
)
from imf_kernels.backends.triton_kernels.rms_norm import backward_of_norm, inverse_rms, tangent_of_norm
from imf_kernels.backends.triton_kernels.rows import RowKernel, store_sums
from imf_kernels.backends.triton_kernels.rows import shares as shares
from imf_kernels.backends.triton_launch import replayed


@triton.jit
def _place(row, rows, heads, length):
    """Returns position in the batch, position in its sample, and head; divides in 64 bits only if `rows`
    needs it."""
    row = row.to(rows.dtype)
    position, head = row // heads, row % heads
    return position.to(tl.int64), (position % length).to(tl.int64), head.to(tl.int64)


@triton.jit
def _weight(q_weight, k_weight, of_query, column, WIDTH: tl.constexpr):
    """Loads the weight of each row's norm."""
    inside = column < WIDTH
    q = tl.load(q_weight + column, mask=inside, other=0.0)
    return tl.where(of_query, q, tl.load(k_weight + column, mask=inside, other=0.0))


@triton.jit
def _angles(cos, sin, step, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the row of the tables [length, WIDTH / 2] for each position."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    at, inside = step * (WIDTH // 2) + pair, inside & (pair < WIDTH // 2)
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _rotate(n, cos, sin):
    """Rotates pairs (2i, 2i + 1) of columns of n [ROWS, BLOCK] by angle i."""
    even, odd = tl.split(tl.reshape(n, (n.shape[0], n.shape[1] // 2, 2)))
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
    return tl.reshape(turned, n.shape)


@triton.jit
def _store(q, k, position, head, heads, kv_heads, column, inside, y, WIDTH: tl.constexpr):
    """Stores rows of queries and keys, each [B, L, heads, WIDTH] in memory."""
    of_query = head < heads
    tl.store(q + (position * heads + head) * WIDTH + column, y, mask=inside & of_query)
    tl.store(k + (position * kv_heads + head - heads) * WIDTH + column, y, mask=inside & (head >= heads))


@triton.jit(do_not_specialize=["first_tangent", "heads", "kv_heads", "length", "rows"])
def _forward(
    qkv, qkv_dot, q_weight, k_weight, cos, sin, q, q_dot, k, k_dot, rstd,
    first_tangent, heads, kv_heads, length, eps, rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    position, step, head = _place(row, rows, heads + kv_heads, length)
    of_row = heads + 2 * kv_heads
    w = _weight(q_weight, k_weight, head < heads, column, WIDTH)
    cos, sin = _angles(cos, sin, step, row < rows, WIDTH, BLOCK)
    at = (position * of_row + head) * WIDTH + column
    x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    r = inverse_rms(x, eps, WIDTH)
    tl.store(rstd + row, r, mask=row < rows)
    _store(q, k, position, head, heads, kv_heads, column, inside, _rotate(x * r * w, cos, sin), WIDTH)
    if qkv_dot is not None:
        inside &= position >= first_tangent
        at -= first_tangent.to(tl.int64) * of_row * WIDTH
        x_dot = tl.load(qkv_dot + at, mask=inside, other=0.0).to(tl.float32)
        y_dot = _rotate(tangent_of_norm(x, x_dot, r, WIDTH) * w, cos, sin)
        position -= first_tangent
        _store(q_dot, k_dot, position, head, heads, kv_heads, column, inside, y_dot, WIDTH)


@triton.jit
def _load_heads(x, position, step, head, length, column, inside, strides, UNIT: tl.constexpr):
    """Loads rows of x [B, heads, length, WIDTH]."""
    at = (position - step) // length * strides[0] + head * strides[1] + step * strides[2]
    return tl.load(x + at * UNIT + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_normed(
    dq, dk, position, step, head, heads, length, column, inside, q_strides, k_strides, UNIT: tl.constexpr
):
    """Loads the cotangents of queries and keys: of one head it is in one tensor; the other is 0."""
    d = _load_heads(dq, position, step, head, length, column, inside & (head < heads), q_strides, UNIT)
    of_key = inside & (head >= heads)
    return d + _load_heads(dk, position, step, head - heads, length, column, of_key, k_strides, UNIT)


@triton.jit
def _rotate_back(d, cos, sin):
    """Rotates cotangents: the rotation is orthogonal, and its transpose rotates back."""
    if len(d) > 1:
        return _rotate(d[0], cos, -sin), _rotate(d[1], cos, -sin)
    else:
        return (_rotate(d[0], cos, -sin),)


@triton.jit(do_not_specialize=["first_tangent", "heads", "kv_heads", "length", "rows", "share"])
def _backward(
    qkv, qkv_dot, dq, dq_dot, dk, dk_dot, dv, dv_dot, q_weight, k_weight, cos, sin, rstd,
    dqkv, dqkv_dot, partial, q_strides, q_dot_strides, k_strides, k_dot_strides, v_strides, v_dot_strides,
    first_tangent, heads, kv_heads, length, rows, share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    dq_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    dk_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    normed = heads + kv_heads
    for start in range(0, share, ROWS):
        row = program * share + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < WIDTH)
        position, step, head = _place(row, rows, normed + kv_heads, length)
        of_query, of_value = head < heads, head >= normed
        of_norm = inside & (head < normed)
        w = _weight(q_weight, k_weight, of_query, column, WIDTH)
        cosine, sine = _angles(cos, sin, step, (row < rows) & (head < normed), WIDTH, BLOCK)
        moving = position - first_tangent
        moves = inside & (moving >= 0)
        at = row * WIDTH + column
        at_dot = at - first_tangent.to(tl.int64) * (normed + kv_heads) * WIDTH
        x = load_dual(qkv, at, of_norm, qkv_dot, at_dot, of_norm & moves)
        r = tl.load(rstd + position * normed + head, mask=(row < rows) & (head < normed), other=0.0)
        r = dual_rstd(x, r, WIDTH)
        n = times(x, r)
        d = _load_normed(
            dq, dk, position, step, head, heads, length, column, of_norm, q_strides, k_strides, UNIT
        )
        d_dot = None
        if dq_dot is not None:
            d_dot = _load_normed(
                dq_dot, dk_dot, moving, step, head, heads, length, column, of_norm & moves,
                q_dot_strides, k_dot_strides, UNIT,
            )  # fmt: skip
        dn = _rotate_back(cotangents(d, d_dot), cosine, sine)
        dw = of_primal(times(dn, n))
        dq_weight += tl.where(of_query, dw, 0.0)
        dk_weight += tl.where(of_query, 0.0, dw)
        dx = backward_of_norm(n, times(dn, (w,)), r, WIDTH)
        of_value &= inside
        head -= normed
        dv_row = _load_heads(dv, position, step, head, length, column, of_value, v_strides, UNIT)
        of_qkv, of_qkv_dot = tl.where(of_value, dv_row, of_primal(dx)), None
        if dv_dot is not None:
            of_value &= moves
            dv_row = _load_heads(dv_dot, moving, step, head, length, column, of_value, v_dot_strides, UNIT)
            of_qkv_dot = tl.where(of_value, dv_row, dx[0])
        store_gradients(dqkv, at, inside, dqkv_dot, at_dot, moves, cotangents(of_qkv, of_qkv_dot))
    store_sums(partial, (dq_weight, dk_weight), column, WIDTH)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _first_position(batch: int, length: int, q_dot: Tensor | None) -> int:
    """Returns the first position in the batch that has a tangent."""
    return (batch - (0 if q_dot is None else q_dot.shape[0])) * length


_FORWARD, _BACKWARD = RowKernel(_forward), RowKernel(_backward, stride=_strides)


@replayed
def forward(
    qkv: Tensor, qkv_dot: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    batch, heads, length, width = q.shape
    first = _first_position(batch, length, q_dot)
    tensors = qkv, qkv_dot, q_weight, k_weight, cos, sin, q, q_dot, k, k_dot, rstd
    _FORWARD.launch((), tensors, (first, heads, k.shape[1], length, eps), width, rstd.numel())


def backward(
    qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, rstd: Tensor, dqkv: Tensor, partial: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    pair_backward(
        *(qkv, None, dq, None, dk, None, dv, None, q_weight, k_weight, cos, sin, rstd),
        *(dqkv, None, partial, weights),
    )


@replayed
def pair_backward(
    qkv: Tensor, qkv_dot: Tensor | None, dq: Tensor, dq_dot: Tensor | None, dk: Tensor,
    dk_dot: Tensor | None, dv: Tensor, dv_dot: Tensor | None, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, rstd: Tensor, dqkv: Tensor, dqkv_dot: Tensor | None, partial: Tensor,
    weights: Tensor,
) -> None:  # fmt: skip
    batch, heads, length, width = dq.shape
    strided, numbers = (dq, dq_dot, dk, dk_dot, dv, dv_dot), (heads, dk.shape[1], length)
    tensors = qkv, qkv_dot, *strided, q_weight, k_weight, cos, sin, rstd, dqkv, dqkv_dot
    first = _first_position(batch, length, dq_dot)
    _BACKWARD.sum(strided, tensors, (first, *numbers), qkv.numel() // width, partial, weights)
