"""GELU: y = x · s(x), element by element, with s the normal distribution Φ(x) = (1 + erf(x / √2)) / 2 or, as
an approximation of it, s(x) = (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2.

Tangent:  ẏ = (s + x s′) ẋ, of the former with s′ = e^(−x²/2) / √(2π).
Backward: dx = (s + x s′) dy.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); as `torch.nn.functional.gelu`.
Kernels: csrc/cpu/gelu.cpp, csrc/cuda/gelu.cu, imf_kernels/_triton/gelu.py.
"""

from __future__ import annotations

import math
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


def _gate(x: Tensor, by_tanh: bool) -> tuple[Tensor, Tensor]:
    """s and s′."""
    if not by_tanh:
        s = (1 + torch.erf(x * math.sqrt(0.5))) / 2
        return s, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    tanh = torch.tanh(root * (x + 0.044715 * x**3))
    return (1 + tanh) / 2, (1 - tanh * tanh) / 2 * root * (1 + 3 * 0.044715 * x * x)


def _reference(x: Tensor, x_dot: Tensor | None, by_tanh: bool) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    s, s_slope = _gate(x, by_tanh)
    y = (x * s).to(dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        x, s, s_slope = tail(x, x_dot), tail(s, x_dot), tail(s_slope, x_dot)
        return y, ((s + x * s_slope) * x_dot.to(exact)).to(dtype)


def _check(x: Tensor | Dual, approximate: str) -> None:
    check.is_tensor_or_dual("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, x_dot: Tensor | None, by_tanh: bool
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        y, y_dot = torch.empty_like(x), None
        if x_dot is not None:
            x_dot = x_dot.contiguous()
            y_dot = torch.empty_like(x_dot)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, y, y_dot, by_tanh)
        ctx.save_for_backward(x)
        ctx.kernels, ctx.by_tanh = kernels, by_tanh
        return y, y_dot

    @staticmethod
    @check.backward_of("gelu")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        ctx.kernels.backward(x, dy.contiguous(), dx, ctx.by_tanh)
        return None, dx, None, None


class _Compiled:
    """The kernels of csrc: `call` runs them, on the CPU or on a GPU."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def forward(
        self, x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None, by_tanh: bool
    ) -> None:
        self._call(
            *("gelu_forward", x, DTYPES[x.dtype], pointer(x), pointer(x_dot), pointer(y), pointer(y_dot)),
            *(x.numel(), 0 if x_dot is None else x_dot.numel(), by_tanh),
        )

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor, by_tanh: bool) -> None:
        self._call(
            *("gelu_backward", x, DTYPES[x.dtype], pointer(x), pointer(dy), pointer(dx), x.numel(), by_tanh)
        )


_OPERATION = Operation(
    "gelu",
    _GELU,
    "(Tensor x, Tensor? x_dot, bool by_tanh)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot, bool by_tanh) -> ()",
        "backward": "(Tensor x, Tensor dy, Tensor(a!) dx, bool by_tanh) -> ()",
    },
    contiguous=True,
)
_BACKENDS = (
    _OPERATION.backend("cpu", _Compiled(cpu.call), cpu.unavailable),
    _OPERATION.backend("cuda", _Compiled(cuda.call), cuda.unavailable, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("gelu"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def gelu(x: TensorOrDual, *, approximate: str = "none", backend: str | None = None) -> TensorOrDual:
    """x · Φ(x), Φ the normal distribution, with its tangent.

    Args:
        x: any shape and strides, float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`:
            not float16).
        approximate: "none", or "tanh" for x · (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        As x in shape and dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, approximate)
    primal, tangent = unpack(x)
    return pack(*choose("gelu", _BACKENDS, backend, primal).run(primal, tangent, approximate == "tanh"), x)
