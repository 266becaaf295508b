"""What the kernels over rows share: the tile of a program, and sums over rows in one order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
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

    def launch(self, kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
        """Runs `kernel(*arguments, rows, …)` on every tile."""
        self._launch(kernel, triton.cdiv(rows, self.rows), *arguments, rows, **constants)

    def sum_over_rows(self, kernel: Any, rows: int, *arguments: Any, **constants: Any) -> Tensor:
        """Runs `kernel(*arguments, sums, rows, share, …)` on shares of the rows; the sum of their sums.

        Program i of the first axis takes the rows from i · share on and writes their sums [WIDTH] to sums[i],
        in fp32. Every sum is taken in the same order every time: atomic additions would not do that.
        """
        share = max(1, triton.cdiv(rows, _SHARES * self.rows)) * self.rows
        shares = triton.cdiv(rows, share)
        sums = arguments[0].new_empty((shares, self.width), dtype=torch.float32)
        self._launch(kernel, shares, *arguments, sums, rows, share, **constants)
        return sums.sum(0)

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
