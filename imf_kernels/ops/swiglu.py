"""SwiGLU: y = silu(g) · u for x = [g | u], the two halves of the last dimension.

Tangent:  ẏ = silu'(g) ġ · u + silu(g) · u̇ with silu'(g) = s (1 + g (1 − s)), s = 1 / (1 + e^(−g)).
Backward: dg = dy · u · silu'(g),  du = dy · silu(g).
Pair:     dẋ = [dẏ · u · silu'(g) | dẏ · silu(g)], and dx is the derivative of this line along ġ, u̇ and dy in
          the place of ẋ: dg = (dy · u + dẏ · u̇) · silu'(g) + dẏ · u · silu''(g) ġ,
          du = dy · silu(g) + dẏ · silu'(g) ġ.
Source: Shazeer, "GLU Variants Improve Transformer" (2020).
Kernels: csrc/ops/swiglu.h, csrc/cpu/swiglu.cpp, backends/triton_kernels/swiglu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import contiguous_like, in_rows, or_zeros
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.ops.elementwise import SILU
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(differentiable: bool, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(exact).chunk(2, dim=-1)
    silu = SILU.function(gate)
    y = (silu * up).to(dtype)
    if x_dot is None:
        return y, None
    with tangent_graph(differentiable):
        gate, up, silu = last_rows(gate, x_dot), last_rows(up, x_dot), last_rows(silu, x_dot)
        gate_dot, up_dot = x_dot.to(exact).chunk(2, dim=-1)
        return y, (SILU.derivative(gate) * gate_dot * up + silu * up_dot).to(dtype)


def _check(x: Tensor, x_dot: Tensor | None) -> Sequence[Tensor]:
    check.is_tensor("swiglu", x=x)
    check.single_row_is_complete("swiglu", x=(x, x_dot))
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            "swiglu: the last dimension of x holds gate and up one after the other and must be even, "
            f"got {list(x.shape)}"
        )
    check.last_contiguous("swiglu", x=x, x_dot=x_dot)
    return (x,)


def _forward(ctx: Any, kernels: _C.swiglu, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, width = in_rows(x), x.shape[-1] // 2
    y, y_dot = x.new_empty((*x.shape[:-1], width)), None
    if x_dot is not None:
        x_dot, y_dot = in_rows(x_dot), x.new_empty((*x_dot.shape[:-1], width))
        no_gradient(ctx, y_dot)
    kernels.forward(x, x_dot, y, y_dot)
    ctx.save_for_backward(x)
    ctx.kernels = kernels
    return y, y_dot


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dx = contiguous_like(x)
    ctx.kernels.backward(x, in_rows(dy), dx)
    return None, dx, None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> Sequence[Tensor]:
    x, x_dot = (in_rows(t) for t in call.arguments)
    dx, dx_dot = contiguous_like(x), contiguous_like(x_dot)
    half = x.shape[-1] // 2
    cotangents = or_zeros(dy, x[..., :half]), or_zeros(dy_dot, x_dot[..., :half])
    call.kernels.pair_backward(x, x_dot, *cotangents, dx, dx_dot)
    return dx, dx_dot


_BACKENDS = compiled("swiglu")
SWIGLU = Operation(
    "swiglu", _reference, _check, _BACKENDS, _forward, _backward, _pair_backward, lay_out=in_rows
)


@takes_dual_tensors
def swiglu(x: TensorOrDual, *, backend: str | None = None) -> TensorOrDual:
    """Computes silu(gate) · up for x = [gate | up], with its tangent.

    Args:
        x: [..., 2d], gate in the first half of the last dimension, up in the second; float32, bfloat16 or
            float16 (`reference`: any floating-point type; `cpu`: not float16), the last dimension contiguous.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        [..., d] of x's dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return SWIGLU(backend, (x,))
