"""LayerNorm modulated by its sample's condition: y = n · (1 + s) + b with n = (x − mean(x)) · r,
r = (variance(x) + ε)^(−½), over the last dimension, and a row of scale s and shift b a sample.

Tangent:  ẏ = ṅ · (1 + s) + n · ṡ + ḃ with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with g = dy · (1 + s):  dx = r · (g − mean(g) − n · mean(g n)),  ds = Σ dy · n,  db = Σ dy over the
positions of a sample.
Source: the adaLN of DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv
2212.09748).
Kernels: csrc/cpu/layer_norm.cpp, csrc/cuda/layer_norm.cu, imf_kernels/_triton/layer_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import cpu, cuda
from imf_kernels.dispatch import Backend, always, choose, with_result
from imf_kernels.dual import Dual, align, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import beside, contiguous_like, last_contiguous
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.ops.layer_norm import CPU, CUDA, FAKES, KERNELS, normalize
from imf_kernels.ops.rms_norm import triton_unavailable
from imf_kernels.triton_backend import Kernels


def _reference(
    x: Tensor,
    x_dot: Tensor | None,
    shift: Tensor,
    shift_dot: Tensor | None,
    scale: Tensor,
    scale_dot: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    n, n_dot = normalize(x, x_dot, eps)
    gain = 1 + beside(scale.to(n.dtype), x)
    y = (n * gain + beside(shift.to(n.dtype), x)).to(dtype)
    parts = []
    with torch.no_grad():
        if n_dot is not None:
            parts.append(n_dot * tail(gain, n_dot))
        if scale_dot is not None:
            parts.append(tail(n, scale_dot) * beside(scale_dot.to(n.dtype), x))
        if shift_dot is not None:
            parts.append(beside(shift_dot.to(n.dtype), x).expand(-1, *x.shape[1:]))
        return y, sum(parts[1:], parts[0]).to(dtype) if parts else None


def _check(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, dtype: torch.dtype | None) -> None:
    check.is_tensor_or_dual("layer_norm_modulate", x=x, shift=shift, scale=scale)
    x, x_dot = unpack(x)
    if x.dim() < 2:
        raise ValueError(f"layer_norm_modulate: x must be [B, ..., d], got {list(x.shape)}")
    wanted = x.shape[0], x.shape[-1]
    for name, argument in (("shift", shift), ("scale", scale)):
        parameter, _ = unpack(argument)
        check.has_shape("layer_norm_modulate", name, parameter, wanted, ", a row a sample,", x=x)
        check.same_device("layer_norm_modulate", x, **{name: parameter})
    check.last_contiguous("layer_norm_modulate", x=x, x_dot=x_dot)
    check.result_dtype("layer_norm_modulate", x, dtype)


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        x_dot: Tensor | None,
        shift: Tensor,
        shift_dot: Tensor | None,
        scale: Tensor,
        scale_dot: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        y, y_dot = contiguous_like(x, dtype), None
        statistics = x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
        stored = next((t for t in (x_dot, shift_dot, scale_dot) if t is not None), None)
        if stored is not None:
            y_dot = contiguous_like(tail(x, stored), dtype)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, scale, scale_dot, shift, shift_dot, y, y_dot, statistics, 1.0, eps)
        ctx.save_for_backward(x, shift, scale, statistics)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("layer_norm_modulate")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shift, scale, statistics = ctx.saved_tensors
        dx = contiguous_like(x)
        sums = ctx.kernels.backward(x, last_contiguous(dy), scale, statistics, dx, 1.0)
        dscale, dshift = sums[:, 0].to(scale.dtype), sums[:, 1].to(shift.dtype)
        return None, dx, None, dshift, None, dscale, None, None, None


_OPERATION = Operation(
    "layer_norm_modulate",
    _LayerNormModulate,
    "(Tensor x, Tensor? x_dot, Tensor shift, Tensor? shift_dot, Tensor scale, Tensor? scale_dot, float eps, "
    "ScalarType dtype)",
    KERNELS,
    FAKES,
)
_BACKENDS = (
    _OPERATION.backend("cpu", CPU, cpu.unavailable),
    _OPERATION.backend("cuda", CUDA, cuda.unavailable_for_rows, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("layer_norm"), triton_unavailable),
    Backend("reference", _reference, always),
)


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
    """LayerNorm(x) · (1 + scale) + shift over the last dimension, with its tangent.

    The norm is (x − mean(x)) · (variance(x) + eps)^(−½). DiT writes `modulate(norm(x), shift, scale)`.

    Args:
        x: [B, ..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not
            float16), the last dimension contiguous.
        shift, scale: [B, d], a row for all positions of a sample, each of any of these types.
        eps: added to the variance.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [B, ..., d]; a `Dual` if any argument is one. Statistics are computed in fp32, no less exactly of
        values with an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, shift, scale, dtype)
    check.number("layer_norm_modulate", 0.0, eps=eps)
    (x_primal, x_dot), (b_primal, b_dot), (s_primal, s_dot) = unpack(x), unpack(shift), unpack(scale)
    x_dot, b_dot, s_dot = align(x_dot, b_dot, s_dot)
    dtype = dtype or x_primal.dtype
    tensors = (*with_result(x_primal, dtype), b_primal, s_primal)
    run = choose("layer_norm_modulate", _BACKENDS, backend, *tensors).run
    results = run(x_primal, x_dot, b_primal, b_dot, s_primal, s_dot, eps, dtype)
    return pack(*results, x, shift, scale)
