"""Gated residual and the RMSNorm that follows it, in one pass: s = x + b · g, y = s · r · w.

r = (mean(s²) + ε)^(−½) over the last dimension; g and w are one gate and one weight per channel.
Tangent:  ṡ = ẋ + ḃ · g,  ẏ = (ṡ · r + s · ṙ) · w with ṙ = −r³ · mean(s ṡ).
Backward: of the norm with c = dy · w and n = s · r:  d = ds + r · (c − n · mean(c n)),  dw = Σ_rows dy · n;
then dx = d,  db = d · g,  dg = Σ_rows d · b. The gradients of both uses of s are added where they are made.
Pair:     the same of the duals (s, ṡ), (b, ḃ), (dṡ, ds) and (dẏ, dy): the value of d is dẋ, its tangent dx.
Source: the blocks of Geng et al., "Improved Mean Flows" (2025, arXiv 2512.02012); the results are those of
the two operations one after the other.
Kernels: csrc/ops/gated_residual_rms_norm.h, csrc/cpu/gated_residual_rms_norm.cpp,
backends/triton_kernels/gated_residual_rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

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
from imf_kernels.dual import Dual, last_rows, no_gradient, stored, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

_NAME = "gated_residual_rms_norm"
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None,
    gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None,
) -> Results:  # fmt: skip
    exact = torch.promote_types(x.dtype, torch.float32)
    g, w = gate.to(exact), weight.to(exact)
    stream = (x.to(exact) + branch.to(exact) * g).to(x.dtype)
    s = stream.to(exact)
    r = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (s * r * w).to(dtype or x.dtype)
    if x_dot is None and branch_dot is None:
        return stream, y, None, None
    with tangent_graph(differentiable):
        parts = [] if x_dot is None else [x_dot.to(exact)]
        if branch_dot is not None:
            parts.append(branch_dot.to(exact) * g)
        stream_dot = sum(parts[1:], parts[0]).to(x.dtype)
        s, r, s_dot = last_rows(s, stream_dot), last_rows(r, stream_dot), stream_dot.to(exact)
        r_dot = -(r**3) * (s * s_dot).mean(-1, keepdim=True)
        return stream, y, stream_dot, ((s_dot * r + s * r_dot) * w).to(y.dtype)


def _check(
    x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None, gate: Tensor, weight: Tensor,
    eps: float, dtype: torch.dtype | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor(_NAME, x=x, branch=branch)
    check.is_weight(_NAME, gate=gate, weight=weight)
    check.single_row_is_complete(_NAME, x=(x, x_dot), branch=(branch, branch_dot))
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x must have at least one dimension, got a scalar")
    check.has_shape(_NAME, "branch", branch, x.shape, " like x")
    check.has_shape(_NAME, "gate", gate, x.shape[-1:], x=x)
    check.has_shape(_NAME, "weight", weight, x.shape[-1:], x=x)
    check.same_device(_NAME, x, branch=branch, gate=gate, weight=weight)
    check.of_stream(_NAME, x, branch=branch)
    check.last_contiguous(_NAME, x=x, x_dot=x_dot, branch=branch, branch_dot=branch_dot)
    check.number(_NAME, 0.0, eps=eps)
    return (*check.with_result(_NAME, x, dtype), branch)


def _forward(
    ctx: Any, kernels: _C.gated_residual_rms_norm, x: Tensor, x_dot: Tensor | None, branch: Tensor,
    branch_dot: Tensor | None, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None,
) -> Results:  # fmt: skip
    branch, stream, y = in_rows(branch), contiguous_like(x), contiguous_like(x, dtype)
    stream_dot = y_dot = None
    moving = stored(x_dot, branch_dot)
    if moving is not None:
        like = last_rows(x, moving)
        stream_dot, y_dot = contiguous_like(like), contiguous_like(like, dtype)
        no_gradient(ctx, stream_dot, y_dot)
        x_dot, branch_dot = (None if t is None else in_rows(t) for t in (x_dot, branch_dot))
    else:
        ctx.set_materialize_grads(False)
    rstd = x.new_empty(count_rows(x), dtype=torch.float32)
    g, w = as_floats(gate), as_floats(weight)
    kernels.forward(in_rows(x), x_dot, branch, branch_dot, g, w, stream, stream_dot, y, y_dot, rstd, eps)
    ctx.save_for_backward(stream, branch, gate, weight, rstd)
    ctx.kernels, ctx.dtype = kernels, y.dtype
    return stream, y, stream_dot, y_dot


def _backward(ctx: Any, dstream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    stream, branch, gate, weight, rstd = ctx.saved_tensors
    kernels: _C.gated_residual_rms_norm = ctx.kernels
    dy = or_zeros(dy, stream, ctx.dtype)
    dx, dbranch = contiguous_like(stream), contiguous_like(branch)
    width = stream.shape[-1]
    partial, total = sums(kernels, stream, 1, rstd.numel(), width, (1, 2, width), 2)
    kernels.backward(
        stream, None if dstream is None else in_rows(dstream), dy, branch, as_floats(gate), as_floats(weight),
        rstd, dx, dbranch, partial, total,
    )  # fmt: skip
    dgate, dweight = total.view(2, width).unbind()
    of_weights = in_dtype(dgate, gate.dtype), in_dtype(dweight, weight.dtype)
    return None, dx, None, dbranch, None, *of_weights, None, None


def _pair_backward(
    call: PairCall, dstream: Tensor | None, dy: Tensor | None, dstream_dot: Tensor | None,
    dy_dot: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    _, x_dot, branch, branch_dot, gate, weight, _, dtype = call.arguments
    stream, rstd = call.saved[0], call.saved[4]
    moving = stored(x_dot, branch_dot)
    assert moving is not None
    dy, dy_dot = or_zeros(dy, stream, dtype), or_zeros(dy_dot, last_rows(stream, moving), dtype)
    x_dot, branch, branch_dot, dstream, dstream_dot = (
        None if t is None else in_rows(t) for t in (x_dot, branch, branch_dot, dstream, dstream_dot)
    )
    dx, dx_dot, dbranch, dbranch_dot = (
        None if t is None else contiguous_like(t) for t in (stream, x_dot, branch, branch_dot)
    )
    width = stream.shape[-1]
    partial, total = sums(call.kernels, stream, 1, rstd.numel(), width, (1, 2, width), 2)
    call.kernels.pair_backward(
        *(stream, x_dot, dstream, dstream_dot, dy, dy_dot, branch, branch_dot, as_floats(gate)),
        *(as_floats(weight), rstd, dx, dx_dot, dbranch, dbranch_dot, partial, total),
    )
    dgate, dweight = total.view(2, width).unbind()
    of_weights = in_dtype(dgate, gate.dtype), in_dtype(dweight, weight.dtype)
    return [dx, dx_dot, dbranch, dbranch_dot, *of_weights, None, None]


_OPERATION = Operation(
    *(_NAME, _reference, _check, compiled(_NAME, reduces=True), _forward, _backward, _pair_backward),
    results=2,
    lay_out=in_rows,
)


@overload
def gated_residual_rms_norm(  # type: ignore[overload-overlap]
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, eps: float = ..., *,
    dtype: torch.dtype | None = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gated_residual_rms_norm(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor, weight: Tensor, eps: float = ..., *,
    dtype: torch.dtype | None = ..., backend: str | None = ...,
) -> tuple[Dual, Dual]: ...  # fmt: skip
@takes_dual_tensors
def gated_residual_rms_norm(
    x: Tensor | Dual,
    branch: Tensor | Dual,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """Computes s = x + branch · gate and s · (mean(s²) + eps)^(−½) · weight, with their tangents.

    Like the two operations one after the other, in one pass over x and branch; backward adds the gradients of
    both results in the same pass.

    Args:
        x: [..., d], the residual stream; float32, bfloat16 or float16 (`reference`: any floating-point type;
            `cpu`: not float16), the last dimension contiguous.
        branch: like x; bfloat16 and float16 may be added to a stream of float32.
        gate, weight: [d], of any floating-point type, without tangents.
        eps: added to the mean square.
        dtype: of the normalised result; x's by default. An fp32 stream may be normalised into bf16 or fp16.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        (s, normalised s), each [..., d]; `Dual`s if x or branch is one. s is rounded to x's dtype before it
        is normalised.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return _OPERATION(backend, (x, branch), gate, weight, eps, dtype)
