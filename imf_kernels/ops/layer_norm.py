"""LayerNorm: y = n · w + b with n = (x − mean(x)) · r, r = (variance(x) + ε)^(−½), over the last dimension.

Tangent:  ẏ = ṅ · w with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with g = dy · w:  dx = r · (g − mean(g) − n · mean(g n)),  dw = Σ_rows dy · n,  db = Σ_rows dy.
Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); as `torch.nn.functional.layer_norm`.
Kernels: csrc/cpu/layer_norm.cpp, csrc/cuda/layer_norm.cu, imf_kernels/_triton/layer_norm.py. They are
layer_norm_modulate's too, whose scale and shift w and b are, of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda
from imf_kernels.dispatch import Backend, always, choose, with_result
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import (
    DTYPES,
    contiguous_like,
    count_rows,
    groups_of,
    last_contiguous,
    pointer,
    rows_of,
)
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.ops.rms_norm import triton_unavailable
from imf_kernels.triton_backend import Kernels


def normalize(x: Tensor, x_dot: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """The reference of n and ṅ, in at least float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    centered = x - x.mean(-1, keepdim=True)
    r = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centered * r
    if x_dot is None:
        return n, None
    with torch.no_grad():
        t, r, x_dot = tail(n, x_dot), tail(r, x_dot), x_dot.to(exact)
        x_dot = x_dot - x_dot.mean(-1, keepdim=True)
        return n, r * (x_dot - t * (t * x_dot).mean(-1, keepdim=True))


def _reference(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    n, n_dot = normalize(x, x_dot, eps)
    w = n.new_ones(()) if weight is None else weight.to(n.dtype)
    y = (n * w if bias is None else n * w + bias.to(n.dtype)).to(dtype)
    with torch.no_grad():
        return y, None if n_dot is None else (n_dot * w).to(dtype)


def _check(
    x: Tensor | Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    check.is_tensor_or_dual("layer_norm", x=x)
    check.single_row_whole("layer_norm", x=x)
    x, x_dot = unpack(x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x must have at least one dimension, got a scalar")
    if not isinstance(normalized_shape, (list, tuple)) or list(normalized_shape) != list(x.shape[-1:]):
        raise ValueError(
            f"layer_norm: normalized_shape must be {list(x.shape[-1:])}, the last dimension of x of shape "
            f"{list(x.shape)}, got {normalized_shape!r}; flatten x to normalise over several dimensions"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check.is_tensor("layer_norm", **{name: parameter})
            check.has_shape("layer_norm", name, parameter, x.shape[-1:], x=x)
            check.same_device("layer_norm", x, **{name: parameter})
    check.last_contiguous("layer_norm", x=x, x_dot=x_dot)
    check.result_dtype("layer_norm", x, dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        x_dot: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        y, y_dot = contiguous_like(x, dtype), None
        statistics = x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
        if x_dot is not None:
            y_dot = contiguous_like(x_dot, dtype)
            no_gradient(ctx, y_dot)
        ctx.one = 1.0 if weight is None else 0.0
        kernels.forward(x, x_dot, weight, None, bias, None, y, y_dot, statistics, ctx.one, eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("layer_norm")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        dx = contiguous_like(x)
        dweight, dbias = ctx.kernels.backward(x, last_contiguous(dy), weight, statistics, dx, ctx.one)[0]
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return None, dx, None, dweight, dbias, None, None


class CPU:
    """n · (one + scale) + shift. A parameter that is not there is zero; [d] is of all rows, [B, d] of each
    sample's."""

    call = staticmethod(cpu.call)

    @classmethod
    def forward(
        cls,
        x: Tensor,
        x_dot: Tensor | None,
        scale: Tensor | None,
        scale_dot: Tensor | None,
        shift: Tensor | None,
        shift_dot: Tensor | None,
        y: Tensor,
        y_dot: Tensor | None,
        statistics: Tensor,
        one: float,
        eps: float,
    ) -> None:
        (x_rows, x_stride), (t_rows, t_stride) = rows_of(x), rows_of(x_dot)
        s, s_dot, b, b_dot = (
            None if p is None else p.float().contiguous() for p in (scale, scale_dot, shift, shift_dot)
        )
        _, length = groups_of(scale, x)
        cls.call(
            *("layer_norm_forward", x, DTYPES[x.dtype], DTYPES[y.dtype], pointer(x_rows), pointer(t_rows)),
            *(pointer(s), pointer(s_dot), pointer(b), pointer(b_dot)),
            *(pointer(y), pointer(y_dot), pointer(statistics)),
            *(count_rows(x), count_rows(y_dot), length, x.shape[-1], x_stride, t_stride, one, eps),
        )

    @staticmethod
    def backward(
        x: Tensor, dy: Tensor, scale: Tensor | None, statistics: Tensor, dx: Tensor, one: float
    ) -> Tensor:
        """Fills dx; the gradients of scale and shift, [groups, 2, d] in fp32."""
        (x_rows, x_stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
        s = None if scale is None else scale.float().contiguous()
        (groups, length), width, threads = groups_of(scale, x), x.shape[-1], torch.get_num_threads()
        sums = x.new_empty((groups, 2, width), dtype=torch.float32)
        _C.layer_norm_backward(
            *(DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(s), pointer(statistics), pointer(dx), pointer(sums)),
            *(groups, length, width, x_stride, dy_stride),
            one,
            threads,
        )
        return sums


class CUDA(CPU):
    call = staticmethod(cuda.call)

    @staticmethod
    def backward(
        x: Tensor, dy: Tensor, scale: Tensor | None, statistics: Tensor, dx: Tensor, one: float
    ) -> Tensor:
        (x_rows, x_stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
        s = None if scale is None else scale.float().contiguous()
        (groups, length), width = groups_of(scale, x), x.shape[-1]
        sums, partial, shares = cuda.sums(x, groups, length, 2, width)
        cuda.call(
            *("layer_norm_backward", x, DTYPES[x.dtype], DTYPES[dy.dtype], pointer(x_rows), pointer(dy_rows)),
            *(pointer(s), pointer(statistics), pointer(dx), pointer(partial), pointer(sums)),
            *(groups, length, width, x_stride, dy_stride, shares, one),
        )
        return sums


def _fake_backward(
    x: Tensor, dy: Tensor, scale: Tensor | None, statistics: Tensor, dx: Tensor, one: float
) -> Tensor:
    return x.new_empty((groups_of(scale, x)[0], 2, x.shape[-1]), dtype=torch.float32)


# Of layer_norm and layer_norm_modulate, as operators.
KERNELS = {
    "forward": "(Tensor x, Tensor? x_dot, Tensor? scale, Tensor? scale_dot, Tensor? shift, "
    "Tensor? shift_dot, Tensor(a!) y, Tensor(b!)? y_dot, Tensor(c!) statistics, float one, float eps) -> ()",
    "backward": "(Tensor x, Tensor dy, Tensor? scale, Tensor statistics, Tensor(a!) dx, float one) -> Tensor",
}
FAKES = {"backward": _fake_backward}
_OPERATION = Operation(
    "layer_norm",
    _LayerNorm,
    "(Tensor x, Tensor? x_dot, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)",
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
    """(x − mean(x)) · (variance(x) + eps)^(−½) · weight + bias over the last dimension, with its tangent.

    Args:
        x: [..., d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16),
            the last dimension contiguous.
        normalized_shape: [d]: as in `torch.nn.functional.layer_norm`, but of the last dimension alone.
        weight, bias: [d], of any floating-point type; 1 and 0 where they are not given.
        eps: added to the variance.
        dtype: of the result; x's by default. An fp32 stream may be normalised into bf16 or fp16 operands.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        [..., d]; a `Dual` if `x` is one. Statistics are computed in fp32, no less exactly of values with an
        offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, normalized_shape, weight, bias, dtype)
    check.number("layer_norm", 0.0, eps=eps)
    primal, tangent = unpack(x)
    dtype = dtype or primal.dtype
    run = choose("layer_norm", _BACKENDS, backend, *with_result(primal, dtype)).run
    return pack(*run(primal, tangent, weight, bias, eps, dtype), x)
