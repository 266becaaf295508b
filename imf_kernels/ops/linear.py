"""Linear layer: y = x Wᵀ + b.

Tangent:  ẏ = ẋ Wᵀ (weight and bias carry none).
Backward: dx = dy W,  dW = dyᵀ x,  db = Σ_rows dy.
Pair:     dx = dy W,  dẋ = dẏ W,  dW = dyᵀ x + dẏᵀ ẋ,  db = Σ_rows dy.
Kernels: PyTorch's matrix products, by the library that suits the processor (backends/matmul.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends import cpu, matmul
from imf_kernels.backends.dispatch import Backend
from imf_kernels.backends.layout import in_dtype
from imf_kernels.backends.operators import Operation, PairCall
from imf_kernels.dual import TensorOrDual, no_gradient
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    w = in_dtype(weight, x.dtype)
    y = F.linear(x, w, None if bias is None else in_dtype(bias, x.dtype))
    if x_dot is None:
        return y, None
    # `detach` takes a third of the time of no_grad.
    return y, F.linear(x_dot, w if differentiable else w.detach())


def _check(x: Tensor, x_dot: Tensor | None, weight: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
    check.is_tensor("linear", x=x)
    check.is_weight("linear", weight=weight)
    check.single_row_is_complete("linear", x=(x, x_dot))
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight must be [out, in] with in = {x.shape[-1] if x.dim() else 1}, the last dimension "
            f"of x {list(x.shape)}; got {list(weight.shape)}"
        )
    parameters = {"weight": weight}
    if bias is not None:
        check.is_weight("linear", bias=bias)
        check.has_shape("linear", "bias", bias, weight.shape[:1], weight=weight)
        parameters["bias"] = bias
    check.same_device("linear", x, **parameters)
    for name, parameter in parameters.items():
        if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
            raise TypeError(f"linear: {name} must be {x.dtype} like x, or float32; got {parameter.dtype}")
    return (x,)


def _forward(
    ctx: Any, products: Any, x: Tensor, x_dot: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    w = in_dtype(weight, x.dtype)
    b = None if bias is None else in_dtype(bias, x.dtype)
    y, y_dot = products.forward(x, w, b), None
    if x_dot is not None:
        y_dot = products.forward(x_dot, w, None)
        no_gradient(ctx, y_dot)
    ctx.save_for_backward(x, weight, bias)
    ctx.products = products
    return y, y_dot


def gradients(
    products: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx, dW and db, `None` for those that are not needed."""
    rows = matmul.matrix(dy)
    dx = dweight = dbias = None
    if needed[0]:
        dx = products.grad_input(rows, in_dtype(weight, x.dtype)).view(x.shape)
    if needed[1]:
        dweight = in_dtype(products.grad_weight(rows, matmul.matrix(x)), weight.dtype)
    if needed[2] and bias is not None:
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        dbias = in_dtype(rows.sum(0, dtype=exact), bias.dtype)
    return dx, dweight, dbias


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    _, of_x, _, *of_parameters = ctx.needs_input_grad
    dx, dweight, dbias = gradients(ctx.products, dy, x, weight, bias, (of_x, *of_parameters))
    return None, dx, None, dweight, dbias


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    x, x_dot, weight, bias = call.arguments
    gradients: list[Tensor | None] = [None] * 4
    for i, (of, cotangent) in enumerate(((x, dy), (x_dot, dy_dot))):
        if cotangent is None:
            continue
        rows = matmul.matrix(cotangent)
        if call.needed[i]:
            gradients[i] = call.kernels.grad_input(rows, in_dtype(weight, x.dtype)).view(of.shape)
        if call.needed[2]:
            part = in_dtype(call.kernels.grad_weight(rows, matmul.matrix(of)), weight.dtype)
            gradients[2] = part if gradients[2] is None else gradients[2] + part
    if call.needed[3] and dy is not None:
        gradients[3] = in_dtype(matmul.matrix(dy).sum(0, dtype=torch.float32), bias.dtype)
    return gradients


LINEAR = Operation(
    "linear",
    _reference,
    _check,
    (Backend("cpu", matmul, cpu.unavailable),),
    _forward,
    _backward,
    _pair_backward,
    pair_needs_kernel=False,
    schemas={
        "linear_forward": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        "linear_grad_input": "(Tensor dy, Tensor weight) -> Tensor",
        "linear_grad_weight": "(Tensor dy, Tensor x) -> Tensor",
    },
    fakes={
        "linear_forward": lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
        "linear_grad_input": lambda dy, weight: dy.new_empty(dy.shape[0], weight.shape[1]),
        "linear_grad_weight": lambda dy, x: dy.new_empty(dy.shape[1], x.shape[1]),
    },
    kind="products",
    reference_aliases=("triton", "cuda"),
)


@takes_dual_tensors
def linear(
    x: TensorOrDual, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> TensorOrDual:
    """Computes x weightᵀ + bias, with its tangent.

    Args:
        x: [..., in], float32 or bfloat16 (`reference`: any floating-point type).
        weight: [out, in], of x's dtype, or float32 and then rounded to it for the product; its gradient
            has its own dtype.
        bias: [out], likewise, or `None`.
        backend: "cpu", "reference", or the best one that can run. "triton" and "cuda" mean "reference":
            products on GPUs are PyTorch's.

    Returns:
        [..., out] of x's dtype; a `Dual` if `x` is one. Accumulated in fp32 and rounded once, except
        that on GPUs PyTorch may add partial sums of long products in the operands' dtype, unless
        `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` (or fp16) is False.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return LINEAR(backend, (x,), weight, bias)
