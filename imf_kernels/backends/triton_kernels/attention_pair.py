"""Backward of attention's pair. The formulas, whose names these are, are in ops/attention_pair.py.

By queries: a first loop over the keys sums P, P S_dot and P A per row, for mu and alpha. A second one adds to
dQ_dot and dQ. Their products take rounded rows of dS_dot and dS, whose sums are not 0: these sums, times the
mean of the keys under P, are subtracted, so that an offset of the keys cancels. beta is found meanwhile, as
delta is in the primal's backward. 1 / sum_j P, mu, alpha and beta of each row are kept for the kernel by
keys, in which a tile of keys meets the queries. Each sum is computed by one program, so that results repeat
bitwise.
"""

# Triton's tuples grow by `+` only, and each length is a separate type.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends import triton_launch
from imf_kernels.backends.triton_kernels.attention_parts import (
    add_dot,
    bias_of,
    centre,
    dot_columns,
    dot_rows,
    for_product,
    head_of,
    in_float32,
    in_units,
    inverse_or_zero,
    load_lse,
    load_row,
    load_tile,
    masking_of,
    plus,
    probabilities,
    program_of,
    scaled,
    store_tile,
    stride_of,
    too_narrow,
    zeros_tile,
)
from imf_kernels.backends.triton_kernels.attention_tiles import tiles_for
from imf_kernels.backends.triton_launch import Launcher


@triton.jit
def _rows_tile(
    start, q, q_dot, dout_dot, k, k_dot, v, mask, b, h, rows, lse, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Returns P, S_dot and A of a tile, and its keys, their tangents and its values."""
    length = keys if EDGE else None
    columns = start + tl.arange(0, TILE)
    zeros = tl.zeros([rows.shape[0], TILE], tl.float32)
    k_tile = load_tile(k, start, length, TILE, WIDTH, PIECES, ALIGN)
    k_dot_tile = load_tile(k_dot, start, length, TILE, WIDTH, PIECES, ALIGN)
    v_tile = load_tile(v, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    bias = bias_of(mask, b, h, rows[:, None], columns[None, :], queries, keys, CAUSAL, EDGE)
    p = probabilities(dot_rows(q, k_tile, zeros), scale, bias, lse[:, None], k_tile[0].dtype)
    s_dot, a = zeros, zeros
    if MOVES:
        s_dot = dot_rows(q_dot, k_tile, zeros)
        if len(k_dot) > 0:
            s_dot = dot_rows(q, k_dot_tile, s_dot)
        a = dot_rows(dout_dot, v_tile, zeros)
    return p, s_dot * scale, a, k_tile, k_dot_tile, v_tile


@triton.jit
def attention_pair_backward_q(
    q, k, v, q_dot, k_dot, v_dot, dout, dout_dot, dq, dq_dot, mask, lse, sums,
    strides, mask_strides, heads, group, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes dq and dq_dot, unless None, of a tile of queries of a head, and in sums [B, H, 4, L_q] their
    1 / sum_j P, mu, alpha and beta."""
    tile, b, h = program_of(tl.cdiv(queries, BLOCK_M), heads, CAUSAL)
    first, kv_h = tile * BLOCK_M, h // group
    rows = first + tl.arange(0, BLOCK_M)
    MOVES: tl.constexpr = (q_dot is not None) | (k_dot is not None)
    q_tile = load_tile(head_of(q, strides, 0, b, h, ALIGN), first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    q_dot_head = head_of(q_dot, strides, 3, b, h, ALIGN)
    q_dot_tile = load_tile(q_dot_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    g_head, h_head = head_of(dout, strides, 6, b, h, ALIGN), head_of(dout_dot, strides, 7, b, h, ALIGN)
    g_tile = load_tile(g_head, first, queries, BLOCK_M, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    h_tile = load_tile(h_head, first, queries, BLOCK_M, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    k_head, k_dot_head = head_of(k, strides, 1, b, kv_h, ALIGN), head_of(k_dot, strides, 4, b, kv_h, ALIGN)
    v_head, v_dot_head = head_of(v, strides, 2, b, kv_h, ALIGN), head_of(v_dot, strides, 5, b, kv_h, ALIGN)
    masking = masking_of(mask, mask_strides)
    of_head = (b * heads + h) * queries
    row_lse = load_lse(lse + of_head, rows, queries)
    end = tl.minimum(keys, first + BLOCK_M) if CAUSAL else keys

    nothing = tl.zeros([BLOCK_M], tl.float32)
    total, mu, alpha = nothing, nothing, nothing
    for start in range(0, end, BLOCK_N):
        p, s_dot, a, _, _, _ = _rows_tile(
            start, q_tile, q_dot_tile, h_tile, k_head, k_dot_head, v_head, masking, b, h, rows, row_lse,
            queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, BLOCK_N, EDGE,
            MOVES,
        )  # fmt: skip
        total += tl.sum(p, 1)
        mu += tl.sum(p * s_dot, 1)
        alpha += tl.sum(p * a, 1)
    normalize = inverse_or_zero(total)
    mu, alpha = mu * normalize, alpha * normalize

    weight, w_sum, shift, left_over = nothing, nothing, nothing, nothing
    zeros = zeros_tile(BLOCK_M, PIECES)
    mean_k, dq_sums, dq_dot_sums = zeros, zeros, zeros
    for start in range(0, end, BLOCK_N):
        p, s_dot, a, k_tile, k_dot_tile, v_tile = _rows_tile(
            start, q_tile, q_dot_tile, h_tile, k_head, k_dot_head, v_head, masking, b, h, rows, row_lse,
            queries, keys, scale, WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, BLOCK_N, EDGE,
            MOVES,
        )  # fmt: skip
        dtype: tl.constexpr = k_tile[0].dtype
        w = dot_rows(g_tile, v_tile, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if v_dot is not None:
            length = keys if EDGE else None
            v_dot_tile = load_tile(v_dot_head, start, length, BLOCK_N, VALUE_WIDTH, VALUE_PIECES, ALIGN)
            w = dot_rows(h_tile, v_dot_tile, w)
        weights = for_product(p, dtype)
        if MOVES:
            a -= alpha[:, None]
            w = tl.fma(a, s_dot - mu[:, None], w)
            ds_dot = for_product(p * a, dtype)
            left_over += tl.sum(ds_dot.to(tl.float32), 1)
            dq_dot_sums = add_dot(dq_dot_sums, ds_dot, k_tile)
        ds, weight, w_sum, shift, moved = centre(weights.to(tl.float32), w, weight, w_sum, shift, dtype)
        dq_sums = add_dot(plus(dq_sums, moved, mean_k), ds, k_tile)
        if k_dot is not None:
            dq_sums = add_dot(dq_sums, ds_dot, k_dot_tile)
        mean_k = add_dot(mean_k, weights, k_tile)

    inverse = inverse_or_zero(weight)
    mean = w_sum * inverse
    of_row, inside = sums + 4 * of_head + rows, rows < queries
    tl.store(of_row, normalize, mask=inside)
    tl.store(of_row + queries, mu, mask=inside)
    tl.store(of_row + 2 * queries, alpha, mask=inside)
    tl.store(of_row + 3 * queries, shift + mean, mask=inside)
    if dq is not None:
        dq_tile = scaled(plus(dq_sums, -mean, mean_k), inverse * scale)
        store_tile(head_of(dq, strides, 8, b, h, ALIGN), dq_tile, first, queries, BLOCK_M, WIDTH, ALIGN)
    if dq_dot is not None:
        dq_dot_tile = scaled(plus(dq_dot_sums, -left_over * inverse, mean_k), normalize * scale)
        dq_dot_head = head_of(dq_dot, strides, 9, b, h, ALIGN)
        store_tile(dq_dot_head, dq_dot_tile, first, queries, BLOCK_M, WIDTH, ALIGN)


@triton.jit
def _columns_tile(
    state, start, q, q_dot, dout, dout_dot, k, k_dot, v, v_dot, mask, b, h, columns, lse, sums,
    queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    dk, dv, dk_dot, dv_dot = state
    length = queries if EDGE else None
    rows = start + tl.arange(0, TILE)
    KEYS: tl.constexpr = columns.shape[0]
    q_tile = load_tile(q, start, length, TILE, WIDTH, PIECES, ALIGN)
    g_tile = load_tile(dout, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    h_tile = load_tile(dout_dot, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    dtype: tl.constexpr = q_tile[0].dtype
    bias = bias_of(mask, b, h, rows[None, :], columns[:, None], queries, keys, CAUSAL, CAUSAL)
    s = dot_columns(q_tile, k, TILE, KEYS)
    p = probabilities(s, scale, bias, load_lse(lse, rows, length)[None, :], dtype)
    p *= load_row(sums, rows, length, 0.0)[None, :]
    weights = for_product(p, dtype)
    w = tl.zeros([KEYS, TILE], tl.float32)
    if len(dout) > 0:
        w = dot_columns(g_tile, v, TILE, KEYS)
        if len(dv) > 0:
            dv = add_dot(dv, weights, g_tile)
    if len(v_dot) > 0:
        w += dot_columns(h_tile, v_dot, TILE, KEYS)
        if len(dv_dot) > 0:
            dv_dot = add_dot(dv_dot, weights, h_tile)
    if len(q_dot) + len(k_dot) > 0:
        q_dot_tile = load_tile(q_dot, start, length, TILE, WIDTH, PIECES, ALIGN)
        s_dot = tl.zeros([KEYS, TILE], tl.float32)
        if len(q_dot) > 0:
            s_dot = dot_columns(q_dot_tile, k, TILE, KEYS)
        if len(k_dot) > 0:
            s_dot += dot_columns(q_tile, k_dot, TILE, KEYS)
        z = s_dot * scale - load_row(sums + queries, rows, length, 0.0)[None, :]
        if len(dv) > 0:
            dv = add_dot(dv, for_product(p * z, dtype), h_tile)
        alpha = load_row(sums + 2 * queries, rows, length, 0.0)
        a = dot_columns(h_tile, v, TILE, KEYS) - alpha[None, :]
        w = tl.fma(a, z, w)
        ds_dot = for_product(p * a, dtype)
        if len(dk_dot) > 0:
            dk_dot = add_dot(dk_dot, ds_dot, q_tile)
        if (len(dk) > 0) & (len(q_dot) > 0):
            dk = add_dot(dk, ds_dot, q_dot_tile)
    if len(dk) > 0:
        beta = load_row(sums + 3 * queries, rows, length, 0.0)
        dk = add_dot(dk, for_product(p * (w - beta[None, :]), dtype), q_tile)
    return dk, dv, dk_dot, dv_dot


@triton.jit
def _sums(x, ROWS: tl.constexpr, PIECES: tl.constexpr):
    return () if x is None else zeros_tile(ROWS, PIECES)


@triton.jit
def attention_pair_backward_kv(
    q, k, v, q_dot, k_dot, v_dot, dout, dout_dot, dk, dv, dk_dot, dv_dot, mask, lse, sums,
    strides, mask_strides, kv_heads, group, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes dk, dv, dk_dot and dv_dot, unless None, of a tile of keys over the queries of all heads that
    share them."""
    tile, b, kv_h = program_of(tl.cdiv(keys, BLOCK_N), kv_heads, False)
    first = tile * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    k_head, k_dot_head = head_of(k, strides, 1, b, kv_h, ALIGN), head_of(k_dot, strides, 4, b, kv_h, ALIGN)
    v_head, v_dot_head = head_of(v, strides, 2, b, kv_h, ALIGN), head_of(v_dot, strides, 5, b, kv_h, ALIGN)
    k_tile = load_tile(k_head, first, keys, BLOCK_N, WIDTH, PIECES, ALIGN)
    k_dot_tile = load_tile(k_dot_head, first, keys, BLOCK_N, WIDTH, PIECES, ALIGN)
    v_tile = load_tile(v_head, first, keys, BLOCK_N, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    v_dot_tile = load_tile(v_dot_head, first, keys, BLOCK_N, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    masking = masking_of(mask, mask_strides)
    state = (
        _sums(dk, BLOCK_N, PIECES),
        _sums(dv, BLOCK_N, VALUE_PIECES),
        _sums(dk_dot, BLOCK_N, PIECES),
        _sums(dv_dot, BLOCK_N, VALUE_PIECES),
    )
    begin = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i in range(group):
        h = kv_h * group + i
        q_head, q_dot_head = head_of(q, strides, 0, b, h, ALIGN), head_of(q_dot, strides, 3, b, h, ALIGN)
        g_head, h_head = head_of(dout, strides, 6, b, h, ALIGN), head_of(dout_dot, strides, 7, b, h, ALIGN)
        of_head = (b * kv_heads * group + h) * queries
        for start in range(begin, queries, BLOCK_M):
            state = _columns_tile(
                state, start, q_head, q_dot_head, g_head, h_head, k_tile, k_dot_tile, v_tile, v_dot_tile,
                masking, b, h, columns, lse + of_head, sums + 4 * of_head, queries, keys, scale,
                WIDTH, VALUE_WIDTH, PIECES, VALUE_PIECES, ALIGN, CAUSAL, BLOCK_M, EDGE,
            )  # fmt: skip
    dk_sums, dv_sums, dk_dot_sums, dv_dot_sums = state
    scales = tl.zeros([BLOCK_N], tl.float32) + scale
    if dk is not None:
        dk_head = head_of(dk, strides, 8, b, kv_h, ALIGN)
        store_tile(dk_head, scaled(dk_sums, scales), first, keys, BLOCK_N, WIDTH, ALIGN)
    if dv is not None:
        dv_head = head_of(dv, strides, 9, b, kv_h, ALIGN)
        store_tile(dv_head, dv_sums, first, keys, BLOCK_N, VALUE_WIDTH, ALIGN)
    if dk_dot is not None:
        dk_dot_head = head_of(dk_dot, strides, 10, b, kv_h, ALIGN)
        store_tile(dk_dot_head, scaled(dk_dot_sums, scales), first, keys, BLOCK_N, WIDTH, ALIGN)
    if dv_dot is not None:
        dv_dot_head = head_of(dv_dot, strides, 11, b, kv_h, ALIGN)
        store_tile(dv_dot_head, dv_dot_sums, first, keys, BLOCK_N, VALUE_WIDTH, ALIGN)


_KERNELS = {"pair q": attention_pair_backward_q, "pair kv": attention_pair_backward_kv}


def _piece(width: int) -> tuple[int]:
    """Returns a width as one piece: with two, more registers spill than one as wide as a power of 2 takes."""
    return (max(16, triton.next_power_of_2(width)),)


@functools.lru_cache(maxsize=1024)
def _launcher_of(
    kernel: str, architecture: str, dtype: torch.dtype, heads: int, group: int, queries: int, keys: int,
    width: int, value_width: int, is_causal: bool, mask_strides: tuple[int, ...] | None,
    *strides: tuple[int, ...] | None,
) -> tuple[Launcher, int]:  # fmt: skip
    """Returns the launcher of a kernel for tensors of these strides, and the number of programs per head."""
    by_keys = kernel == "pair kv"
    walked, divided = (queries, keys) if by_keys else (keys, queries)
    masked = mask_strides is not None
    tiles = tiles_for(kernel, architecture, dtype, max(width, value_width), walked, masked)
    step, block = (tiles[name] for name in (("BLOCK_M", "BLOCK_N") if by_keys else ("BLOCK_N", "BLOCK_M")))
    align, steps = in_units(dtype, strides)
    launcher = Launcher(
        *(_KERNELS[kernel], steps, mask_strides, heads, group, queries, keys),
        WIDTH=width,
        VALUE_WIDTH=value_width,
        PIECES=_piece(width),
        VALUE_PIECES=_piece(value_width),
        ALIGN=align,
        CAUSAL=is_causal,
        EDGE=walked % step != 0 or (is_causal and not by_keys),
        **tiles,
    )
    return launcher, -(-divided // block)


def pair_backward(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    mask: Tensor | None, lse: Tensor, dout: Tensor | None, dout_dot: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dq_dot: Tensor | None, dk_dot: Tensor | None,
    dv_dot: Tensor | None, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills those of the gradients that are not None."""
    (batch, heads, queries, width), (_, kv_heads, keys, value_width) = q.shape, v.shape
    given = q, k, v, q_dot, k_dot, v_dot, mask, lse, dout, dout_dot
    gradients = dq, dk, dv, dq_dot, dk_dot, dv_dot
    if too_narrow(q, v):
        in_float32(pair_backward, given, gradients, mask, scale, is_causal)
        return
    architecture, group = triton_launch.architecture(q), heads // max(kv_heads, 1)
    sizes = group, queries, keys, width, value_width, is_causal, stride_of(mask)
    sums = lse.new_empty((batch, heads, 4, queries))
    if keys == 1:  # P is 1 for any logits: exact zeros, not rounding errors of A - alpha
        for x in (dq, dk, dq_dot, dk_dot):
            if x is not None:
                x.zero_()
        dq = dk = dq_dot = dk_dot = None

    def run(kernel: str, of_launch: int, *gradients: Tensor | None) -> None:
        tensors: tuple[Any, ...] = (q, k, v, q_dot, k_dot, v_dot, dout, dout_dot, *gradients)
        strides = map(stride_of, tensors)
        launch, programs = _launcher_of(kernel, architecture, q.dtype, of_launch, *sizes, *strides)
        launch((batch * of_launch * programs, 1), (*tensors, mask, lse, sums), float(scale))

    run("pair q", heads, dq, dq_dot)
    if any(x is not None for x in (dk, dv, dk_dot, dv_dot)):
        run("pair kv", kv_heads, dk, dv, dk_dot, dv_dot)
