"""RMSNorm: y = x · r · w with r = (mean(x²) + ε)^(−½) over the last dimension.

Tangent:  ẏ = (ẋ · r + x · ṙ) · w with ṙ = −r³ · mean(x ẋ).
Backward: with g = dy · w and n = x · r:  dx = r · (g − n · mean(g n)),  dw = Σ_rows dy · n.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Kernels: csrc/cpu/rms_norm.cpp, imf_kernels/_triton/rms_norm.py, csrc/cuda/rms_norm.cu.

This file is the exemplar: every operation's file has these parts in this order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose, with_result
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, contiguous_like, count_rows, last_contiguous, pointer, rows_of
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


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
    check.has_shape("rms_norm", "weight", weight, x.shape[-1:], x=x)
    check.same_device("rms_norm", x, weight=weight)
    check.last_contiguous("rms_norm", x=x, x_dot=x_dot)
    check.result_dtype("rms_norm", x, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        x_dot: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        y, y_dot = contiguous_like(x, dtype), None
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        if x_dot is not None:
            y_dot = contiguous_like(x_dot, dtype)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, weight, y, y_dot, rstd, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("rms_norm")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = contiguous_like(x)
        dweight = ctx.kernels.backward(x, last_contiguous(dy), weight, rstd, dx)
        return None, dx, None, dweight.to(weight.dtype), None, None


class _CPU:
    call = staticmethod(cpu.call)

    @classmethod
    def forward(
        cls,
        x: Tensor,
        x_dot: Tensor | None,
        weight: Tensor,
        y: Tensor,
        y_dot: Tensor | None,
        rstd: Tensor,
        eps: float,
    ) -> None:
        (x_rows, x_stride), (t_rows, t_stride) = rows_of(x), rows_of(x_dot)
        w = weight.float().contiguous()
        cls.call(
            *("rms_norm_forward", x, DTYPES[x.dtype], DTYPES[y.dtype], pointer(x_rows), pointer(t_rows)),
            *(pointer(w), pointer(y), pointer(y_dot), pointer(rstd)),
            *(count_rows(x), count_rows(t_rows), x.shape[-1], x_stride, t_stride, eps),
        )

    @staticmethod
    def backward(x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
        """Fills dx; the gradient of the weight in fp32."""
        (x_rows, x_stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
        w, threads = weight.float().contiguous(), torch.get_num_threads()
        dweight = x.new_empty(x.shape[-1:], dtype=torch.float32)
        _C.rms_norm_backward(
            *(DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(w), pointer(rstd), pointer(dx), pointer(dweight)),
            *(rstd.numel(), x.shape[-1], x_stride, dy_stride, threads),
        )
        return dweight


class _CUDA(_CPU):
    call = staticmethod(cuda.call)

    @staticmethod
    def backward(x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
        (x_rows, x_stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
        w, rows = weight.float().contiguous(), rstd.numel()
        dweight, partial, shares = cuda.sums(x, 1, rows, x.shape[-1])
        cuda.call(
            *("rms_norm_backward", x, DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(w), pointer(rstd), pointer(dx), pointer(partial), pointer(dweight)),
            *(rows, x.shape[-1], x_stride, dy_stride, shares),
        )
        return dweight[0]


def triton_unavailable(tensors: Any) -> str | None:
    if reason := triton_backend.unavailable(tensors):
        return reason
    width = tensors[0].shape[-1]  # a program keeps a whole row in its registers
    return None if width <= 16384 else f"it takes rows of at most 16384, got {width}"


_OPERATION = Operation(
    "rms_norm",
    _RMSNorm,
    "(Tensor x, Tensor? x_dot, Tensor weight, float eps, ScalarType dtype)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor weight, Tensor(a!) y, Tensor(b!)? y_dot, "
        "Tensor(c!) rstd, float eps) -> ()",
        "backward": "(Tensor x, Tensor dy, Tensor weight, Tensor rstd, Tensor(a!) dx) -> Tensor",
    },
    {"backward": lambda x, dy, weight, rstd, dx: weight.new_empty(weight.shape, dtype=torch.float32)},
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("cuda", _CUDA, cuda.unavailable_for_rows, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("rms_norm"), triton_unavailable),
    Backend("reference", _reference, always),
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
    """x · (mean(x²) + eps)^(−½) · weight over the last dimension, with its tangent.

    Args:
        x: [..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16),
            the last dimension contiguous.
        weight: [d], of any floating-point type.
        eps: added to the mean square.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, the result rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, weight, dtype)
    check.number("rms_norm", 0.0, eps=eps)
    primal, tangent = unpack(x)
    dtype = dtype or primal.dtype
    run = choose("rms_norm", _BACKENDS, backend, *with_result(primal, dtype)).run
    return pack(*run(primal, tangent, weight, eps, dtype), x)
