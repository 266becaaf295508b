"""Parts that the kernels of attention share: tiles of heads, their products, masks and probabilities."""

# Triton's tuples grow by `+` only, and each length is a separate type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

_LOG2E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234e38)

# `strides` holds those of batch, head and position of each of a kernel's tensors, zeros for a missing one, in
# units of ALIGN elements, 16 bytes where all of them allow it: so the compiler knows where rows begin. In the
# kernels a head is (pointer, stride of position), or () if missing; a tile is a tuple of its pieces along the
# width; a mask is (pointer, strides), or ().


@triton.jit
def head_of(x, strides, NUMBER: tl.constexpr, b, h, ALIGN: tl.constexpr):
    if x is None:
        return ()
    else:
        return x + (b * strides[3 * NUMBER] + h * strides[3 * NUMBER + 1]) * ALIGN, strides[3 * NUMBER + 2]


@triton.jit
def masking_of(mask, strides):
    if mask is None:
        return ()
    else:
        return mask, strides[0], strides[1], strides[2], strides[3]


@triton.jit
def load_tile(
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
def store_tile(x, tile, start, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    first = x[0] + tl.cast(start, tl.int64) * x[1] * ALIGN
    for i in tl.static_range(len(tile)):
        columns = i * tile[0].shape[1] + tl.arange(0, tile[i].shape[1])[None, :]
        mask = (start + rows < length) & (columns < WIDTH)
        tl.store(first + (rows * x[1] * ALIGN + columns), tile[i].to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def inverse_or_zero(x):
    """Returns 1 / x, and 0 for 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def _zeros_piece(ROWS: tl.constexpr, SIZE: tl.constexpr):
    return tl.zeros([ROWS, SIZE], tl.float32)


@triton.jit
def zeros_tile(ROWS: tl.constexpr, PIECES: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(PIECES)):
        tile = tile + (_zeros_piece(ROWS, PIECES[i]),)  # Triton 3.6 has no list with an element of a tuple
    return tile


@triton.jit
def scaled(tile, rows):
    return [piece * rows[:, None] for piece in tile]


@triton.jit
def plus(tile, rows, other):
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
def for_product(x, dtype: tl.constexpr):
    """Rounds x, however large or small, to `dtype`; instead of to float16 to TF32, which has as many bits."""
    if dtype == tl.float16:
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return tl.where(tl.abs(x) < float("inf"), (bits & -0x2000).to(tl.float32, bitcast=True), x)
    else:
        return x.to(dtype)


@triton.jit
def dot_rows(a, b, total):
    """Returns total + a bᵀ."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=_precision())
    return total


@triton.jit
def dot_columns(a, b, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """Returns (a bᵀ)ᵀ. In fp32 it has the same last bits as a bᵀ, on which large logits depend."""
    if a[0].dtype == tl.float32:
        return tl.trans(dot_rows(a, b, tl.zeros([A_ROWS, B_ROWS], tl.float32)))
    else:
        return dot_rows(b, a, tl.zeros([B_ROWS, A_ROWS], tl.float32))


@triton.jit
def add_dot(total, weights, rows):
    """Returns total + weights rows, also of weights of `for_product`. In fp32 a tile is summed by itself."""
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
def bias_of(mask, b, h, rows, columns, queries, keys, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
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
def logits_of(s, scale, bias):
    """Returns scale s + bias in units of ln 2; -inf where the bias is, whatever s is.

    The forward subtracts the maximum afterwards, so that the difference is exactly 0 for the largest logit of
    a row: a single key's value is returned to the bit.
    """
    if len(bias) > 0:
        return tl.where(bias[0] == -float("inf"), bias[0], tl.fma(s, scale * _LOG2E, bias[0]))
    else:
        return s * (scale * _LOG2E)


@triton.jit
def probabilities(s, scale, bias, lse, dtype: tl.constexpr):
    """Returns 2^(logits - lse) of the backward.

    In fp32 the logits are rounded like the forward's; in the other dtypes, where P is rounded for its
    products, one instruction scales and subtracts.
    """
    if (len(bias) > 0) | (dtype == tl.float32):
        return tl.exp2(logits_of(s, scale, bias) - lse)
    else:
        return tl.exp2(tl.fma(s, scale * _LOG2E, -lse))


@triton.jit
def centre(p, s_dot, before, dot, shift, dtype: tl.constexpr):
    """Returns P (S_dot - shift) of a tile as multiplied, and W, M and shift including the tile.

    The new shift is the mean of S_dot so far. It has decreased by `moved`: that times O must be added to A.
    `before`, `dot` and `shift` are W, M and shift without the tile.
    """
    weight = before + tl.sum(p, 1)
    total = dot + before * shift + tl.sum(p * s_dot, 1)
    # Without any weight there is no mean.
    mean = tl.where(weight > 0, total / tl.where(weight > 0, weight, 1.0), shift)
    moved = shift - mean
    centred = for_product(p * (s_dot - mean[:, None]), dtype)
    dot = dot + before * moved + tl.sum(centred.to(tl.float32), 1)
    return centred, weight, dot, mean, moved


@triton.jit
def program_of(tiles, heads, CAUSAL: tl.constexpr):
    """Returns tile, sample and head of this program. Along a diagonal the longest tiles come first."""
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile, head // heads, head % heads


@triton.jit
def load_row(x, rows, queries, other):
    """Loads a number per row, `other` from `queries` on; without `queries`, of rows that all exist."""
    if queries is None:
        return tl.load(x + rows)
    else:
        return tl.load(x + rows, mask=rows < queries, other=other)


@triton.jit
def load_lse(lse, rows, queries):
    """Loads lse so that missing rows, and rows that see no key, get no weight."""
    values = load_row(lse, rows, queries, float("inf"))
    return tl.where(values == -float("inf"), 0.0, values)


def pieces_of(width: int) -> tuple[int, ...]:
    """Splits a width into one or two powers of 2, from 16 on: (64,) for 64, (64, 16) for 72."""
    whole = max(16, triton.next_power_of_2(width))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(width - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole,)


def stride_of(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def in_units(dtype: torch.dtype, strides: tuple[tuple[int, ...] | None, ...]) -> tuple[int, tuple[int, ...]]:
    """Returns ALIGN, and strides of tensors [B, H, L, D] in units of it."""
    wide = 16 // dtype.itemsize
    align = wide if all(step % wide == 0 for s in strides if s for step in s[:3]) else 1
    return align, tuple(step // align for s in strides for step in (s or (0, 0, 0))[:3])


def too_narrow(q: Tensor, v: Tensor) -> bool:
    """Returns whether rows have too few numbers for the rounding errors of a product to average out."""
    return q.dtype != torch.float32 and min(q.shape[3], v.shape[3]) < 16


def in_float32(
    run: Callable[..., None], given: Sequence[Tensor | None], written: Sequence[Tensor | None],
    mask: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    """Calls run(*given, *written, *options) on copies in float32, but of the mask, which may be expanded."""
    copies = [x if x is None or x is mask else x.float() for x in given]
    wide = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in written]
    run(*copies, *wide, *options)
    for x, y in zip(written, wide, strict=True):
        if x is not None and y is not None:
            x.copy_(y)
