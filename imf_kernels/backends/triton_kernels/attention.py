"""Attention with its tangent in one pass, and its primal backward. The formulas are in ops/attention.py.

Forward: a tile of queries of one head meets the keys tile by tile. With the logits S, their tangent S_dot and
P = e^(S - max) it sums, all rescaled whenever the maximum of a row grows,
    O = sum_j P V,  A = sum_j P V_dot + P (S_dot - shift) V,  M = sum_j P (S_dot - shift),  W = sum_j P,
and O_dot = A / W - (M / W) (O / W). Subtracting a constant from a row of S_dot leaves it unchanged: `shift`,
the running softmax mean of S_dot, keeps an offset of keys or values from cancelling between the two terms. A
key without weight does not affect it, however large. P and P (S_dot - shift) are rounded for their products,
so M and W are sums of the rounded values; lse is taken from the unrounded ones.

Backward: dQ is such a tangent too, of attention over the values K along the logits' tangent dP = dO V^T:
    dQ = scale sum_j P (dP - delta) K,  delta = sum_j P dP.
Its kernel computes delta and keeps it, with the sums of the rows of P, for the kernel of dK and dV, in which
a tile of keys meets the queries. Each sum is computed by one program, so that results repeat bitwise.

Widths are split into at most two pieces of 16, 32, 64, ...: 72 is 64 + 16, not 128. Keys come in full tiles
of BLOCK_N, without a bound to check, and where they end (or at the diagonal, if causal) in tiles of EDGE_N:
276 keys are 8 tiles of 32 and 2 of 16, which is 288.
"""

# Triton's tuples grow by `+` only, and each length is a separate type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from imf_kernels.backends import triton_launch
from imf_kernels.backends.triton_kernels.attention_tiles import tiles_for
from imf_kernels.backends.triton_launch import Launcher

_LOG2E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234e38)

# `strides` holds those of batch, head and position of each of a kernel's tensors, zeros for a missing one, in
# units of ALIGN elements, 16 bytes where all of them allow it: so the compiler knows where rows begin. In the
# kernels a head is (pointer, stride of position), or () if missing; a tile is a tuple of its pieces along the
# width; a mask is (pointer, strides), or ().


@triton.jit
def _head(x, strides, NUMBER: tl.constexpr, b, h, ALIGN: tl.constexpr):
    if x is None:
        return ()
    else:
        return x + (b * strides[3 * NUMBER] + h * strides[3 * NUMBER + 1]) * ALIGN, strides[3 * NUMBER + 2]


@triton.jit
def _masking(mask, strides):
    if mask is None:
        return ()
    else:
        return mask, strides[0], strides[1], strides[2], strides[3]


@triton.jit
def _load(
    x, start, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ALIGN: tl.constexpr
):
    """Loads rows from `start` on, zeros from `length` on and beyond WIDTH; without `length`, full tiles."""
    tile = ()
    if len(x) > 0:
        rows = tl.arange(0, ROWS)[:, None]
        first = x[0] + tl.cast(start, tl.int64) * x[1] * ALIGN
        for i in tl.static_range(len(PIECES)):
            columns = i * PIECES[0] + tl.arange(0, PIECES[i])[None, :]
            pointers = first + (rows * x[1] * ALIGN + columns)
            if length is not None:
                piece = tl.load(pointers, mask=(start + rows < length) & (columns < WIDTH), other=0.0)
            elif i * PIECES[0] + PIECES[i] > WIDTH:
                piece = tl.load(pointers, mask=columns < WIDTH, other=0.0)
            else:
                piece = tl.load(pointers)
            tile = tile + (piece,)
    return tile


@triton.jit
def _store(x, tile, start, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    first = x[0] + tl.cast(start, tl.int64) * x[1] * ALIGN
    for i in tl.static_range(len(tile)):
        columns = i * tile[0].shape[1] + tl.arange(0, tile[i].shape[1])[None, :]
        mask = (start + rows < length) & (columns < WIDTH)
        tl.store(first + (rows * x[1] * ALIGN + columns), tile[i].to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def _inverse(x):
    """Returns 1 / x, and 0 for 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def _zeros_piece(ROWS: tl.constexpr, SIZE: tl.constexpr):
    return tl.zeros([ROWS, SIZE], tl.float32)


@triton.jit
def _zeros(ROWS: tl.constexpr, PIECES: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(PIECES)):
        tile = tile + (_zeros_piece(ROWS, PIECES[i]),)  # Triton 3.6 has no list with an element of a tuple
    return tile


@triton.jit
def _scaled(tile, rows):
    return [piece * rows[:, None] for piece in tile]


@triton.jit
def _plus(tile, rows, other):
    """Returns tile + rows other, with one number per row."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tl.fma(other[i], rows[:, None], tile[i]),)
    return result


@triton.constexpr_function
def _precision():
    """Returns how fp32 is multiplied: on NVIDIA's GPUs as six products of three bf16 terms, 24 bits.

    They have no matrix instructions for plain fp32, and three products of TF32 terms, 22 bits, miss the error
    rule by up to a third.
    """
    return "bf16x6" if is_cuda() else "ieee"


@triton.jit
def _for_product(x, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Rounds x, however large or small, to `dtype`; instead of to float16 to TF32, which has as many bits.

    So for heads too narrow for errors to average out in a row.
    """
    if (dtype == tl.float16) | ((dtype == tl.bfloat16) & (WIDTH < 16)):
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return tl.where(tl.abs(x) < float("inf"), (bits & -0x2000).to(tl.float32, bitcast=True), x)
    else:
        return x.to(dtype)


@triton.jit
def _dot_rows(a, b, total):
    """Returns total + a bᵀ."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=_precision())
    return total


@triton.jit
def _dot_columns(a, b, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """Returns (a bᵀ)ᵀ. In fp32 it has the same last bits as a bᵀ, on which large logits depend."""
    if a[0].dtype == tl.float32:
        return tl.trans(_dot_rows(a, b, tl.zeros([A_ROWS, B_ROWS], tl.float32)))
    else:
        return _dot_rows(b, a, tl.zeros([B_ROWS, A_ROWS], tl.float32))


@triton.jit
def _add_dot(total, weights, rows):
    """Returns total + weights rows, also of weights of `_for_product`. In fp32 a tile is summed by itself."""
    result = ()
    for i in tl.static_range(len(total)):
        if rows[i].dtype == tl.float32:
            product = tl.dot(weights, rows[i], input_precision=_precision())
            result = result + (tl.fma(total[i], 1.0, product),)  # which the compiler leaves apart, unlike +
        elif weights.dtype == tl.float32:
            result = result + (tl.dot(weights, rows[i].to(tl.float32), total[i], input_precision="tf32"),)
        else:
            result = result + (tl.dot(weights, rows[i], total[i]),)
    return result


@triton.jit
def _bias(mask, b, h, rows, columns, queries, keys, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """Returns the bias of the logits, in units of ln 2: -inf where a key takes no part; () for none.

    Rows and columns number queries and keys, [n, 1] and [1, m] or transposed. EDGE: some of the keys may lie
    beyond the last one or the diagonal.
    """
    bias = ()
    if EDGE:
        seen = columns < keys
        if CAUSAL:
            seen = seen & (columns <= rows)
        bias = (tl.where(seen, 0.0, -float("inf")),)
    if len(mask) > 0:
        of_rows = mask[0] + (b * mask[1] + h * mask[2] + tl.cast(rows, tl.int64) * mask[3])
        of_columns = tl.cast(columns, tl.int64) * mask[4]
        values = tl.load(of_rows + of_columns, mask=(rows < queries) & (columns < keys), other=0)
        if mask[0].dtype.element_ty == tl.int1:
            values = tl.where(values, 0.0, -float("inf"))
        else:
            values = values.to(tl.float32)
            finite = (values > -float("inf")) & (values < float("inf"))
            values *= _LOG2E
            values = tl.where(finite & (values < -_LARGEST), -_LARGEST, values)
            values = tl.where(finite & (values > _LARGEST), _LARGEST, values)
        bias = (values + bias[0],) if EDGE else (values,)
    return bias


@triton.jit
def _logits(s, scale, bias):
    """Returns scale s + bias in units of ln 2; -inf where the bias is, whatever s is.

    The forward subtracts the maximum afterwards, so that the difference is exactly 0 for the largest logit of
    a row: a single key's value is returned to the bit.
    """
    if len(bias) > 0:
        return tl.where(bias[0] == -float("inf"), bias[0], tl.fma(s, scale * _LOG2E, bias[0]))
    else:
        return s * (scale * _LOG2E)


@triton.jit
def _probabilities(s, scale, bias, lse, dtype: tl.constexpr):
    """Returns 2^(logits - lse) of the backward.

    In fp32 the logits are rounded like the forward's; in the other dtypes, where P is rounded for its
    products, one instruction scales and subtracts.
    """
    if (len(bias) > 0) | (dtype == tl.float32):
        return tl.exp2(_logits(s, scale, bias) - lse)
    else:
        return tl.exp2(tl.fma(s, scale * _LOG2E, -lse))


@triton.jit
def _centred(p, s_dot, before, dot, shift, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Returns P (S_dot - shift) of a tile as multiplied, and W, M and shift including the tile.

    The new shift is the mean of S_dot so far. It has decreased by `moved`: that times O must be added to A.
    `before`, `dot` and `shift` are W, M and shift without the tile.
    """
    weight = before + tl.sum(p, 1)
    total = dot + before * shift + tl.sum(p * s_dot, 1)
    # Without any weight there is no mean.
    mean = tl.where(weight > 0, total / tl.where(weight > 0, weight, 1.0), shift)
    moved = shift - mean
    centred = _for_product(p * (s_dot - mean[:, None]), dtype, WIDTH)
    dot = dot + before * moved + tl.sum(centred.to(tl.float32), 1)
    return centred, weight, dot, mean, moved


@triton.jit
def _extent(first, keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns how many keys, in full tiles, all queries from `first` on see, and how many any one sees."""
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
        return tl.minimum(keys, first + 1) // BLOCK_N * BLOCK_N, end
    else:
        return keys // BLOCK_N * BLOCK_N, keys


@triton.jit
def _program(tiles, heads, CAUSAL: tl.constexpr):
    """Returns tile, sample and head of this program. Along a diagonal the longest tiles come first."""
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile, head // heads, head % heads


@triton.jit
def _forward_tile(
    state, start, q, q_dot, k, k_dot, v, v_dot, mask, b, h, rows, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    highest, total, before, dot, shift, out, out_dot = state
    length = keys if EDGE else None
    k_tile = _load(k, start, length, TILE, WIDTH, PIECES, ALIGN)
    zeros = tl.zeros([rows.shape[0], TILE], tl.float32)
    columns = start + tl.arange(0, TILE)
    s = _dot_rows(q, k_tile, zeros)
    bias = _bias(mask, b, h, rows[:, None], columns[None, :], queries, keys, CAUSAL, EDGE)

    logits = _logits(s, scale, bias)
    maximum = tl.maximum(highest, tl.max(logits, 1))
    offset = tl.where(maximum == -float("inf"), 0.0, maximum)  # any finite one leaves a row of -inf at zero
    p = tl.exp2(logits - offset[:, None])
    decay = tl.exp2(highest - offset)
    total = total * decay + tl.sum(p, 1)
    before, dot = before * decay, dot * decay

    v_tile = _load(v, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    dtype: tl.constexpr = v_tile[0].dtype
    weights = p.to(dtype)
    if len(q_dot) + len(k_dot) > 0:
        s_dot = _dot_rows(q_dot, k_tile, zeros)
        if len(k_dot) > 0:
            s_dot = _dot_rows(q, _load(k_dot, start, length, TILE, WIDTH, PIECES, ALIGN), s_dot)
        weights_dot, weight, dot, shift, moved = _centred(
            weights.to(tl.float32), s_dot * scale, before, dot, shift, dtype, WIDTH
        )
        out_dot = _add_dot(_plus(_scaled(out_dot, decay), decay * moved, out), weights_dot, v_tile)
    else:
        weight = before + tl.sum(weights.to(tl.float32), 1)
        out_dot = _scaled(out_dot, decay)
    if len(v_dot) > 0:
        v_dot_tile = _load(v_dot, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
        out_dot = _add_dot(out_dot, weights, v_dot_tile)
    out = _add_dot(_scaled(out, decay), weights, v_tile)
    return maximum, total, weight, dot, shift, out, out_dot


@triton.jit(do_not_specialize=["first_sample"])
def attention_forward(
    q, k, v, q_dot, k_dot, v_dot, out, out_dot, mask, lse,
    strides, mask_strides, heads, group, queries, keys, scale, first_sample,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Computes out, lse and, with tangents, out_dot of a tile of queries of a head.

    Samples are counted from `first_sample` on, to which the first tangents belong.
    """
    tile, b_dot, h = _program(tl.cdiv(queries, BLOCK_M), heads, CAUSAL)
    b, kv_h = first_sample + b_dot, h // group
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_head, q_dot_head = _head(q, strides, 0, b, h, ALIGN), _head(q_dot, strides, 3, b_dot, h, ALIGN)
    q_tile = _load(q_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    q_dot_tile = _load(q_dot_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    k_head, k_dot_head = _head(k, strides, 1, b, kv_h, ALIGN), _head(k_dot, strides, 4, b_dot, kv_h, ALIGN)
    v_head, v_dot_head = _head(v, strides, 2, b, kv_h, ALIGN), _head(v_dot, strides, 5, b_dot, kv_h, ALIGN)
    masking = _masking(mask, mask_strides)

    nothing = tl.zeros([BLOCK_M], tl.float32)
    sums = _zeros(BLOCK_M, VALUE_PIECES)
    state = (
        nothing - float("inf"),
        nothing,
        nothing,
        nothing,
        nothing,
        sums,
        () if out_dot is None else sums,
    )
    whole, end = _extent(first, keys, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        state = _forward_tile(
            state, start, q_tile, q_dot_tile, k_head, k_dot_head, v_head, v_dot_head, masking, b, h, rows,
            queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, BLOCK_N, False,
        )  # fmt: skip
    for start in range(whole, end, EDGE_N):
        state = _forward_tile(
            state, start, q_tile, q_dot_tile, k_head, k_dot_head, v_head, v_dot_head, masking, b, h, rows,
            queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, EDGE_N, True,
        )  # fmt: skip
    highest, total, weight, dot, _, sums, sums_dot = state

    inverse = _inverse(weight)
    o = _scaled(sums, inverse)
    _store(_head(out, strides, 6, b, h, ALIGN), o, first, queries, BLOCK_M, VALUE_WIDTH, ALIGN)
    if out_dot is not None:
        o_dot = _plus(_scaled(sums_dot, inverse), -dot * inverse, o)
        out_dot_head = _head(out_dot, strides, 7, b_dot, h, ALIGN)
        _store(out_dot_head, o_dot, first, queries, BLOCK_M, VALUE_WIDTH, ALIGN)
    tl.store(lse + (b * heads + h) * queries + rows, highest + tl.log2(total), mask=rows < queries)


@triton.jit
def _load_row(x, rows, queries, other):
    """Loads a number per row, `other` from `queries` on; without `queries`, of rows that all exist."""
    if queries is None:
        return tl.load(x + rows)
    else:
        return tl.load(x + rows, mask=rows < queries, other=other)


@triton.jit
def _load_lse(lse, rows, queries):
    """Loads lse so that missing rows, and rows that see no key, get no weight."""
    values = _load_row(lse, rows, queries, float("inf"))
    return tl.where(values == -float("inf"), 0.0, values)


@triton.jit
def _backward_q_tile(
    state, start, q, k, v, dout, mask, b, h, rows, lse, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    total, before, dot, shift, mean_k, dq = state
    length = keys if EDGE else None
    k_tile = _load(k, start, length, TILE, WIDTH, PIECES, ALIGN)
    zeros = tl.zeros([rows.shape[0], TILE], tl.float32)
    columns = start + tl.arange(0, TILE)
    s = _dot_rows(q, k_tile, zeros)
    bias = _bias(mask, b, h, rows[:, None], columns[None, :], queries, keys, CAUSAL, EDGE)
    dtype: tl.constexpr = k_tile[0].dtype
    p = _probabilities(s, scale, bias, lse[:, None], dtype)

    dp = _dot_rows(dout, _load(v, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN), zeros)
    weights = _for_product(p, dtype, WIDTH)
    ds, weight, dot, shift, moved = _centred(weights.to(tl.float32), dp, before, dot, shift, dtype, WIDTH)
    dq = _add_dot(_plus(dq, moved, mean_k), ds, k_tile)
    mean_k = _add_dot(mean_k, weights, k_tile)
    return total + tl.sum(p, 1), weight, dot, shift, mean_k, dq


@triton.jit
def attention_backward_q(
    q, k, v, dout, dq, mask, lse, sums, strides, mask_strides, heads, group, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Computes dq, unless None, and in sums [B, H, 2, L_q] 1 / sum_j P and delta of a tile of queries of a
    head.

    The sum of P is 1 up to the rounding of lse, whose error is large for large logits.
    """
    tile, b, h = _program(tl.cdiv(queries, BLOCK_M), heads, CAUSAL)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_head, dout_head = _head(q, strides, 0, b, h, ALIGN), _head(dout, strides, 3, b, h, ALIGN)
    q_tile = _load(q_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    dout_tile = _load(dout_head, first, queries, BLOCK_M, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    k_head, v_head = _head(k, strides, 1, b, h // group, ALIGN), _head(v, strides, 2, b, h // group, ALIGN)
    masking = _masking(mask, mask_strides)
    of_head = (b * heads + h) * queries
    row_lse = _load_lse(lse + of_head, rows, queries)

    nothing = tl.zeros([BLOCK_M], tl.float32)
    zeros = () if dq is None else _zeros(BLOCK_M, PIECES)
    state = (nothing, nothing, nothing, nothing, zeros, zeros)
    whole, end = _extent(first, keys, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        state = _backward_q_tile(
            state, start, q_tile, k_head, v_head, dout_tile, masking, b, h, rows, row_lse, queries, keys,
            scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, BLOCK_N, False,
        )  # fmt: skip
    for start in range(whole, end, EDGE_N):
        state = _backward_q_tile(
            state, start, q_tile, k_head, v_head, dout_tile, masking, b, h, rows, row_lse, queries, keys,
            scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, EDGE_N, True,
        )  # fmt: skip
    total, weight, dot, shift, mean_k, dq_sums = state

    inverse = _inverse(weight)
    mean = dot * inverse
    tl.store(sums + 2 * of_head + rows, _inverse(total), mask=rows < queries)
    tl.store(sums + 2 * of_head + queries + rows, shift + mean, mask=rows < queries)
    if dq is not None:
        dq_sums = _scaled(_plus(dq_sums, -mean, mean_k), inverse * scale)
        _store(_head(dq, strides, 4, b, h, ALIGN), dq_sums, first, queries, BLOCK_M, WIDTH, ALIGN)


@triton.jit
def _backward_kv_tile(
    state, start, q, dout, k, v, mask, b, h, columns, lse, sums, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    dk, dv = state
    length = queries if EDGE else None
    rows = start + tl.arange(0, TILE)
    KEYS: tl.constexpr = columns.shape[0]
    q_tile = _load(q, start, length, TILE, WIDTH, PIECES, ALIGN)
    dout_tile = _load(dout, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    dtype: tl.constexpr = q_tile[0].dtype
    s = _dot_columns(q_tile, k, TILE, KEYS)
    bias = _bias(mask, b, h, rows[None, :], columns[:, None], queries, keys, CAUSAL, CAUSAL)
    p = _probabilities(s, scale, bias, _load_lse(lse, rows, length)[None, :], dtype)
    p *= _load_row(sums, rows, length, 0.0)[None, :]
    dv = _add_dot(dv, _for_product(p, dtype, WIDTH), dout_tile)
    if len(dk) > 0:
        delta = _load_row(sums + queries, rows, length, 0.0)
        ds = p * (_dot_columns(dout_tile, v, TILE, KEYS) - delta[None, :])
        dk = _add_dot(dk, _for_product(ds, dtype, WIDTH), q_tile)
    return dk, dv


@triton.jit
def attention_backward_kv(
    q, k, v, dout, dk, dv, mask, lse, sums,
    strides, mask_strides, kv_heads, group, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv, unless None, of a tile of keys over the queries of all heads that share them.

    SPLIT: full tiles of queries have a loop of their own, without bounds to check.
    """
    tile, b, kv_h = _program(tl.cdiv(keys, BLOCK_N), kv_heads, False)
    first = tile * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    k_head, v_head = _head(k, strides, 1, b, kv_h, ALIGN), _head(v, strides, 2, b, kv_h, ALIGN)
    k_tile = _load(k_head, first, keys, BLOCK_N, WIDTH, PIECES, ALIGN)
    v_tile = _load(v_head, first, keys, BLOCK_N, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    masking = _masking(mask, mask_strides)
    dk_sums = () if dk is None else _zeros(BLOCK_N, PIECES)
    dv_sums = () if dv is None else _zeros(BLOCK_N, VALUE_PIECES)
    state = (dk_sums, dv_sums)
    begin = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i in range(group):
        h = kv_h * group + i
        q_head, dout_head = _head(q, strides, 0, b, h, ALIGN), _head(dout, strides, 3, b, h, ALIGN)
        of_head = (b * kv_heads * group + h) * queries
        whole = begin
        if SPLIT:
            whole = queries // BLOCK_M * BLOCK_M
            for start in range(begin, whole, BLOCK_M):
                state = _backward_kv_tile(
                    state, start, q_head, dout_head, k_tile, v_tile, masking, b, h, columns, lse + of_head,
                    sums + 2 * of_head, queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN,
                    CAUSAL, BLOCK_M, False,
                )  # fmt: skip
        for start in range(whole, queries, BLOCK_M):
            state = _backward_kv_tile(
                state, start, q_head, dout_head, k_tile, v_tile, masking, b, h, columns, lse + of_head,
                sums + 2 * of_head, queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN,
                CAUSAL, BLOCK_M, True,
            )  # fmt: skip
    dk_sums, dv_sums = state
    if dk is not None:
        dk_head, scales = _head(dk, strides, 4, b, kv_h, ALIGN), tl.zeros([BLOCK_N], tl.float32) + scale
        _store(dk_head, _scaled(dk_sums, scales), first, keys, BLOCK_N, WIDTH, ALIGN)
    if dv is not None:
        dv_head = _head(dv, strides, 5, b, kv_h, ALIGN)
        _store(dv_head, dv_sums, first, keys, BLOCK_N, VALUE_WIDTH, ALIGN)


def _pieces(width: int) -> tuple[int, ...]:
    """Splits a width into one or two powers of 2, from 16 on: (64,) for 64, (64, 16) for 72."""
    whole = max(16, triton.next_power_of_2(width))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(width - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole,)


@functools.lru_cache(maxsize=1024)
def launcher_of(
    kernel: str, architecture: str, dtype: torch.dtype, heads: int, group: int, queries: int, keys: int,
    width: int, value_width: int, is_causal: bool, mask_strides: tuple[int, ...] | None,
    *strides: tuple[int, ...] | None,
) -> tuple[Launcher, int]:  # fmt: skip
    """Returns the launcher of a kernel for tensors of these strides, and the number of programs per head."""
    walked = queries if kernel == "backward kv" else keys
    masked = mask_strides is not None
    primal = kernel == "forward" and strides[-1] is None  # no out_dot
    tiles = tiles_for(
        "primal" if primal else kernel, architecture, dtype, max(width, value_width), walked, masked
    )
    wide = 16 // dtype.itemsize
    align = wide if all(step % wide == 0 for s in strides if s for step in s[:3]) else 1
    in_units = tuple(step // align for s in strides for step in (s or (0, 0, 0))[:3])
    # Two loops inside one over heads, or from a diagonal on, spill registers.
    split = {"SPLIT": group == 1 and not is_causal} if kernel == "backward kv" else {}
    launcher = Launcher(
        *(_KERNELS[kernel], in_units, mask_strides, heads, group, queries, keys),
        WIDTH=width,
        VALUE_WIDTH=value_width,
        PIECES=_pieces(width),
        VALUE_PIECES=_pieces(value_width),
        ALIGN=align,
        CAUSAL=is_causal,
        **tiles,
        **split,
    )
    if kernel == "backward kv":
        return launcher, -(-keys // tiles["BLOCK_N"])
    return launcher, -(-queries // tiles["BLOCK_M"])


_KERNELS = {
    "forward": attention_forward,
    "backward q": attention_backward_q,
    "backward kv": attention_backward_kv,
}


def _stride(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    mask: Tensor | None, out: Tensor, out_dot: Tensor | None, lse: Tensor, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills out [B, H, L_q, D_v], lse [B, H, L_q] (in units of ln 2, -inf where nothing is seen) and out_dot.

    Tangents belong to the last `out_dot.shape[0]` samples. The others have a separate launch: with registers
    for tangents fewer programs would share a processor.
    """
    (batch, heads, queries, width), (_, kv_heads, keys, value_width) = q.shape, v.shape
    architecture, group = triton_launch.architecture(q), heads // max(kv_heads, 1)
    sizes = heads, group, queries, keys, width, value_width, is_causal, _stride(mask)
    tangents = 0 if out_dot is None else out_dot.shape[0]
    for first, samples, dots in (
        (0, batch - tangents, (None, None, None, out, None)),
        (batch - tangents, tangents, (q_dot, k_dot, v_dot, out, out_dot)),
    ):
        if samples:
            tensors = q, k, v, *dots
            strides = map(_stride, tensors)
            launch, programs = launcher_of("forward", architecture, q.dtype, *sizes, *strides)
            launch((samples * heads * programs, 1), (*tensors, mask, lse), float(scale), first)


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, dout: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills those of dq, dk and dv that are not None."""
    (batch, heads, queries, width), (_, kv_heads, keys, value_width) = q.shape, v.shape
    architecture, group = triton_launch.architecture(q), heads // max(kv_heads, 1)
    sizes = group, queries, keys, width, value_width, is_causal, _stride(mask)
    strides = q.stride(), k.stride(), v.stride(), dout.stride()
    sums = lse.new_empty((batch, heads, 2, queries))
    if keys == 1:  # P is 1 for any logits: exact zeros, not rounding errors of dP - delta
        for x in (dq, dk):
            if x is not None:
                x.zero_()
        dq = dk = None

    launch, programs = launcher_of("backward q", architecture, q.dtype, heads, *sizes, *strides, _stride(dq))
    launch((batch * heads * programs, 1), (q, k, v, dout, dq, mask, lse, sums), float(scale))
    if dk is None and dv is None:
        return
    launch, programs = launcher_of(
        "backward kv", architecture, q.dtype, kv_heads, *sizes, *strides, _stride(dk), _stride(dv)
    )
    launch((batch * kv_heads * programs, 1), (q, k, v, dout, dk, dv, mask, lse, sums), float(scale))
