"""LayerNorm: y = n · w + b with n = (x − mean(x)) · r, r = (variance(x) + ε)^(−½), over the last dimension.

Tangent:  ẏ = ṅ · w with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with g = dy · w:  dx = r · (g − mean(g) − n · mean(g n)),  dw = Σ_rows dy · n,  db = Σ_rows dy.
Pair:     with h = dẏ · w and ṙ = −r² · mean(n ẋ):  dẋ = r · (h − mean(h) − n · mean(h n)), and dx is the
          derivative of this line along ẋ, ẇ and dy (the duals (x, ẋ), (w, ẇ) and (dẏ, dy) in dx's formula);
          dw = Σ_rows dy · n + dẏ · ṅ,  db = Σ_rows dy,  dẇ = Σ_rows dẏ · n,  dḃ = Σ_rows dẏ.
Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); as `torch.nn.functional.layer_norm`.
Kernels: csrc/ops/layer_norm.h, csrc/cpu/layer_norm.cpp, backends/triton_kernels/layer_norm.py. They
serve layer_norm_modulate too, as w and b are a scale and a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import (
    as_floats,
    contiguous_like,
    count_rows,
    groups_of,
    in_dtype,
    in_rows,
    or_zeros,
    sums,
)
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, primal, stored, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def normalize(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Returns the reference n and ṅ, in at least float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    centered = x - x.mean(-1, keepdim=True)
    r = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centered * r
    if x_dot is None:
        return n, None
    with tangent_graph(differentiable):
        t, r, x_dot = last_rows(n, x_dot), last_rows(r, x_dot), x_dot.to(exact)
        x_dot = x_dot - x_dot.mean(-1, keepdim=True)
        return n, r * (x_dot - t * (t * x_dot).mean(-1, keepdim=True))


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, bias: Tensor | None, bias_dot: None,
    weight: Tensor | None, weight_dot: None, one: float, eps: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = dtype or x.dtype
    n, n_dot = normalize(differentiable, x, x_dot, eps)
    w = n.new_ones(()) if weight is None else weight.to(n.dtype)
    y = (n * w if bias is None else n * w + bias.to(n.dtype)).to(dtype)
    with tangent_graph(differentiable):
        return y, None if n_dot is None else (n_dot * w).to(dtype)


def _check_shape(x: Tensor, normalized_shape: Sequence[int]) -> None:
    is_list = isinstance(normalized_shape, (tuple, list)) and len(normalized_shape) == 1
    if is_list and isinstance(x, Tensor) and x.dim() and normalized_shape[0] == x.shape[-1]:
        return
    check.is_tensor("layer_norm", x=x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x must have at least one dimension, got a scalar")
    raise ValueError(
        f"layer_norm: normalized_shape must be {list(x.shape[-1:])}, the last dimension of x of shape "
        f"{list(x.shape)}, got {normalized_shape!r}; flatten x to normalise over several dimensions"
    )


def _check(
    x: Tensor, x_dot: Tensor | None, bias: Tensor | None, bias_dot: None, weight: Tensor | None,
    weight_dot: None, one: float, eps: float, dtype: torch.dtype | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor("layer_norm", x=x)
    check.single_row_is_complete("layer_norm", x=(x, x_dot))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check.is_weight("layer_norm", **{name: parameter})
            check.has_shape("layer_norm", name, parameter, x.shape[-1:], x=x)
            check.same_device("layer_norm", x, **{name: parameter})
    check.last_contiguous("layer_norm", x=x, x_dot=x_dot)
    check.number("layer_norm", 0.0, eps=eps)
    return check.with_result("layer_norm", x, dtype)


def forward(
    ctx: Any, kernels: _C.layer_norm, x: Tensor, x_dot: Tensor | None, shift: Tensor | None,
    shift_dot: Tensor | None, scale: Tensor | None, scale_dot: Tensor | None, one: float, eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Computes n · (one + scale) + shift, both [d] or [B, d], 0 if missing; of layer_norm_modulate too."""
    x, y, y_dot = in_rows(x), contiguous_like(x, dtype), None
    statistics = x.new_empty(3 * count_rows(x), dtype=torch.float32)
    s_dot = b_dot = None
    if x_dot is not None:
        x_dot = in_rows(x_dot)
        y_dot = contiguous_like(x_dot, dtype)
    if scale_dot is not None or shift_dot is not None:
        s_dot, b_dot = (None if p is None else as_floats(p) for p in (scale_dot, shift_dot))
        if y_dot is None:
            y_dot = contiguous_like(last_rows(x, cast(Tensor, stored(scale_dot, shift_dot))), dtype)
    if y_dot is not None:
        no_gradient(ctx, y_dot)
    s, b = (scale if scale is None else as_floats(scale)), (shift if shift is None else as_floats(shift))
    kernels.forward(x, x_dot, s, s_dot, b, b_dot, y, y_dot, statistics, one, eps)
    ctx.save_for_backward(x, shift, scale, statistics)
    ctx.kernels, ctx.one = kernels, one
    return y, y_dot


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale, statistics = ctx.saved_tensors
    kernels: _C.layer_norm = ctx.kernels
    dx = contiguous_like(x)
    (groups, length), width = groups_of(scale, x), x.shape[-1]
    partial, total = sums(kernels, x, groups, length, width, (groups, 2, width), 2)
    s = None if scale is None else as_floats(scale)
    kernels.backward(x, in_rows(dy), s, statistics, dx, partial, total, ctx.one)
    dscale, dshift = (
        None if p is None else in_dtype(dp.view(p.shape), p.dtype)
        for p, dp in zip((scale, shift), total.unbind(1), strict=True)
    )
    return None, dx, None, dshift, None, dscale, None, None, None, None


def pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    """Returns the gradients of a pair; of layer_norm_modulate too."""
    x, x_dot, shift, shift_dot, scale, scale_dot, one, _, dtype = call.arguments
    moving = stored(x_dot, shift_dot, scale_dot)
    assert moving is not None
    x, statistics = in_rows(x), call.saved[3]
    dy, dy_dot = or_zeros(dy, x, dtype), or_zeros(dy_dot, last_rows(x, moving), dtype)
    x_dot = None if x_dot is None else in_rows(x_dot)
    dx, dx_dot = contiguous_like(x), None if x_dot is None else contiguous_like(x_dot)
    (groups, length), width = groups_of(stored(scale, shift), x), x.shape[-1]
    partial, total = sums(call.kernels, x, groups, length, width, (groups, 4, width), 4)
    s, s_dot = (None if p is None else as_floats(p) for p in (scale, scale_dot))
    call.kernels.pair_backward(*(x, x_dot, dy, dy_dot, s, s_dot, statistics, dx, dx_dot, partial, total, one))
    dscale, dshift, dscale_dot, dshift_dot = (
        None if p is None else in_dtype(last_rows(dp, p) if p.dim() > 1 else dp.view(p.shape), p.dtype)
        for p, dp in zip((scale, shift, scale_dot, shift_dot), total.unbind(1), strict=True)
    )
    return [dx, dx_dot, dshift, dshift_dot, dscale, dscale_dot, None, None, None]


BACKENDS = compiled("layer_norm", reduces=True)
LAYER_NORM = Operation(
    "layer_norm", _reference, _check, BACKENDS, forward, backward, pair_backward, lay_out=in_rows
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
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, with full accuracy for values with
        an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check_shape(primal(x), normalized_shape)
    one = 1.0 if weight is None else 0.0
    return LAYER_NORM(backend, (x,), bias, None, weight, None, one, eps, dtype)
