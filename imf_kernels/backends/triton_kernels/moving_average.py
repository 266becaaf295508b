"""One step of a moving average of many tensors. Formula: imf_kernels/backends/moving_average.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_launch import Launcher

_BLOCK = 4096  # elements of a program, 16 per thread


@triton.jit
def _lerp(average, weight, share):
    """Returns average + share (weight − average), from the nearer end, as `torch.lerp` computes it."""
    step = weight - average
    return tl.where(tl.abs(share) < 0.5, tl.fma(share, step, average), tl.fma(-step, 1.0 - share, weight))


@triton.jit
def moving_average(table, share, BLOCK: tl.constexpr):
    """Takes one row of the table per program: the addresses of its averages and weights, their number."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    averages_at, weights_at, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    averages = averages_at.to(tl.pointer_type(tl.float32))
    weights = weights_at.to(tl.pointer_type(tl.float32))
    ratio = tl.load(share)
    i = tl.arange(0, BLOCK)
    if (count == BLOCK) & ((averages_at | weights_at) % 16 == 0):  # the common case: 16 bytes at once
        at = tl.multiple_of(averages, 16) + i
        tl.store(at, _lerp(tl.load(at), tl.load(tl.multiple_of(weights, 16) + i), ratio))
    else:
        inside = i < count
        average = tl.load(averages + i, mask=inside, other=0.0)
        weight = tl.load(weights + i, mask=inside, other=0.0)
        tl.store(averages + i, _lerp(average, weight, ratio), mask=inside)


_LAUNCHER = Launcher(moving_average, BLOCK=_BLOCK, num_warps=8)


def table(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Returns what each program computes: [programs, 3] int64 on the device of the tensors."""
    rows = [torch.empty(0, 3, dtype=torch.int64, device="cpu")]
    for average, weight in zip(averages, weights, strict=True):
        first = torch.arange(0, average.numel(), _BLOCK, device="cpu")
        left = (average.numel() - first).clamp(max=_BLOCK)
        rows.append(torch.stack([average.data_ptr() + 4 * first, weight.data_ptr() + 4 * first, left], 1))
    return torch.cat(rows).to(averages[0].device)


def update(table: Tensor, share: Tensor) -> None:
    _LAUNCHER((table.shape[0], 1), (table, share))
