"""SiLU: y = x · s with s = 1 / (1 + e^(−x)), element by element.

Tangent:  ẏ = s (1 + x (1 − s)) ẋ.
Backward: dx = s (1 + x (1 − s)) dy.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); as `torch.nn.functional.silu`.
Kernels: csrc/cpu/silu.cpp, csrc/cuda/silu.cu, imf_kernels/_triton/silu.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, pointer
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


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


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        y, y_dot = torch.empty_like(x), None
        if x_dot is not None:
            x_dot = x_dot.contiguous()
            y_dot = torch.empty_like(x_dot)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, y, y_dot)
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("silu")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        ctx.kernels.backward(x, dy.contiguous(), dx)
        return None, dx, None


class _Compiled:
    """The kernels of csrc: `call` runs them, on the CPU or on a GPU."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def forward(self, x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
        self._call(
            *("silu_forward", x, DTYPES[x.dtype], pointer(x), pointer(x_dot), pointer(y), pointer(y_dot)),
            *(x.numel(), 0 if x_dot is None else x_dot.numel()),
        )

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        self._call("silu_backward", x, DTYPES[x.dtype], pointer(x), pointer(dy), pointer(dx), x.numel())


_OPERATION = Operation(
    "silu",
    _Silu,
    "(Tensor x, Tensor? x_dot)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()",
        "backward": "(Tensor x, Tensor dy, Tensor(a!) dx) -> ()",
    },
    contiguous=True,
)
_BACKENDS = (
    _OPERATION.backend("cpu", _Compiled(cpu.call), cpu.unavailable),
    _OPERATION.backend("cuda", _Compiled(cuda.call), cuda.unavailable, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("silu"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def silu(x: TensorOrDual, *, backend: str | None = None) -> TensorOrDual:
    """x / (1 + e^(−x)), with its tangent.

    Args:
        x: any shape and strides, float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`:
            not float16).
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        As x in shape and dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError: for an argument that is no floating-point tensor.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x)
    primal, tangent = unpack(x)
    return pack(*choose("silu", _BACKENDS, backend, primal).run(primal, tangent), x)
