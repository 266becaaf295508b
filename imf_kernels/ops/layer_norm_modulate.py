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

from imf_kernels.backends.layout import in_rows, per_position
from imf_kernels.backends.operators import Operation
from imf_kernels.dual import Dual, last_rows, tangent_graph
from imf_kernels.ops import check
from imf_kernels.ops.layer_norm import BACKENDS, backward, forward, normalize, pair_backward
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

_NAME = "layer_norm_modulate"


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, shift: Tensor, shift_dot: Tensor | None,
    scale: Tensor, scale_dot: Tensor | None, one: float, eps: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = dtype or x.dtype
    n, n_dot = normalize(differentiable, x, x_dot, eps)
    gain = one + per_position(scale.to(n.dtype), x)
    y = (n * gain + per_position(shift.to(n.dtype), x)).to(dtype)
    parts = []
    with tangent_graph(differentiable):
        if n_dot is not None:
            parts.append(n_dot * last_rows(gain, n_dot))
        if scale_dot is not None:
            parts.append(last_rows(n, scale_dot) * per_position(scale_dot.to(n.dtype), x))
        if shift_dot is not None:
            parts.append(per_position(shift_dot.to(n.dtype), x).expand(-1, *x.shape[1:]))
        return y, sum(parts[1:], parts[0]).to(dtype) if parts else None


def _check(
    x: Tensor, x_dot: Tensor | None, shift: Tensor, shift_dot: Tensor | None,
    scale: Tensor, scale_dot: Tensor | None, one: float, eps: float, dtype: torch.dtype | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor(_NAME, x=x, shift=shift, scale=scale)
    if x.dim() < 2:
        raise ValueError(f"{_NAME}: x must be [B, ..., d], got {list(x.shape)}")
    wanted = x.shape[0], x.shape[-1]
    for name, parameter in (("shift", shift), ("scale", scale)):
        check.has_shape(_NAME, name, parameter, wanted, ", a row per sample,", x=x)
        check.same_device(_NAME, x, **{name: parameter})
    check.last_contiguous(_NAME, x=x, x_dot=x_dot)
    check.number(_NAME, 0.0, eps=eps)
    return *check.with_result(_NAME, x, dtype), shift, scale


LAYER_NORM_MODULATE = Operation(
    *(_NAME, _reference, _check, BACKENDS, forward, backward, pair_backward),
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
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        [B, ..., d]; a `Dual` if any argument is one. Statistics are computed in fp32, with full accuracy for
        values with an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return LAYER_NORM_MODULATE(backend, (x, shift, scale), 1.0, eps, dtype)
