"""LayerNorm: y = n · w + b with n = (x − mean(x)) · r, r = (variance(x) + ε)^(−½), over the last dimension.

Tangent:  ẏ = ṅ · w with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with g = dy · w:  dx = r · (g − mean(g) − n · mean(g n)),  dw = Σ_rows dy · n,  db = Σ_rows dy.
Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); as `torch.nn.functional.layer_norm`.
Kernels: csrc/ops/layer_norm.h, csrc/cpu/layer_norm.cpp, csrc/cuda/layer_norm.cu,
backends/triton_kernels/layer_norm.py. They serve layer_norm_modulate too, as w and b are a scale and a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends import cpu, cuda, triton_launch
from imf_kernels.backends.layout import as_floats, contiguous_like, count_rows, groups_of, in_rows, sums
from imf_kernels.backends.operators import Operation
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, pack, unpack
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def normalize(x: Tensor, x_dot: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Returns the reference n and ṅ, in at least float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    centered = x - x.mean(-1, keepdim=True)
    r = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centered * r
    if x_dot is None:
        return n, None
    with torch.no_grad():
        t, r, x_dot = last_rows(n, x_dot), last_rows(r, x_dot), x_dot.to(exact)
        x_dot = x_dot - x_dot.mean(-1, keepdim=True)
        return n, r * (x_dot - t * (t * x_dot).mean(-1, keepdim=True))


def _reference(
    x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = dtype or x.dtype
    n, n_dot = normalize(x, x_dot, eps)
    w = n.new_ones(()) if weight is None else weight.to(n.dtype)
    y = (n * w if bias is None else n * w + bias.to(n.dtype)).to(dtype)
    with torch.no_grad():
        return y, None if n_dot is None else (n_dot * w).to(dtype)


def _check_shape(x: Tensor, normalized_shape: Sequence[int]) -> None:
    check.is_tensor("layer_norm", x=x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x must have at least one dimension, got a scalar")
    if not isinstance(normalized_shape, (list, tuple)) or [*normalized_shape] != [*x.shape[-1:]]:
        raise ValueError(
            f"layer_norm: normalized_shape must be {list(x.shape[-1:])}, the last dimension of x of shape "
            f"{list(x.shape)}, got {normalized_shape!r}; flatten x to normalise over several dimensions"
        )


def _check(
    x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.single_row_is_complete("layer_norm", x=(x, x_dot))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check.is_weight("layer_norm", **{name: parameter})
            check.has_shape("layer_norm", name, parameter, x.shape[-1:], x=x)
            check.same_device("layer_norm", x, **{name: parameter})
    check.last_contiguous("layer_norm", x=x, x_dot=x_dot)
    check.number("layer_norm", 0.0, eps=eps)
    return check.with_result("layer_norm", x, dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: _C.layer_norm, x: Tensor, x_dot: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, eps: float, dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x, y, y_dot = in_rows(x), contiguous_like(x, dtype), None
        statistics = x.new_empty(3 * count_rows(x), dtype=torch.float32)
        if x_dot is not None:
            x_dot, y_dot = in_rows(x_dot), contiguous_like(x_dot, dtype)
            no_gradient(ctx, y_dot)
        w, one = (None, 1.0) if weight is None else (as_floats(weight), 0.0)
        b = None if bias is None else as_floats(bias)
        kernels.forward(x, x_dot, w, None, b, None, y, y_dot, statistics, one, eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.kernels, ctx.one = kernels, one
        return y, y_dot

    @staticmethod
    @check.backward_of("layer_norm")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        dx, (dscale, dshift) = backward(ctx.kernels, x, dy, weight, statistics, ctx.one)
        dweight = None if weight is None else dscale[0].to(weight.dtype)
        dbias = None if bias is None else dshift[0].to(bias.dtype)
        return None, dx, None, dweight, dbias, None, None


def backward(
    kernels: _C.layer_norm, x: Tensor, dy: Tensor, scale: Tensor | None, statistics: Tensor, one: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the gradients of x, and of scale and shift, [groups, d] in fp32, one per sample if [B, d]."""
    dx = contiguous_like(x)
    partial, total = sums(kernels, x, *groups_of(scale, x), 2, x.shape[-1])
    s = None if scale is None else as_floats(scale)
    kernels.backward(x, in_rows(dy), s, statistics, dx, partial, total, one)
    return dx, (total[:, 0], total[:, 1])


_OPERATION = Operation(
    "layer_norm",
    _LayerNorm,
    _reference,
    _check,
    (
        cpu.backend("layer_norm"),
        cuda.backend("layer_norm", widest=cuda.WIDEST),
        triton_launch.backend("layer_norm", widest=triton_launch.WIDEST),
    ),
    lay_out=in_rows,
)


@takes_dual_tensors
def layer_norm(
    x: TensorOrDual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TensorOrDual:
    """Computes (x − mean(x)) · (variance(x) + eps)^(−½) · weight + bias, with its tangent.

    Args:
        x: [..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16),
            the last dimension contiguous.
        normalized_shape: [d], as in `torch.nn.functional.layer_norm`, but for the last dimension only.
        weight, bias: [d], of any floating-point type; 1 and 0 where they are not given.
        eps: added to the variance.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, with full accuracy for values with
        an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    primal, tangent = unpack(x)
    _check_shape(primal, normalized_shape)
    return pack(*_OPERATION(backend, primal, tangent, weight, bias, eps, dtype), x)
