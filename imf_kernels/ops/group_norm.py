"""GroupNorm: y = f(z), z = n · w + b with n = (x − mean(x)) · r, r = (variance(x) + ε)^(−½), by group.

A group of x [N, C, *positions] is C / num_groups adjacent channels of a sample at all positions; f is SiLU or
the identity.
Tangent:  ẏ = f′(z) · ṅ · w with ṅ = r · (ẋ − mean(ẋ) − n · mean(n ẋ)).
Backward: with dz = f′(z) · dy, g = dz · w:  dx = r · (g − mean(g) − n · mean(g n)),
          dw = Σ dz · n,  db = Σ dz, over samples and positions.
Pair:     the same of the duals (x, ẋ) and (dẏ, dy), with ṙ = −r² · mean(n ẋ): the value of dx is dẋ, its
          tangent the gradient of x; of dw and db the tangents.
Source: Wu and He, "Group Normalization" (2018); as `torch.nn.functional.group_norm`.
Kernels: csrc/ops/group_norm.h, csrc/cpu/group_norm.cpp, backends/triton_kernels/group_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import (
    as_floats,
    in_dtype,
    order_of_channels,
)
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.ops.elementwise import SILU
from imf_kernels.ops.layer_norm import normalize
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    order, dtype = order_of_channels(x), x.dtype
    of_channels = -1, *(1,) * (x.dim() - 2)

    def in_groups(x: Tensor) -> Tensor:
        return x.unflatten(1, (num_groups, -1)).flatten(2)

    n, n_dot = normalize(differentiable, in_groups(x), None if x_dot is None else in_groups(x_dot), eps)
    w = n.new_ones(()) if weight is None else weight.to(n.dtype).view(of_channels)
    z = n.reshape(x.shape) * w
    if bias is not None:
        z = z + bias.to(n.dtype).view(of_channels)
    y = (SILU.function(z) if silu else z).to(dtype).contiguous(memory_format=order)
    if x_dot is None or n_dot is None:
        return y, None
    with tangent_graph(differentiable):
        y_dot = n_dot.reshape(x_dot.shape) * w
        if silu:
            y_dot = SILU.derivative(last_rows(z, x_dot)) * y_dot
        return y, y_dot.to(dtype).contiguous(memory_format=order)


def _check(
    x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float,
    silu: bool,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor("group_norm", input=x)
    if x.dim() < 2:
        raise ValueError(f"group_norm: input must be [N, C, ...], got {list(x.shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"group_norm: num_groups must be an integer, got {type(num_groups).__name__}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: num_groups must divide the {x.shape[1]} channels of input of shape "
            f"{list(x.shape)}, got {num_groups}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check.is_weight("group_norm", **{name: parameter})
            check.has_shape("group_norm", name, parameter, x.shape[1:2], input=x)
            check.same_device("group_norm", x, **{name: parameter})
    check.number("group_norm", 0.0, eps=eps)
    return (x,)


def _forward(
    ctx: Any, kernels: _C.group_norm, x: Tensor, x_dot: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    order = order_of_channels(x)
    x = x.contiguous(memory_format=order)
    y, y_dot = torch.empty_like(x), None
    statistics = x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float32)
    if x_dot is not None:
        x_dot = x_dot.contiguous(memory_format=order)
        y_dot = torch.empty_like(x_dot)
        no_gradient(ctx, y_dot)
    w, b = (None if p is None else as_floats(p) for p in (weight, bias))
    kernels.forward(x, x_dot, w, b, y, y_dot, statistics, eps, silu, order != torch.contiguous_format)
    ctx.save_for_backward(x, weight, bias, statistics)
    ctx.kernels, ctx.silu, ctx.order = kernels, silu, order
    return y, y_dot


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, statistics = ctx.saved_tensors
    kernels: _C.group_norm = ctx.kernels
    dx = torch.empty_like(x)
    w, b = (None if p is None else as_floats(p) for p in (weight, bias))
    dy, sums = dy.contiguous(memory_format=ctx.order), _sums(x)
    last = ctx.order != torch.contiguous_format
    kernels.backward(x, dy, w, b, statistics, dx, sums, ctx.silu, last)
    return None, dx, None, *_of_parameters(sums, weight, bias), None, None, None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    x_dot, silu = call.arguments[1], call.arguments[-1]
    x, weight, bias, statistics = call.saved
    order = order_of_channels(x)
    x_dot = x_dot.contiguous(memory_format=order)
    cotangents = (
        torch.zeros_like(like) if t is None else t.contiguous(memory_format=order)
        for t, like in ((dy, x), (dy_dot, x_dot))
    )
    dx, dx_dot = torch.empty_like(x), torch.empty_like(x_dot)
    last = order != torch.contiguous_format
    w, b = (None if p is None else as_floats(p) for p in (weight, bias))
    sums = _sums(x)
    call.kernels.pair_backward(x, x_dot, *cotangents, w, b, statistics, dx, dx_dot, sums, silu, last)
    return [dx, dx_dot, *_of_parameters(sums, weight, bias), None, None, None]


def _sums(x: Tensor) -> Tensor:
    """Returns an empty [N, 2, C], for the gradients of bias and weight by sample."""
    return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)


def _of_parameters(sums: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """Returns the gradients of weight and bias."""
    dbias, dweight = sums.sum(0)
    return [None if p is None else in_dtype(dp, p.dtype) for p, dp in ((weight, dweight), (bias, dbias))]


_BACKENDS = compiled("group_norm")
_OPERATION = Operation("group_norm", _reference, _check, _BACKENDS, _forward, _backward, _pair_backward)


@takes_dual_tensors
def group_norm(
    input: TensorOrDual,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> TensorOrDual:
    """Computes (x − mean(x)) · (variance(x) + eps)^(−½) · weight + bias by group, with its tangent.

    Args:
        input: [N, C, *positions], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`:
            not float16). Images and volumes may have their channels last in memory; other strides are copied.
        num_groups: number of groups per sample, a divisor of C; C for an instance norm.
        weight, bias: [C], of any floating-point type; 1 and 0 where they are not given.
        eps: added to the variance.
        activation: "silu" for the SiLU of the result, in the same pass; `None` for the result itself.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        Like input in shape, dtype and memory format; a `Dual` if `input` is one. Statistics are computed in
        fp32, with full accuracy for values with an offset; the result is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"group_norm: activation must be None or 'silu', got {activation!r}")
    return _OPERATION(backend, (input,), weight, bias, num_groups, eps, activation == "silu")
