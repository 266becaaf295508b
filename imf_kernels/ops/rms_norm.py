"""RMSNorm: y = x · r · w with r = (mean(x²) + ε)^(−½) over the last dimension.

Tangent:  ẏ = (ẋ · r + x · ṙ) · w with ṙ = −r³ · mean(x ẋ).
Backward: with g = dy · w and n = x · r:  dx = r · (g − n · mean(g n)),  dw = Σ_rows dy · n.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Kernels: csrc/cpu/rms_norm.cpp; csrc/cuda/rms_norm.cu (for sm_80, sm_90, sm_100; has not run on hardware yet).

This file is the exemplar: every operation's file has these parts in this order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.layout import DTYPES, count_rows, last_contiguous, pointer, rows_of
from imf_kernels.ops import check


def _reference(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    exact = torch.promote_types(x.dtype, torch.float32)
    x, w = x.to(exact), weight.to(exact)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (x * r * w).to(dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        x, r, x_dot = tail(x, x_dot), tail(r, x_dot), x_dot.to(exact)
        r_dot = -(r**3) * (x * x_dot).mean(-1, keepdim=True)
        return y, ((x_dot * r + x * r_dot) * w).to(dtype)


def _check(x: Tensor | Dual, weight: Tensor, dtype: torch.dtype | None) -> None:
    check.is_tensor_or_dual("rms_norm", x=x)
    check.is_tensor("rms_norm", weight=weight)
    check.single_row_whole("rms_norm", x=x)
    x, x_dot = unpack(x)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    check.has_shape("rms_norm", "weight", weight, x.shape[-1:], f" for x of shape {list(x.shape)}")
    check.same_device("rms_norm", x, weight=weight)
    check.last_contiguous("rms_norm", x=x, x_dot=x_dot)
    if dtype not in (None, x.dtype) and not (x.dtype == torch.float32 and dtype == torch.bfloat16):
        raise TypeError(
            f"rms_norm: dtype must be that of x, or bfloat16 for x of float32; got {dtype} for {x.dtype}"
        )


class _RMSNormCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        width = x.shape[-1]
        x_rows, x_stride = rows_of(x)
        w = weight.float().contiguous()
        y = x.new_empty(x.shape, dtype=dtype)
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        y_dot, t_rows, t_stride = None, None, 0
        if x_dot is not None:
            t_rows, t_stride = rows_of(x_dot)
            y_dot = x.new_empty(x_dot.shape, dtype=dtype)
            no_gradient(ctx, y_dot)
        _C.rms_norm_forward(
            *(DTYPES[x.dtype], DTYPES[dtype], pointer(x_rows), pointer(t_rows)),
            *(pointer(w), pointer(y), pointer(y_dot), pointer(rstd)),
            *(count_rows(x), count_rows(t_rows), width, x_stride, t_stride),
            eps,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, rstd)
        return y, y_dot

    @staticmethod
    @check.backward_of("rms_norm")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        width, threads = x.shape[-1], torch.get_num_threads()
        x_rows, x_stride = rows_of(x)
        dy_rows, dy_stride = rows_of(last_contiguous(dy))
        w = weight.float().contiguous()
        dx = x.new_empty(x.shape)
        dweight = x.new_empty((threads, width), dtype=torch.float32)
        _C.rms_norm_backward(
            *(DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(w), pointer(rstd), pointer(dx), pointer(dweight)),
            *(rstd.numel(), width, x_stride, dy_stride, threads),
        )
        return dx, None, dweight[0].to(weight.dtype), None, None


class _RMSNormCUDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        x_rows, x_stride = rows_of(x)
        w = weight.float().contiguous()
        y = x.new_empty(x.shape, dtype=dtype)
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        y_dot, t_rows, t_stride = None, None, 0
        if x_dot is not None:
            t_rows, t_stride = rows_of(x_dot)
            y_dot = x.new_empty(x_dot.shape, dtype=dtype)
            no_gradient(ctx, y_dot)
        _C.rms_norm_forward_cuda(
            *(DTYPES[x.dtype], DTYPES[dtype], pointer(x_rows), pointer(t_rows)),
            *(pointer(w), pointer(y), pointer(y_dot), pointer(rstd)),
            *(count_rows(x), count_rows(t_rows), x.shape[-1], x_stride, t_stride),
            eps,
            *cuda.launch(x),
        )
        ctx.save_for_backward(x, weight, rstd)
        return y, y_dot

    @staticmethod
    @check.backward_of("rms_norm")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        x_rows, x_stride = rows_of(x)
        dy_rows, dy_stride = rows_of(last_contiguous(dy))
        w = weight.float().contiguous()
        dx = x.new_empty(x.shape)
        dweight = x.new_zeros(x.shape[-1], dtype=torch.float32)
        _C.rms_norm_backward_cuda(
            *(DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(w), pointer(rstd), pointer(dx), pointer(dweight)),
            *(count_rows(x), x.shape[-1], x_stride, dy_stride, *cuda.launch(x)),
        )
        return dx, None, dweight.to(weight.dtype), None, None


def _cuda_unavailable(tensors: Any) -> str | None:
    if reason := cuda.unavailable(tensors):
        return reason
    width = tensors[0].shape[-1]  # the backward keeps a row of fp32 sums in shared memory
    return None if width <= 12288 else f"it takes rows of at most 12288, got {width}"


_BACKENDS = (
    Backend("cpu", _RMSNormCPU.apply, cpu.unavailable),
    Backend("cuda", _RMSNormCUDA.apply, _cuda_unavailable, default=False),
    Backend("reference", _reference, always),
)


def rms_norm(
    x: TensorOrDual,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TensorOrDual:
    """x · (mean(x²) + eps)^(−½) · weight over the last dimension, with its tangent.

    Args:
        x: [..., d], float32 or bfloat16 (`reference`: any floating-point type), the last dimension
            contiguous.
        weight: [d], of any floating-point type.
        eps: added to the mean square.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 operands.
        backend: "cpu", "cuda" (on request only), "reference", or the best one that can run.

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, the result rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, weight, dtype)
    check.number("rms_norm", 0.0, eps=eps)
    primal, tangent = unpack(x)
    run = choose("rms_norm", _BACKENDS, backend, primal).run
    return pack(*run(primal, tangent, weight, eps, dtype or primal.dtype), x)
