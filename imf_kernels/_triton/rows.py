"""What the kernels over rows share: the tile of a program, and sums over rows in one order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.triton_backend import launch

# Elements of a tile, 8 a thread: 16 bytes in half precision, and few enough that nothing spills from
# registers where rows begin at odd places and each element is read by itself.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 2048, 256

# Sums over rows are taken in at most so many shares, then over the shares. It does not depend on the GPU.
_SHARES = 512


def in_units(*strides: int) -> tuple[int, list[int]]:
    """The largest power of two up to 16 that divides all strides, and the strides in units of it.

    A kernel multiplies the two again. The unit is a constant there, by which the compiler knows where rows
    begin and reads several elements at once; of strides that are not multiples of 16 it knows nothing else.
    """
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


@triton.jit
def group_and_position(length, share):
    """The group of this program, and the first of its rows that are this program's: `share` of the group's
    `length` rows, or what is left of them."""
    programs = tl.cdiv(length, share)
    program = tl.program_id(0)
    return (program // programs).to(tl.int64), program % programs * share


@triton.jit
def row_of_group(parameter, group, stride, column, WIDTH: tl.constexpr):
    """A group's row of a parameter, in fp32; zeros without a parameter, and for a group before the first."""
    if parameter is None:
        row = tl.zeros(column.shape, tl.float32)
    else:
        columns = tl.where(group >= 0, WIDTH, 0)
        row = tl.load(parameter + group * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    return row


@dataclass(frozen=True)
class Tile:
    """ROWS by BLOCK elements, powers of two, of rows of WIDTH: what one program works on at a time.

    Kernels are launched over (tiles of rows, tiles of columns) and take, after their own arguments, `rows`
    and these three constants.
    """

    width: int
    block: int

    @classmethod
    def whole_rows(cls, width: int) -> Tile:
        """For kernels that reduce along rows."""
        return cls(width, triton.next_power_of_2(max(width, 1)))

    @classmethod
    def part_of_rows(cls, width: int) -> Tile:
        """For kernels that work element by element."""
        return cls(width, min(triton.next_power_of_2(max(width, 1)), 1024))

    @property
    def rows(self) -> int:
        return max(1, min(_ELEMENTS // self.block, 32))

    def launch(self, kernel: Any, rows: int, *arguments: Any, groups: int = 1, **constants: Any) -> None:
        """Runs `kernel(*arguments, rows, …)` on every tile of groups of so many rows, none of two groups."""
        self._launch(kernel, groups * triton.cdiv(rows, self.rows), *arguments, rows, **constants)

    def sum_over_rows(self, kernel: Any, rows: int, *arguments: Any, **constants: Any) -> Tensor:
        """`sum_over_groups` of a single group with one sum, [WIDTH]."""
        return self.sum_over_groups(kernel, 1, rows, 1, *arguments, **constants)[0, 0]

    def sum_over_groups(
        self, kernel: Any, groups: int, rows: int, count: int, *arguments: Any, **constants: Any
    ) -> Tensor:
        """Runs `kernel(*arguments, sums, rows, share, …)` on shares of each group's rows; the sums of their
        sums, [groups, count, WIDTH] in fp32.

        Program i of the first axis takes up to `share` rows of its group and writes their sums, each [WIDTH],
        to sums[i]. Every sum is taken in the same order every time: atomic additions would not do that.
        """
        tiles = min(triton.cdiv(groups * rows, _SHARES * self.rows), triton.cdiv(rows, self.rows))
        share = max(1, tiles) * self.rows
        shares = triton.cdiv(rows, share)
        sums = arguments[0].new_empty((groups, shares, count, self.width), dtype=torch.float32)
        self._launch(kernel, groups * shares, *arguments, sums, rows, share, **constants)
        return sums.sum(1)

    def _launch(self, kernel: Any, tiles_of_rows: int, *arguments: Any, **constants: Any) -> None:
        launch(
            kernel,
            (tiles_of_rows, triton.cdiv(self.width, self.block)),
            *arguments,
            WIDTH=self.width,
            ROWS=self.rows,
            BLOCK=self.block,
            num_warps=max(1, min(self.rows * self.block // _ELEMENTS_OF_A_WARP, 16)),
            **constants,
        )
