"""LayerNorm modulated by its sample's condition: y = n · (1 + s) + b with n = (x − mean(x)) · r,
r = (variance(x) + ε)^(−½), over the last dimension, and one row of scale s and shift b per sample.

Tangent:  ẏ = ṅ · (1 + s) + n · ṡ + ḃ with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with g = dy · (1 + s):  dx = r · (g − mean(g) − n · mean(g n)),  ds = Σ dy · n,  db = Σ dy over the
positions of a sample.
Source: adaLN (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv 2212.09748).
Kernels: those of layer_norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends import cpu, cuda, triton_launch
from imf_kernels.backends.layout import as_floats, contiguous_like, count_rows, in_rows, per_position
from imf_kernels.backends.operators import Operation
from imf_kernels.dual import Dual, align, last_rows, no_gradient, pack, stored, unpack
from imf_kernels.ops import check
from imf_kernels.ops.layer_norm import backward, normalize
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    x: Tensor, x_dot: Tensor | None, shift: Tensor, shift_dot: Tensor | None,
    scale: Tensor, scale_dot: Tensor | None, eps: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = dtype or x.dtype
    n, n_dot = normalize(x, x_dot, eps)
    gain = 1 + per_position(scale.to(n.dtype), x)
    y = (n * gain + per_position(shift.to(n.dtype), x)).to(dtype)
    parts = []
    with torch.no_grad():
        if n_dot is not None:
            parts.append(n_dot * last_rows(gain, n_dot))
        if scale_dot is not None:
            parts.append(last_rows(n, scale_dot) * per_position(scale_dot.to(n.dtype), x))
        if shift_dot is not None:
            parts.append(per_position(shift_dot.to(n.dtype), x).expand(-1, *x.shape[1:]))
        return y, sum(parts[1:], parts[0]).to(dtype) if parts else None


def _check(
    x: Tensor, x_dot: Tensor | None, shift: Tensor, shift_dot: Tensor | None,
    scale: Tensor, scale_dot: Tensor | None, eps: float, dtype: torch.dtype | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor("layer_norm_modulate", x=x, shift=shift, scale=scale)
    if x.dim() < 2:
        raise ValueError(f"layer_norm_modulate: x must be [B, ..., d], got {list(x.shape)}")
    wanted = x.shape[0], x.shape[-1]
    for name, parameter in (("shift", shift), ("scale", scale)):
        check.has_shape("layer_norm_modulate", name, parameter, wanted, ", a row per sample,", x=x)
        check.same_device("layer_norm_modulate", x, **{name: parameter})
    check.last_contiguous("layer_norm_modulate", x=x, x_dot=x_dot)
    check.number("layer_norm_modulate", 0.0, eps=eps)
    return *check.with_result("layer_norm_modulate", x, dtype), shift, scale


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: _C.layer_norm, x: Tensor, x_dot: Tensor | None,
        shift: Tensor, shift_dot: Tensor | None, scale: Tensor, scale_dot: Tensor | None, eps: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x, y, y_dot = in_rows(x), contiguous_like(x, dtype), None
        statistics = x.new_empty(3 * count_rows(x), dtype=torch.float32)
        moving = stored(x_dot, shift_dot, scale_dot)
        if moving is not None:
            y_dot = contiguous_like(last_rows(x, moving), dtype)
            no_gradient(ctx, y_dot)
            x_dot = None if x_dot is None else in_rows(x_dot)
        s_dot, b_dot = (None if p is None else as_floats(p) for p in (scale_dot, shift_dot))
        s, b = as_floats(scale), as_floats(shift)
        kernels.forward(x, x_dot, s, s_dot, b, b_dot, y, y_dot, statistics, 1.0, eps)
        ctx.save_for_backward(x, shift, scale, statistics)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("layer_norm_modulate")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shift, scale, statistics = ctx.saved_tensors
        dx, (dscale, dshift) = backward(ctx.kernels, x, dy, scale, statistics, 1.0)
        return None, dx, None, dshift.to(shift.dtype), None, dscale.to(scale.dtype), None, None, None


_OPERATION = Operation(
    "layer_norm_modulate",
    _LayerNormModulate,
    _reference,
    _check,
    (
        cpu.backend("layer_norm"),
        cuda.backend("layer_norm", widest=cuda.WIDEST),
        triton_launch.backend("layer_norm", widest=triton_launch.WIDEST),
    ),
    kernels="layer_norm",
    lay_out=in_rows,
)


@overload
def layer_norm_modulate(  # type: ignore[overload-overlap]
    x: Tensor, shift: Tensor, scale: Tensor,
    eps: float = ..., *, dtype: torch.dtype | None = ..., backend: str | None = ...
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm_modulate(
    x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual,
    eps: float = ..., *, dtype: torch.dtype | None = ..., backend: str | None = ...
) -> Dual: ...  # fmt: skip
@takes_dual_tensors
def layer_norm_modulate(
    x: Tensor | Dual,
    shift: Tensor | Dual,
    scale: Tensor | Dual,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """Computes LayerNorm(x) · (1 + scale) + shift over the last dimension, with its tangent.

    The norm is (x − mean(x)) · (variance(x) + eps)^(−½). DiT writes `modulate(norm(x), shift, scale)`.

    Args:
        x: [B, ..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not
            float16), the last dimension contiguous.
        shift, scale: [B, d], one row per sample, each of any of these types.
        eps: added to the variance.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [B, ..., d]; a `Dual` if any argument is one. Statistics are computed in fp32, with full accuracy for
        values with an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    (x_primal, x_dot), (b_primal, b_dot), (s_primal, s_dot) = unpack(x), unpack(shift), unpack(scale)
    x_dot, b_dot, s_dot = align(x_dot, b_dot, s_dot)
    results = _OPERATION(backend, x_primal, x_dot, b_primal, b_dot, s_primal, s_dot, eps, dtype)
    return pack(*results, x, shift, scale)
