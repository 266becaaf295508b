"""Tensors as the compiled module takes them: pointers, element types, and rows at one distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The values of imf::DType, csrc/common/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rows_of(x: Tensor | None) -> tuple[Any, int]:
    """`x` as rows at one distance from each other: a tensor, itself where possible, and that distance.

    The last dimension must be contiguous. A tensor whose leading dimensions do not collapse into
    equally spaced rows is copied. `None` and 0 for `None`.
    """
    if x is None:
        return None, 0
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


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the shape of `x`, and of its dtype unless told; twice as fast as `new_empty`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def positions_first(like: Tensor, batch: int, length: int, width: int) -> Tensor:
    """An empty [batch, H, length, width], H that of `like`, in projections' memory order [B, L, H, D]."""
    shape = (batch, like.shape[1], length, width)
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def in_order_of(x: Tensor, batch: int, length: int, width: int) -> Tensor:
    """An empty [batch, H, length, width] in the memory order of x [B, H, L, D], as PyTorch's attention gives.

    Heads first where x is contiguous, else positions first, as projections leave it.
    """
    if x.is_contiguous():
        return x.new_empty((batch, x.shape[1], length, width))
    return positions_first(x, batch, length, width)


def not_a_view(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x.view(shape) as a tensor of its own: autograd lets nobody modify a view that a Function returns."""
    return torch.ops.aten._unsafe_view.default(x, shape)


def without_memory(x: Tensor) -> str | None:
    """Why a kernel cannot read `x` at its address; `None` where it can, or will in a graph being traced."""
    if torch._C._are_functorch_transforms_active():
        return "one inside a transform of torch.func"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "one that a transform of torch.func has left behind"
    if x.is_neg():
        return "a lazily negated tensor; call .resolve_neg()"
    # A fake tensor's address is not asked for: PyTorch warns, and will raise.
    if hasattr(x, "fake_mode") or (x.numel() and x.data_ptr() == 0):
        return "a tensor without memory (fake, meta or symbolically zero)"
    return None


def pointer(x: Tensor | None) -> int:
    """The address of a tensor, 0 for `None`: the one way by which memory reaches the kernels."""
    if x is None:
        return 0
    address = x.data_ptr()  # of a tensor of another layout or inside a transform PyTorch refuses it
    if x.is_neg() or (address == 0 and x.numel()):
        raise RuntimeError(
            f"imf_kernels: the kernels take tensors that lie in memory, got {without_memory(x)}"
        )
    return address


def count_rows(x: Tensor | None) -> int:
    """The number of rows: the product of all dimensions but the last; 0 for `None`."""
    if x is None:
        return 0
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def groups_of(parameter: Tensor | None, x: Tensor) -> tuple[int, int]:
    """How many groups of rows of x [B, ..., d] have a row of `parameter` in common, and the rows of each.

    Of [B, d] a sample's rows have one; of [d], and of what is not there, all rows.
    """
    if parameter is None or parameter.dim() == 1:
        return 1, count_rows(x)
    return x.shape[0], math.prod(x.shape[1:-1])


def beside(parameter: Tensor, x: Tensor) -> Tensor:
    """[B, d] as [B, 1, ..., 1, d], which broadcasts over the positions of x [B, ..., d]; [d] as it is."""
    if parameter.dim() == 1:
        return parameter
    return parameter.reshape(parameter.shape[0], *(1,) * (x.dim() - 2), parameter.shape[-1])
