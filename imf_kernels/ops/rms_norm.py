"""RMSNorm: y = x · r · w with r = (mean(x²) + ε)^(−½) over the last dimension.

Tangent:  ẏ = (ẋ · r + x · ṙ) · w with ṙ = −r³ · mean(x ẋ).
Backward: with g = dy · w and n = x · r:  dx = r · (g − n · mean(g n)),  dw = Σ_rows dy · n.
Pair:     with h = dẏ · w and ṅ = ẋ · r + x · ṙ:  dẋ = r · (h − n · mean(h n)), and dx is the derivative of
          this line along ẋ and g:  dx = ṙ / r · dẋ + r · (g − ṅ · mean(h n) − n · mean(g n + h ṅ));
          dw = Σ_rows dy · n + dẏ · ṅ.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Kernels: csrc/ops/rms_norm.h, csrc/cpu/rms_norm.cpp, backends/triton_kernels/rms_norm.py.

This file is the exemplar: every operation's file has these parts in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import (
    as_floats,
    contiguous_like,
    count_rows,
    in_dtype,
    in_rows,
    or_zeros,
    sums,
)
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype, exact = dtype or x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, w = x.to(exact), weight.to(exact)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (x * r * w).to(dtype)
    if x_dot is None:
        return y, None
    with tangent_graph(differentiable):
        x, r, x_dot = last_rows(x, x_dot), last_rows(r, x_dot), x_dot.to(exact)
        r_dot = -(r**3) * (x * x_dot).mean(-1, keepdim=True)
        return y, ((x_dot * r + x * r_dot) * w).to(dtype)


def _check(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Sequence[Tensor]:
    check.is_tensor("rms_norm", x=x)
    check.is_weight("rms_norm", weight=weight)
    check.single_row_is_complete("rms_norm", x=(x, x_dot))
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    check.has_shape("rms_norm", "weight", weight, x.shape[-1:], x=x)
    check.same_device("rms_norm", x, weight=weight)
    check.last_contiguous("rms_norm", x=x, x_dot=x_dot)
    check.number("rms_norm", 0.0, eps=eps)
    return check.with_result("rms_norm", x, dtype)


def _forward(
    ctx: Any, kernels: _C.rms_norm, x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x, y, y_dot = in_rows(x), contiguous_like(x, dtype), None
    rstd = x.new_empty(count_rows(x), dtype=torch.float32)
    if x_dot is not None:
        x_dot, y_dot = in_rows(x_dot), contiguous_like(x_dot, dtype)
        no_gradient(ctx, y_dot)
    kernels.forward(x, x_dot, as_floats(weight), y, y_dot, rstd, eps)
    ctx.save_for_backward(x, weight, rstd)
    ctx.kernels = kernels
    return y, y_dot


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    kernels: _C.rms_norm = ctx.kernels
    dx = contiguous_like(x)
    partial, dweight = sums(kernels, x, 1, count_rows(x), x.shape[-1], weight.shape)
    kernels.backward(x, in_rows(dy), as_floats(weight), rstd, dx, partial, dweight)
    return None, dx, None, in_dtype(dweight, weight.dtype), None, None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    x, x_dot, weight, _, dtype = call.arguments
    x, x_dot, rstd = in_rows(x), in_rows(x_dot), call.saved[2]
    dx, dx_dot = contiguous_like(x), contiguous_like(x_dot)
    partial, dweight = sums(call.kernels, x, 1, count_rows(x), x.shape[-1], weight.shape)
    cotangents = or_zeros(dy, x, dtype), or_zeros(dy_dot, x_dot, dtype)
    call.kernels.pair_backward(
        *(x, x_dot, *cotangents, as_floats(weight), rstd, dx, dx_dot, partial, dweight)
    )
    return [dx, dx_dot, in_dtype(dweight, weight.dtype), None, None]


_BACKENDS = compiled("rms_norm", reduces=True)
_OPERATION = Operation(
    "rms_norm", _reference, _check, _BACKENDS, _forward, _backward, _pair_backward, lay_out=in_rows
)


@takes_dual_tensors
def rms_norm(
    x: TensorOrDual,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TensorOrDual:
    """Computes x · (mean(x²) + eps)^(−½) · weight over the last dimension, with its tangent.

    Args:
        x: [..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16),
            the last dimension contiguous.
        weight: [d], of any floating-point type.
        eps: added to the mean square.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, the result rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return _OPERATION(backend, (x,), weight, eps, dtype)
