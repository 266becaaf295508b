"""The compiled CPU kernels: when they can run, with which instructions, on how many threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

# First, so that its OpenMP runtime is the one that the compiled module finds loaded.
import torch
from torch import Tensor

from imf_kernels import _C

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the values of imf::DType, csrc/common/types.h


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why the `cpu` backend cannot take these tensors; `None` where it can."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it takes CPU tensors, got one on {x.device}"
        if x.dtype not in DTYPES:
            return f"it takes float32 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, slowest first: of "plain", "avx2", "avx512"."""
    return _C.supported_isas()


def instruction_set() -> str:
    """The instruction set that the kernels use now; the best one unless chosen otherwise."""
    return _C.get_isa()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Makes the kernels of the whole process use one instruction set, for tests and measurements.

    Raises:
        ValueError: an unknown set, or one that this processor does not run.
    """
    before = _C.get_isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` as rows at one distance from each other: a tensor, itself where possible, and that distance.

    The last dimension must be contiguous. A tensor whose leading dimensions do not collapse into
    equally spaced rows is copied.
    """
    if x.dim() == 1 or x.is_contiguous():
        return x, x.shape[-1]
    stride, expected = 0, 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            stride = expected = step
        if step != expected:
            return x.contiguous(), x.shape[-1]
        expected = step * size
    return x, stride or x.shape[-1]


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
