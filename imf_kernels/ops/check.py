"""Checks of arguments; errors name the operation, the argument, the requirement and the value."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from imf_kernels.dual import Dual, NoTangent

# Dtypes of branches of a residual stream in float32, and of operands made from it.
HALVES = (torch.bfloat16, torch.float16)


def is_weight(operation: str, **arguments: Any) -> None:
    """Checks that arguments are plain tensors, no `Dual`s: weights carry no tangent."""
    for name, x in arguments.items():
        if isinstance(x, Dual):
            raise NoTangent(f"{operation}: {name} carries no tangent; pass a tensor, got a Dual")
        if not isinstance(x, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{operation}: {name} must be of a floating-point type, got {x.dtype}")


def is_tensor(operation: str, **arguments: Any) -> None:
    """Checks the primals of arguments that are tensors or `Dual`s."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor or a Dual, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{operation}: {name} must be of a floating-point type, got {x.dtype}")


def has_shape(
    operation: str, name: str, x: Tensor, wanted: tuple[int, ...], why: str = "", /, **shaped: Tensor
) -> None:
    """Checks a shape; the error says why it is wanted: in words, or as that of another tensor."""
    if x.shape != wanted:
        for other, tensor in shaped.items():
            why += f" for {other} of shape {list(tensor.shape)}"
        raise ValueError(f"{operation}: {name} must be {list(wanted)}{why}, got {list(x.shape)}")


def same_device(operation: str, like: Tensor, **arguments: Tensor) -> None:
    for name, x in arguments.items():
        if x.device != like.device:
            raise ValueError(f"{operation}: {name} must be on {like.device} like the input, got {x.device}")


def same_dtype(operation: str, like: Tensor, **arguments: Tensor) -> None:
    for name, x in arguments.items():
        if x.dtype != like.dtype:
            raise TypeError(f"{operation}: {name} must be {like.dtype} like the input, got {x.dtype}")


def of_stream(operation: str, x: Tensor, **arguments: Tensor) -> None:
    """Checks that arguments are of x's dtype, or of 16 bits for a stream x of float32."""
    for name, branch in arguments.items():
        if branch.dtype != x.dtype and not (x.dtype == torch.float32 and branch.dtype in HALVES):
            raise TypeError(
                f"{operation}: {name} must be of x's dtype, or bfloat16 or float16 for x of float32; "
                f"got {branch.dtype} for {x.dtype}"
            )


def with_result(operation: str, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Returns tensors for backends to inspect: the input and, for another dtype, an empty result."""
    if dtype in (None, x.dtype):
        return (x,)
    if not (x.dtype == torch.float32 and dtype in HALVES):
        raise TypeError(
            f"{operation}: dtype must be that of x, or bfloat16 or float16 for x of float32; "
            f"got {dtype} for {x.dtype}"
        )
    return x, x.new_empty(0, dtype=dtype)


def last_contiguous(operation: str, **arguments: Tensor | None) -> None:
    for name, x in arguments.items():
        if x is None or x.is_contiguous():
            continue
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{operation}: the last dimension of {name} must be contiguous, got {list(x.shape)} with "
                f"strides {list(x.stride())}; call .contiguous()"
            )


def single_row_is_complete(operation: str, **arguments: tuple[Tensor, Tensor | None]) -> None:
    """Checks that tangents of vectors are complete: they have no batch of which samples could be left out."""
    for name, (x, x_dot) in arguments.items():
        if x_dot is not None and x.dim() == 1 and x_dot.shape != x.shape:
            raise ValueError(
                f"{operation}: {name} is a single row, so its tangent must be complete, {list(x.shape)}; "
                f"got {list(x_dot.shape)}"
            )


def number(operation: str, least: float, **arguments: Any) -> None:
    """Checks that arguments are Python numbers, finite and not below `least`."""
    for name, x in arguments.items():
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{operation}: {name} must be a number, got {type(x).__name__}")
        if not (abs(x) <= sys.float_info.max and x >= least):
            bound = "" if least == -math.inf else f" and at least {least:g}"
            raise ValueError(f"{operation}: {name} must be finite{bound}, got {x}")
