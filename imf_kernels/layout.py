"""Tensors as the compiled module takes them: pointers, element types, and rows at one distance."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the values of imf::DType, csrc/common/types.h


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` as rows at one distance from each other: a tensor, itself where possible, and that distance.

    The last dimension must be contiguous. A tensor whose leading dimensions do not collapse into
    equally spaced rows is copied.
    """
    if x.dim() == 1 or x.is_contiguous():
        return x, x.shape[-1]
    stride: int | None = None  # 0 where rows are one row, expanded
    expected = 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = expected = step
        if step != expected:
            return x.contiguous(), x.shape[-1]
        expected = step * size
    return x, x.shape[-1] if stride is None else stride


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous (gradients arrive with any strides)."""
    return x if x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def count_rows(x: Tensor | None) -> int:
    """The number of rows of a stored tangent: of everything but its last dimension."""
    if x is None:
        return 0
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows
