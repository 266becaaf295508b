"""The launch of kernels over rows: the tile of a program, and sums over rows in one order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_launch import Launcher, Tensors

# Elements of a tile, 8 a thread: 16 bytes in half precision, and few enough that nothing spills from
# registers where rows begin at odd places and each element is read by itself.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 2048, 256

# Sums over rows are taken in at most so many shares, then over the shares. It does not depend on the GPU.
_SHARES = 512


def row_stride(x: Tensor | None, width: int) -> int:
    """Counts the elements from a row of x [..., width] to the next; 0 for `None`.

    The leading dimensions collapse into rows at one distance.
    """
    if x is None:
        return 0
    if not x.is_contiguous():
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size != 1:
                return stride
    return width


def count_rows(x: Tensor | None, width: int) -> int:
    """Counts the rows of x [..., width]; 0 for `None` and for rows of no width."""
    return 0 if x is None or not width else x.numel() // width


def groups_of(parameter: Tensor | None, rows: int) -> tuple[int, int]:
    """Counts the groups of rows that share a row of `parameter`, and the rows of each.

    The rows of a sample share one of [B, width]; all rows share [width], or a parameter that is not there.
    """
    if parameter is None or parameter.dim() == 1:
        return 1, rows
    groups = parameter.shape[0]
    return groups, rows // max(groups, 1)


def _block(width: int) -> int:
    """The power of two that holds a row."""
    return 1 << max(int(width) - 1, 0).bit_length()


def _rows_of_tile(width: int) -> int:
    return max(1, min(_ELEMENTS // _block(width), 32))


def _rows_of_share(groups: int, length: int, width: int) -> int:
    """The rows whose sum one program takes: full tiles, and of at most one group of `length` rows."""
    rows = _rows_of_tile(width)
    return max(1, min(-(-groups * length // (_SHARES * rows)), -(-length // rows))) * rows


def shares(groups: int, length: int, width: int, count: int) -> int:
    """Counts the partial sums per group of `length` rows [width]; of whatever PyTorch traces, too.

    All `count` sums of a row are taken in one program.
    """
    return -(-length // _rows_of_share(groups, length, width))


@triton.jit
def group_and_position(length, share):
    """The group of this program, and the first of its rows that are this program's: `share` of the group's
    `length` rows, or what is left of them."""
    programs = tl.cdiv(length, share)
    program = tl.program_id(0)
    return (program // programs).to(tl.int64), program % programs * share


@triton.jit
def row_of_group(parameter, group, column, WIDTH: tl.constexpr):
    """A group's row of a parameter; zeros without a parameter, and for a group before the first."""
    if parameter is None:
        row = tl.zeros(column.shape, tl.float32)
    else:
        columns = tl.where(group >= 0, WIDTH, 0)
        row = tl.load(parameter + group * WIDTH + column, mask=column < columns, other=0.0)
    return row


class RowKernel:
    """A kernel over rows, one program for each tile of ROWS by BLOCK elements, powers of two.

    It takes tensors, strides, numbers and constants, in this order. The last number is `length`, the rows of
    a group, followed by `share`, the rows of a program, where rows are summed. Strides are in units of UNIT
    elements, the largest power of two up to 16 that divides all of them: a constant, by which the compiler
    knows where rows begin and reads several elements at once.

    Args:
        kernel: a `triton.jit` function.
        widest: the widest tile; narrower rows are in one tile. A kernel that reduces along rows takes all.
    """

    def __init__(self, kernel: Any, widest: int = 1 << 30) -> None:
        self._kernel, self._widest = kernel, widest
        self._launcher = functools.lru_cache(maxsize=1024)(self._new_launcher)

    def launch(
        self,
        width: int,
        strides: tuple[int | tuple[int, ...], ...],
        tensors: Tensors,
        numbers: Sequence[float],
        length: int,
        groups: int = 1,
        **constants: Any,
    ) -> None:
        """Runs the kernel on every tile of groups of `length` rows, none of two groups."""
        launcher, rows, columns = self._launcher(width, *strides, **constants)
        launcher((groups * -(-length // rows), columns), tensors, *numbers, length)

    def sum(
        self,
        strides: tuple[int | tuple[int, ...], ...],
        tensors: tuple[Tensor | None, ...],
        partial: Tensor,
        total: Tensor,
        numbers: Sequence[float],
        length: int,
        groups: int = 1,
    ) -> None:
        """Runs the kernel on shares of each group's rows, and adds up their sums.

        Program i takes up to `share` rows of its group and writes their sums to row i of partial, counted
        over groups and shares. Sums are taken in the same order every time, unlike atomic additions.

        Args:
            partial: [groups, shares, sums, width], the kernel's last tensor.
            total: [groups, sums, width].
        """
        width = partial.shape[-1]
        launcher, _, columns = self._launcher(width, *strides)
        share = _rows_of_share(groups, length, min(width, self._widest))
        launcher((groups * -(-length // share), columns), (*tensors, partial), *numbers, length, share)
        torch.sum(partial, 1, out=total)

    def _new_launcher(
        self, width: int, *strides: int | tuple[int, ...], **constants: Any
    ) -> tuple[Launcher, int, int]:
        """A launcher, the rows of its tiles, and how many tiles a row has."""
        if strides:
            parts = [stride if isinstance(stride, tuple) else (stride,) for stride in strides]
            unit = constants["UNIT"] = math.gcd(16, *(step for part in parts for step in part))
            strides = tuple(
                tuple(step // unit for step in stride) if isinstance(stride, tuple) else stride // unit
                for stride in strides
            )
        block = min(_block(width), self._widest)
        rows = _rows_of_tile(block)
        warps = max(1, min(rows * block // _ELEMENTS_OF_A_WARP, 16))
        constants |= {"WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": warps}
        return Launcher(self._kernel, *strides, **constants), rows, -(-width // block)
