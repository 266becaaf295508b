"""Memory layouts: those that kernels take, and those of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def in_rows(x: Tensor) -> Tensor:
    """Returns `x` if its leading dimensions collapse into contiguous rows at one stride, else a copy."""
    if x.is_contiguous():
        return x
    if x.dim() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return x.contiguous()
    expected: int | None = None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is not None and step != expected:
            return x.contiguous()
        expected = step * size
    return x


def or_zeros(cotangent: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a cotangent as kernels read it, in rows: zeros for a missing one."""
    return torch.zeros_like(like, dtype=dtype).contiguous() if cotangent is None else in_rows(cotangent)


def last_contiguous(x: Tensor) -> Tensor:
    """Returns `x`, copied if its last dimension is not contiguous (gradients arrive with any strides)."""
    return x if x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x` in a dtype; `Tensor.to` takes 1 µs to find that nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def as_floats(x: Tensor) -> Tensor:
    """Returns a parameter as kernels take it: contiguous, in float32."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty tensor like `x`, of its dtype by default; twice as fast as `new_empty`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def positions_first(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """Returns an empty [batch, heads, length, width] in projections' memory order [B, L, H, D]."""
    shape, strides = (batch, heads, length, width), (length * heads * width, width, heads * width, 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def in_order_of(x: Tensor, batch: int, length: int, width: int) -> Tensor:
    """Returns an empty [batch, H, length, width] in the memory order of x [B, H, L, D], like PyTorch's
    attention.

    Heads are first where x is contiguous, else positions, as in projections.
    """
    if x.is_contiguous():
        return x.new_empty((batch, x.shape[1], length, width))
    return positions_first(x, batch, x.shape[1], length, width)


def gapless_order(x: Tensor, x_dot: Tensor | None) -> list[int] | None:
    """Returns the dimensions of `x` in the order in which it lies in memory without gaps; `None` where it is
    contiguous, or has gaps. Samples come first if only the last ones have a tangent."""
    if x.is_contiguous():
        return None
    outer = int(x_dot is not None and x_dot.shape[0] < x.shape[0])
    order = [*range(outer), *sorted(range(outer, x.dim()), key=x.stride, reverse=True)]
    return order if x.permute(order).is_contiguous() else None


def order_of_channels(x: Tensor) -> torch.memory_format:
    """Returns the memory format in which PyTorch's norms keep x [N, C, ...]: contiguous or channels last."""
    if x.is_contiguous() or x.dim() not in (4, 5) or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    return suggest_memory_format(x)


def in_channel_order(x: Tensor, channels_last: bool) -> Tensor:
    """Returns `x` with channels last in memory if it is an image or a volume and these shall be, else
    contiguous."""
    if not channels_last or x.dim() not in (4, 5):
        return x.contiguous()
    order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=order)


def sums(
    kernels: Any, x: Tensor, groups: int, length: int, width: int, shape: tuple[int, ...], count: int = 1
) -> tuple[Tensor, Tensor]:
    """Allocates `count` sums over the rows of each group, and those of its shares.

    Returns:
        partial, [groups, shares, count, width], and the sums in `shape`: [groups, count, width], without
        dimensions of size 1 where those are left out; float32.
    """
    shares = kernels.shares(groups, length, width, count)
    # PyTorch reads numbers in half the time that it takes for a tuple of them.
    partial = x.new_empty(groups, shares, count, width, dtype=torch.float32)
    return partial, x.new_empty(*shape, dtype=torch.float32)


def without_memory(x: Tensor) -> str | None:
    """Returns why a kernel cannot read `x` at its address; `None` if it can, or will in a traced graph."""
    if torch._C._are_functorch_transforms_active():
        return "one inside a transform of torch.func"
    if x.is_nested:
        return "a nested tensor"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "one that a transform of torch.func has left behind"
    if x.is_neg():
        return "a lazily negated tensor; call .resolve_neg()"
    # A fake tensor must not be asked for its address: PyTorch warns, and will raise.
    if hasattr(x, "fake_mode") or (x.numel() and x.data_ptr() == 0):
        return "a tensor without memory (fake, meta or symbolically zero)"
    return None


def unfit(
    tensors: Sequence[Tensor], device: str, dtypes: Sequence[torch.dtype], devices: str = ""
) -> str | None:
    """Returns why kernels for some dtypes on a type of device, for messages `devices`, cannot take tensors;
    `None` if they can."""
    for x in tensors:
        if x.device.type != device:
            return f"it takes {devices or device.upper()} tensors, got one on {x.device}"
        if x.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, x.dtype))
            return f"it takes {', '.join(others[:-1])} and {others[-1]}, got {last}"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
    return None


def too_wide(x: Tensor, widest: int | None) -> str | None:
    """Returns why kernels that hold a row of up to `widest` elements cannot take `x`; `None` if they can."""
    width = x.shape[-1] if x.dim() else 1
    return None if widest is None or width <= widest else f"it takes rows of at most {widest}, got {width}"


def count_rows(x: Tensor) -> int:
    """Returns the number of rows: the product of all dimensions but the last."""
    return math.prod(x.shape[:-1])


def groups_of(parameter: Tensor | None, x: Tensor) -> tuple[int, int]:
    """Returns the number of groups of rows of x [B, ..., d] that share a row of `parameter`, and the rows of
    each.

    The samples are the groups of [B, d]; all rows are one group of [d], or without a parameter.
    """
    if parameter is None or parameter.dim() == 1:
        return 1, count_rows(x)
    return x.shape[0], math.prod(x.shape[1:-1])


def per_position(parameter: Tensor, x: Tensor) -> Tensor:
    """Returns [B, d] as [B, 1, ..., 1, d], which broadcasts over x [B, ..., d]; [d] unchanged."""
    if parameter.dim() == 1:
        return parameter
    return parameter.reshape(parameter.shape[0], *(1,) * (x.dim() - 2), parameter.shape[-1])
