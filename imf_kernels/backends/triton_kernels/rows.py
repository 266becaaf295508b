"""Launches of kernels over rows: the tile of a program, and sums over rows in a fixed order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.backends.triton_launch import Launcher, Tensors

# Elements per tile, 8 per thread: 16 bytes in half precision, and few enough that no register spills where
# rows begin at odd addresses and each element is read separately.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 2048, 256

# Maximum number of shares of a sum over rows, the same on all GPUs.
_SHARES = 512

# Rows and columns of shares that a program adds at once: 128 bytes per row, several rows per thread.
_ADDED_ROWS, _ADDED_COLUMNS = 128, 32


def row_stride(x: Tensor | None) -> int:
    """Returns the stride between rows of x [..., width], whose leading dimensions collapse; 0 for `None`."""
    if x is None:
        return 0
    if not x.is_contiguous():
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size != 1:
                return stride
    return x.shape[-1]


def count_rows(x: Tensor | None, width: int) -> int:
    """Returns the number of rows of x [..., width]; 0 for `None` and for rows of no width."""
    return 0 if x is None or not width else x.numel() // width


def _block(width: int) -> int:
    """Returns the power of two that holds a row."""
    return 1 << max(int(width) - 1, 0).bit_length()


@functools.cache
def _rows_of_tile(width: int) -> int:
    return max(1, min(_ELEMENTS // _block(width), 32))


def _rows_of_share(groups: int, length: int, width: int) -> int:
    """Returns the number of rows that a program sums: full tiles, of at most one group of `length` rows."""
    rows = _rows_of_tile(int(width))
    return max(1, min(-(-groups * length // (_SHARES * rows)), -(-length // rows))) * rows


def shares(groups: int, length: int, width: int, count: int) -> int:
    """Returns the number of partial sums per group of `length` rows [width], also of symbolic sizes.

    All `count` sums of a row are taken in one program.
    """
    return -(-length // _rows_of_share(groups, length, width))


@triton.jit
def group_and_position(length, share):
    """Returns this program's group, and the first of its rows, up to `share` of the group's `length` rows."""
    programs = tl.cdiv(length, share)
    program = tl.program_id(0)
    return (program // programs).to(tl.int64), program % programs * share


@triton.jit
def row_of_group(parameter, group, column, WIDTH: tl.constexpr):
    """Loads a group's row of a parameter; zeros without a parameter, and for a group before the first."""
    if parameter is None:
        row = tl.zeros(column.shape, tl.float32)
    else:
        columns = tl.where(group >= 0, WIDTH, 0)
        row = tl.load(parameter + group * WIDTH + column, mask=column < columns, other=0.0)
    return row


@triton.jit
def dual_row_of_group(parameter, group, parameter_dot, t_group, column, WIDTH: tl.constexpr):
    """Loads a group's row of a parameter and of its tangent, if that has one."""
    row = row_of_group(parameter, group, column, WIDTH)
    if parameter_dot is None:
        return (row,)
    else:
        return row, row_of_group(parameter_dot, t_group, column, WIDTH)


@triton.jit
def store_sums(partial, sums, column, WIDTH: tl.constexpr):
    """Stores the sums over rows of tiles [ROWS, BLOCK], this program's of partial [programs, sums, width]."""
    at = partial + tl.program_id(0).to(tl.int64) * (len(sums) * WIDTH) + column
    for i in tl.static_range(len(sums)):
        tl.store(at + i * WIDTH, tl.sum(sums[i], axis=0, keep_dims=True), mask=column < WIDTH)


@triton.jit
def load_rows(x, row, stride, column, inside, UNIT: tl.constexpr):
    """Loads rows at a stride of `stride` units in float32; zeros outside."""
    return tl.load(x + row * (stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_of_row(x):
    """Returns the sums of rows, [ROWS, 1]; wide ones by eights, as a thread adds its numbers one by one."""
    if x.shape[1] > 8192:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), axis=2)
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["shares"])
def add_shares(
    partial, total, shares, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds up the shares of a group, [shares, COLUMNS]: ROWS of them at once, one after the other."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, shares, ROWS):
        share = first + tl.arange(0, ROWS)[:, None]
        at = partial + (group * shares + share) * COLUMNS + column
        sums += tl.load(at, mask=(share < shares) & (column < COLUMNS), other=0.0)
    tl.store(total + group * COLUMNS + column, tl.sum(sums, axis=0, keep_dims=True), mask=column < COLUMNS)


@functools.lru_cache(maxsize=1024)
def _adder(columns: int, rows: int) -> Launcher:
    return Launcher(add_shares, COLUMNS=columns, ROWS=rows, BLOCK=_ADDED_COLUMNS, num_warps=8)


class RowKernel:
    """A kernel over rows, with one program per tile of ROWS by BLOCK elements, powers of two.

    It takes tensors, strides, numbers and constants, in this order. The last number is `length`, the rows per
    group, followed by `share`, the rows per program, if rows are summed. Strides are in units of UNIT
    elements, the largest power of two up to 16 that divides them all: a constant, by which the compiler knows
    where rows begin and reads several elements at once.

    Args:
        kernel: a `triton.jit` function.
        widest: the widest tile; narrower rows fit one tile. A kernel that reduces along rows takes any width.
        stride: returns the stride, or a tuple of them, of a tensor or `None`.
    """

    def __init__(
        self, kernel: Any, widest: int = 1 << 30, stride: Callable[[Tensor | None], Any] = row_stride
    ) -> None:
        self._kernel, self._widest, self._stride = kernel, widest, stride
        self._launcher = functools.lru_cache(maxsize=1024)(self._new_launcher)

    def launch(
        self, strided: Tensors, tensors: Tensors, numbers: tuple[float | None, ...], width: int, rows: int,
        groups: int = 1,
    ) -> None:  # fmt: skip
        """Runs the kernel on every tile of the groups of `rows` rows; no tile spans two groups.

        `strided` are the tensors of whose strides the kernel is told.
        """
        length = rows // max(groups, 1)
        launcher, tile, columns = self._launcher(width, *map(self._stride, strided))
        launcher((groups * -(-length // tile), columns), tensors, *numbers, length)

    def sum(
        self, strided: Tensors, tensors: Tensors, numbers: tuple[float | None, ...], rows: int,
        partial: Tensor, total: Tensor,
    ) -> None:  # fmt: skip
        """Runs the kernel on shares of each group's rows and adds up their sums.

        Program i takes up to `share` rows of its group and writes their sums to row i of partial, counted
        over groups and shares. The order of summation is fixed, unlike that of atomic additions.

        Args:
            partial: [groups, shares, sums, width], the kernel's last tensor.
            total: [groups, sums, width], without dimensions of size 1 where those are left out.
        """
        groups, shares, sums, width = partial.shape
        length = rows // max(groups, 1)
        launcher, _, columns = self._launcher(width, *map(self._stride, strided))
        share = _rows_of_share(groups, length, min(width, self._widest))
        launcher((groups * -(-length // share), columns), (*tensors, partial), *numbers, length, share)
        adder = _adder(sums * width, min(_block(shares), _ADDED_ROWS))
        adder((groups, -(-sums * width // _ADDED_COLUMNS)), (partial, total), shares)

    def _new_launcher(self, width: int, *strides: int | tuple[int, ...]) -> tuple[Launcher, int, int]:
        """Returns a launcher, the rows per tile, and the tiles per row."""
        unit = math.gcd(16, *pytree.tree_leaves(strides))
        strides = pytree.tree_map(lambda step: step // unit, strides)
        block = min(_block(width), self._widest)
        rows = _rows_of_tile(block)
        warps = max(1, min(rows * block // _ELEMENTS_OF_A_WARP, 16))
        constants = {"UNIT": unit, "WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": warps}
        return Launcher(self._kernel, *strides, **constants), rows, -(-width // block)
