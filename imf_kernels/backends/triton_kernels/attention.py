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
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends import triton_launch
from imf_kernels.backends.triton_kernels.attention_pair import pair_backward as pair_backward
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
    logits_of,
    masking_of,
    pieces_of,
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
from imf_kernels.backends.triton_launch import Launcher, replayed


@triton.jit
def _extent(first, keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns how many keys, in full tiles, all queries from `first` on see, and how many any one sees."""
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
        return tl.minimum(keys, first + 1) // BLOCK_N * BLOCK_N, end
    else:
        return keys // BLOCK_N * BLOCK_N, keys


@triton.jit
def _forward_tile(
    state, start, q, q_dot, k, k_dot, v, v_dot, mask, b, h, rows, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    highest, total, before, dot, shift, out, out_dot = state
    length = keys if EDGE else None
    k_tile = load_tile(k, start, length, TILE, WIDTH, PIECES, ALIGN)
    zeros = tl.zeros([rows.shape[0], TILE], tl.float32)
    columns = start + tl.arange(0, TILE)
    s = dot_rows(q, k_tile, zeros)
    bias = bias_of(mask, b, h, rows[:, None], columns[None, :], queries, keys, CAUSAL, EDGE)

    logits = logits_of(s, scale, bias)
    maximum = tl.maximum(highest, tl.max(logits, 1))
    offset = tl.where(maximum == -float("inf"), 0.0, maximum)  # any finite one leaves a row of -inf at zero
    p = tl.exp2(logits - offset[:, None])
    decay = tl.exp2(highest - offset)
    total = total * decay + tl.sum(p, 1)
    before, dot = before * decay, dot * decay

    v_tile = load_tile(v, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    dtype: tl.constexpr = v_tile[0].dtype
    weights = p.to(dtype)
    if len(q_dot) + len(k_dot) > 0:
        s_dot = dot_rows(q_dot, k_tile, zeros)
        if len(k_dot) > 0:
            s_dot = dot_rows(q, load_tile(k_dot, start, length, TILE, WIDTH, PIECES, ALIGN), s_dot)
        weights_dot, weight, dot, shift, moved = centre(
            weights.to(tl.float32), s_dot * scale, before, dot, shift, dtype
        )
        out_dot = add_dot(plus(scaled(out_dot, decay), decay * moved, out), weights_dot, v_tile)
    else:
        weight = before + tl.sum(weights.to(tl.float32), 1)
        out_dot = scaled(out_dot, decay)
    if len(v_dot) > 0:
        v_dot_tile = load_tile(v_dot, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
        out_dot = add_dot(out_dot, weights, v_dot_tile)
    out = add_dot(scaled(out, decay), weights, v_tile)
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
    tile, b_dot, h = program_of(tl.cdiv(queries, BLOCK_M), heads, CAUSAL)
    b, kv_h = first_sample + b_dot, h // group
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_head, q_dot_head = head_of(q, strides, 0, b, h, ALIGN), head_of(q_dot, strides, 3, b_dot, h, ALIGN)
    q_tile = load_tile(q_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    q_dot_tile = load_tile(q_dot_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    k_head, k_dot_head = (
        head_of(k, strides, 1, b, kv_h, ALIGN),
        head_of(k_dot, strides, 4, b_dot, kv_h, ALIGN),
    )
    v_head, v_dot_head = (
        head_of(v, strides, 2, b, kv_h, ALIGN),
        head_of(v_dot, strides, 5, b_dot, kv_h, ALIGN),
    )
    masking = masking_of(mask, mask_strides)

    nothing = tl.zeros([BLOCK_M], tl.float32)
    sums = zeros_tile(BLOCK_M, VALUE_PIECES)
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

    inverse = inverse_or_zero(weight)
    o = scaled(sums, inverse)
    store_tile(head_of(out, strides, 6, b, h, ALIGN), o, first, queries, BLOCK_M, VALUE_WIDTH, ALIGN)
    if out_dot is not None:
        o_dot = plus(scaled(sums_dot, inverse), -dot * inverse, o)
        out_dot_head = head_of(out_dot, strides, 7, b_dot, h, ALIGN)
        store_tile(out_dot_head, o_dot, first, queries, BLOCK_M, VALUE_WIDTH, ALIGN)
    tl.store(lse + (b * heads + h) * queries + rows, highest + tl.log2(total), mask=rows < queries)


@triton.jit
def _backward_q_tile(
    state, start, q, k, v, dout, mask, b, h, rows, lse, queries, keys, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    total, before, dot, shift, mean_k, dq = state
    length = keys if EDGE else None
    k_tile = load_tile(k, start, length, TILE, WIDTH, PIECES, ALIGN)
    zeros = tl.zeros([rows.shape[0], TILE], tl.float32)
    columns = start + tl.arange(0, TILE)
    s = dot_rows(q, k_tile, zeros)
    bias = bias_of(mask, b, h, rows[:, None], columns[None, :], queries, keys, CAUSAL, EDGE)
    dtype: tl.constexpr = k_tile[0].dtype
    p = probabilities(s, scale, bias, lse[:, None], dtype)

    dp = dot_rows(dout, load_tile(v, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN), zeros)
    weights = for_product(p, dtype)
    ds, weight, dot, shift, moved = centre(weights.to(tl.float32), dp, before, dot, shift, dtype)
    dq = add_dot(plus(dq, moved, mean_k), ds, k_tile)
    mean_k = add_dot(mean_k, weights, k_tile)
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
    tile, b, h = program_of(tl.cdiv(queries, BLOCK_M), heads, CAUSAL)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_head, dout_head = head_of(q, strides, 0, b, h, ALIGN), head_of(dout, strides, 3, b, h, ALIGN)
    q_tile = load_tile(q_head, first, queries, BLOCK_M, WIDTH, PIECES, ALIGN)
    dout_tile = load_tile(dout_head, first, queries, BLOCK_M, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    k_head, v_head = (
        head_of(k, strides, 1, b, h // group, ALIGN),
        head_of(v, strides, 2, b, h // group, ALIGN),
    )
    masking = masking_of(mask, mask_strides)
    of_head = (b * heads + h) * queries
    row_lse = load_lse(lse + of_head, rows, queries)

    nothing = tl.zeros([BLOCK_M], tl.float32)
    zeros = () if dq is None else zeros_tile(BLOCK_M, PIECES)
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

    inverse = inverse_or_zero(weight)
    mean = dot * inverse
    tl.store(sums + 2 * of_head + rows, inverse_or_zero(total), mask=rows < queries)
    tl.store(sums + 2 * of_head + queries + rows, shift + mean, mask=rows < queries)
    if dq is not None:
        dq_sums = scaled(plus(dq_sums, -mean, mean_k), inverse * scale)
        store_tile(head_of(dq, strides, 4, b, h, ALIGN), dq_sums, first, queries, BLOCK_M, WIDTH, ALIGN)


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
    q_tile = load_tile(q, start, length, TILE, WIDTH, PIECES, ALIGN)
    dout_tile = load_tile(dout, start, length, TILE, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    dtype: tl.constexpr = q_tile[0].dtype
    s = dot_columns(q_tile, k, TILE, KEYS)
    bias = bias_of(mask, b, h, rows[None, :], columns[:, None], queries, keys, CAUSAL, CAUSAL)
    p = probabilities(s, scale, bias, load_lse(lse, rows, length)[None, :], dtype)
    p *= load_row(sums, rows, length, 0.0)[None, :]
    dv = add_dot(dv, for_product(p, dtype), dout_tile)
    if len(dk) > 0:
        delta = load_row(sums + queries, rows, length, 0.0)
        ds = p * (dot_columns(dout_tile, v, TILE, KEYS) - delta[None, :])
        dk = add_dot(dk, for_product(ds, dtype), q_tile)
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
    tile, b, kv_h = program_of(tl.cdiv(keys, BLOCK_N), kv_heads, False)
    first = tile * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    k_head, v_head = head_of(k, strides, 1, b, kv_h, ALIGN), head_of(v, strides, 2, b, kv_h, ALIGN)
    k_tile = load_tile(k_head, first, keys, BLOCK_N, WIDTH, PIECES, ALIGN)
    v_tile = load_tile(v_head, first, keys, BLOCK_N, VALUE_WIDTH, VALUE_PIECES, ALIGN)
    masking = masking_of(mask, mask_strides)
    dk_sums = () if dk is None else zeros_tile(BLOCK_N, PIECES)
    dv_sums = () if dv is None else zeros_tile(BLOCK_N, VALUE_PIECES)
    state = (dk_sums, dv_sums)
    begin = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i in range(group):
        h = kv_h * group + i
        q_head, dout_head = head_of(q, strides, 0, b, h, ALIGN), head_of(dout, strides, 3, b, h, ALIGN)
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
        dk_head, scales = head_of(dk, strides, 4, b, kv_h, ALIGN), tl.zeros([BLOCK_N], tl.float32) + scale
        store_tile(dk_head, scaled(dk_sums, scales), first, keys, BLOCK_N, WIDTH, ALIGN)
    if dv is not None:
        dv_head = head_of(dv, strides, 5, b, kv_h, ALIGN)
        store_tile(dv_head, dv_sums, first, keys, BLOCK_N, VALUE_WIDTH, ALIGN)


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
    align, steps = in_units(dtype, strides)
    # Two loops inside one over heads, or from a diagonal on, spill registers.
    split = {"SPLIT": group == 1 and not is_causal} if kernel == "backward kv" else {}
    launcher = Launcher(
        *(_KERNELS[kernel], steps, mask_strides, heads, group, queries, keys),
        WIDTH=width,
        VALUE_WIDTH=value_width,
        PIECES=pieces_of(width),
        VALUE_PIECES=pieces_of(value_width),
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    mask: Tensor | None, out: Tensor, out_dot: Tensor | None, lse: Tensor, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills out [B, H, L_q, D_v], lse [B, H, L_q] (in units of ln 2, -inf where nothing is seen) and out_dot.

    Tangents belong to the last `out_dot.shape[0]` samples. The others have a separate launch: with registers
    for tangents fewer programs would share a processor.
    """
    if too_narrow(q, v):
        given, written = (q, k, v, q_dot, k_dot, v_dot, mask), (out, out_dot, lse)
        return in_float32(forward, given, written, mask, scale, is_causal)
    _forward(q, k, v, q_dot, k_dot, v_dot, mask, out, out_dot, lse, scale, is_causal)


@replayed
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    mask: Tensor | None, out: Tensor, out_dot: Tensor | None, lse: Tensor, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    (batch, heads, queries, width), (_, kv_heads, keys, value_width) = q.shape, v.shape
    architecture, group = triton_launch.architecture(q), heads // max(kv_heads, 1)
    sizes = heads, group, queries, keys, width, value_width, is_causal, stride_of(mask)
    tangents = 0 if out_dot is None else out_dot.shape[0]
    for first, samples, dots in (
        (0, batch - tangents, (None, None, None, out, None)),
        (batch - tangents, tangents, (q_dot, k_dot, v_dot, out, out_dot)),
    ):
        if samples:
            tensors = q, k, v, *dots
            strides = map(stride_of, tensors)
            launch, programs = launcher_of("forward", architecture, q.dtype, *sizes, *strides)
            launch((samples * heads * programs, 1), (*tensors, mask, lse), float(scale), first)


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, dout: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills those of dq, dk and dv that are not None."""
    if too_narrow(q, v):
        return in_float32(backward, (q, k, v, mask, lse, dout), (dq, dk, dv), mask, scale, is_causal)
    if k.shape[2] == 1:  # P is 1 for any logits: exact zeros, not rounding errors of dP - delta
        for x in (dq, dk):
            if x is not None:
                x.zero_()
        dq = dk = None
    sums = lse.new_empty((*q.shape[:2], 2, q.shape[2]))
    _backward(q, k, v, mask, lse, dout, dq, dk, dv, sums, scale, is_causal)


@replayed
def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, dout: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, sums: Tensor, scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fills sums [B, H, 2, L_q] too, of each row of logits, which the second kernel reads."""
    (batch, heads, queries, width), (_, kv_heads, keys, value_width) = q.shape, v.shape
    architecture, group = triton_launch.architecture(q), heads // max(kv_heads, 1)
    sizes = group, queries, keys, width, value_width, is_causal, stride_of(mask)
    strides = q.stride(), k.stride(), v.stride(), dout.stride()
    launch, programs = launcher_of(
        "backward q", architecture, q.dtype, heads, *sizes, *strides, stride_of(dq)
    )
    launch((batch * heads * programs, 1), (q, k, v, dout, dq, mask, lse, sums), float(scale))
    if dk is None and dv is None:
        return
    launch, programs = launcher_of(
        "backward kv", architecture, q.dtype, kv_heads, *sizes, *strides, stride_of(dk), stride_of(dv)
    )
    launch((batch * kv_heads * programs, 1), (q, k, v, dout, dk, dv, mask, lse, sums), float(scale))
