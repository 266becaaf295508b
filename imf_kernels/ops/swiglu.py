"""SwiGLU: y = silu(g) · u for x = [g | u], the two halves of the last dimension.

Tangent:  ẏ = silu'(g) ġ · u + silu(g) · u̇ with silu'(g) = s (1 + g (1 − s)), s = 1 / (1 + e^(−g)).
Backward: dg = dy · u · silu'(g),  du = dy · silu(g).
Source: Shazeer, "GLU Variants Improve Transformer" (2020).
Kernels: csrc/cpu/swiglu.cpp, csrc/cuda/swiglu.cu, imf_kernels/_triton/swiglu.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, contiguous_like, count_rows, last_contiguous, pointer, rows_of
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def _reference(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(exact).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    y = (gate * s * up).to(dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        gate, up, s = tail(gate, x_dot), tail(up, x_dot), tail(s, x_dot)
        gate_dot, up_dot = x_dot.to(exact).chunk(2, dim=-1)
        return y, (s * (1 + gate * (1 - s)) * gate_dot * up + gate * s * up_dot).to(dtype)


def _check(x: Tensor | Dual) -> None:
    check.is_tensor_or_dual("swiglu", x=x)
    check.single_row_whole("swiglu", x=x)
    x, x_dot = unpack(x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            "swiglu: the last dimension of x holds gate and up side by side and must be even, "
            f"got {list(x.shape)}"
        )
    check.last_contiguous("swiglu", x=x, x_dot=x_dot)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
        width = x.shape[-1] // 2
        y, y_dot = x.new_empty((*x.shape[:-1], width)), None
        if x_dot is not None:
            y_dot = x.new_empty((*x_dot.shape[:-1], width))
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, y, y_dot)
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("swiglu")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = contiguous_like(x)
        ctx.kernels.backward(x, last_contiguous(dy), dx)
        return None, dx, None


class _Compiled:
    """The kernels of csrc: `call` runs them, on the CPU or on a GPU."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def forward(self, x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
        (x_rows, x_stride), (t_rows, t_stride) = rows_of(x), rows_of(x_dot)
        self._call(
            *("swiglu_forward", x, DTYPES[x.dtype], pointer(x_rows), pointer(t_rows)),
            *(pointer(y), pointer(y_dot)),
            *(count_rows(x), count_rows(x_dot), y.shape[-1], x_stride, t_stride),
        )

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        (x_rows, x_stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
        self._call(
            *("swiglu_backward", x, DTYPES[x.dtype], pointer(x_rows), pointer(dy_rows), pointer(dx)),
            *(count_rows(x), dy.shape[-1], x_stride, dy_stride),
        )


_OPERATION = Operation(
    "swiglu",
    _Swiglu,
    "(Tensor x, Tensor? x_dot)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()",
        "backward": "(Tensor x, Tensor dy, Tensor(a!) dx) -> ()",
    },
)
_BACKENDS = (
    _OPERATION.backend("cpu", _Compiled(cpu.call), cpu.unavailable),
    _OPERATION.backend("cuda", _Compiled(cuda.call), cuda.unavailable, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("swiglu"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def swiglu(x: TensorOrDual, *, backend: str | None = None) -> TensorOrDual:
    """silu(gate) · up for x = [gate | up], with its tangent.

    Args:
        x: [..., 2d], gate in the first half of the last dimension, up in the second; float32, bfloat16 or
            float16 (`reference`: any floating-point type; `cpu`: not float16), the last dimension contiguous.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [..., d] of x's dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x)
    primal, tangent = unpack(x)
    return pack(*choose("swiglu", _BACKENDS, backend, primal).run(primal, tangent), x)
