"""SiLU: y = x · s with s = 1 / (1 + e^(−x)), element by element.

Tangent:  ẏ = s (1 + x (1 − s)) ẋ.
Backward: dx = s (1 + x (1 − s)) dy.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); as `torch.nn.functional.silu`.
Kernels: csrc/cpu/silu.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.layout import DTYPES, pointer
from imf_kernels.ops import check


def _reference(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    s = torch.sigmoid(x)
    y = (x * s).to(dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        x, s = tail(x, x_dot), tail(s, x_dot)
        return y, (s * (1 + x * (1 - s)) * x_dot.to(exact)).to(dtype)


def _check(x: Tensor | Dual) -> None:
    check.is_tensor_or_dual("silu", x=x)


class _SiluCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        y, y_dot, elements = torch.empty_like(x), None, 0
        if x_dot is not None:
            x_dot = x_dot.contiguous()
            y_dot, elements = torch.empty_like(x_dot), x_dot.numel()
            no_gradient(ctx, y_dot)
        _C.silu_forward(
            *(DTYPES[x.dtype], pointer(x), pointer(x_dot), pointer(y), pointer(y_dot)),
            *(x.numel(), elements, torch.get_num_threads()),
        )
        ctx.save_for_backward(x)
        return y, y_dot

    @staticmethod
    @check.backward_of("silu")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        _C.silu_backward(
            *(DTYPES[x.dtype], pointer(x), pointer(dy), pointer(dx)),
            *(x.numel(), torch.get_num_threads()),
        )
        return dx, None


_BACKENDS = (
    Backend("cpu", _SiluCPU.apply, cpu.unavailable),
    Backend("reference", _reference, always),
)


def silu(x: TensorOrDual, *, backend: str | None = None) -> TensorOrDual:
    """x / (1 + e^(−x)), with its tangent.

    Args:
        x: any shape and strides, float32 or bfloat16 (`reference`: any floating-point type).
        backend: "cpu", "reference", or the best one that can run.

    Returns:
        As x in shape and dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError: for an argument that is no floating-point tensor.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x)
    primal, tangent = unpack(x)
    return pack(*choose("silu", _BACKENDS, backend, primal).run(primal, tangent), x)
