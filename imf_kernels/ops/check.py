"""Checks of arguments. Each raises an error that names the operation, the argument, what was wanted and
what came."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imf_kernels.dual import Dual


def is_tensor(operation: str, **arguments: Any) -> None:
    """A plain tensor, where a `Dual` has no meaning: weights carry no tangent."""
    for name, x in arguments.items():
        if isinstance(x, Dual):
            raise TypeError(f"{operation}: {name} carries no tangent; pass a tensor, got a Dual")
        if not isinstance(x, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(x).__name__}")


def is_tensor_or_dual(operation: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, (Tensor, Dual)):
            raise TypeError(f"{operation}: {name} must be a tensor or a Dual, got {type(x).__name__}")
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise TypeError(f"{operation}: {name} must be of a floating-point type, got {x.dtype}")


def has_shape(operation: str, name: str, x: Tensor, wanted: tuple[int, ...], why: str = "") -> None:
    if tuple(x.shape) != tuple(wanted):
        raise ValueError(f"{operation}: {name} must be {list(wanted)}{why}, got {list(x.shape)}")


def same_device(operation: str, like: Tensor, **arguments: Tensor) -> None:
    for name, x in arguments.items():
        if x.device != like.device:
            raise ValueError(f"{operation}: {name} must be on {like.device} like the input, got {x.device}")


def same_dtype(operation: str, like: Tensor, **arguments: Tensor) -> None:
    for name, x in arguments.items():
        if x.dtype != like.dtype:
            raise TypeError(f"{operation}: {name} must be {like.dtype} like the input, got {x.dtype}")


def last_contiguous(operation: str, **arguments: Tensor | None) -> None:
    for name, x in arguments.items():
        if x is not None and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{operation}: the last dimension of {name} must be contiguous, got {list(x.shape)} with "
                f"strides {list(x.stride())}; call .contiguous()"
            )
