"""Elementwise operations y = f(x), with f given together with its derivative.

Tangent:  ẏ = f′(x) ẋ.
Backward: dx = f′(x) dy.
Pair:     dẋ = f′(x) dẏ,  dx = f′(x) dy + f″(x) ẋ dẏ: the backward of the duals (x, ẋ) and (dẏ, dy).
- SiLU: f(x) = x s with s = 1 / (1 + e^(−x)), f′(x) = s (1 + x (1 − s)), f″(x) = s (1 − s) (2 + x (1 − 2 s)).
- GELU: f(x) = x s(x), f′(x) = s(x) + x s′(x), f″(x) = 2 s′(x) + x s″(x), with s the normal distribution
  Φ(x) = (1 + erf(x / √2)) / 2, s″ = −x s′, or its approximation (1 + tanh(v / 2)) / 2 with
  v = √(8 / π) (x + 0.044715 x³), s″ = s (1 − s) ((1 − 2 s) v′² + v″).
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); as `torch.nn.functional.silu` and `gelu`.
Kernels: csrc/ops/elementwise.h, csrc/cpu/elementwise.cpp, backends/triton_kernels/elementwise.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import contiguous_like, gapless_order, in_rows
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

Function = Callable[[Tensor], Tensor]


class Elementwise:
    """An elementwise operation y = f(x).

    Args:
        name: of the operation and of its kernels.
        function: f, in plain PyTorch.
        derivative: f′.
        public: name of the public function.
    """

    def __init__(self, name: str, function: Function, derivative: Function, public: str) -> None:
        self.function, self.derivative = function, derivative

        def check_arguments(x: Tensor, x_dot: Tensor | None) -> Sequence[Tensor]:
            check.is_tensor(public, x=x)
            return (x,)

        backends = compiled(name, triton=("elementwise", name))
        self.operation = Operation(
            *(name, self._reference, check_arguments, backends, _forward, _backward, _pair_backward),
            public=public,
            lay_out=in_rows,
        )

    def __call__(self, x: TensorOrDual, backend: str | None) -> TensorOrDual:
        return self.operation(backend, (x,))

    def _reference(
        self, differentiable: bool, x: Tensor, x_dot: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x = x.to(exact)
        y = self.function(x).to(dtype)
        if x_dot is None:
            return y, None
        with tangent_graph(differentiable):
            return y, (self.derivative(last_rows(x, x_dot)) * x_dot.to(exact)).to(dtype)


def _forward(
    ctx: Any, kernels: _C.elementwise, x: Tensor, x_dot: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    ctx.save_for_backward(x)  # half of a projection as it is: its memory is in use anyway
    order = gapless_order(x, x_dot)
    y, y_dot = _like(x, order), None
    if x_dot is not None:
        y_dot = _like(last_rows(x, x_dot), order)
        no_gradient(ctx, y_dot)
    kernels.forward(*(_rows(t, order) for t in (x, x_dot, y, y_dot)))
    ctx.kernels = kernels
    return y, y_dot


def _like(x: Tensor, order: list[int] | None) -> Tensor:
    """Returns an empty tensor, contiguous or, as PyTorch's, in the memory order of `x` without gaps."""
    return contiguous_like(x) if order is None else torch.empty_like(x)


def _rows(x: Tensor | None, order: list[int] | None) -> Any:
    """Returns `x` as kernels read and write it."""
    return x if x is None else in_rows(x if order is None else x.permute(order))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    order = gapless_order(x, None)
    dx = _like(x, order)
    ctx.kernels.backward(*(_rows(t, order) for t in (x, dy, dx)))
    return None, dx, None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> Sequence[Tensor]:
    x, x_dot = call.arguments
    order = gapless_order(x, x_dot)
    dx, dx_dot = _like(x, order), _like(last_rows(x, x_dot), order)
    cotangents = (torch.zeros_like(t) if d is None else d for d, t in ((dy, x), (dy_dot, x_dot)))
    call.kernels.pair_backward(*(_rows(t, order) for t in (x, x_dot, *cotangents, dx, dx_dot)))
    return dx, dx_dot


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the normal distribution and its density."""
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _normal_by_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the approximate normal distribution and its derivative."""
    root = math.sqrt(2 / math.pi)
    tanh = torch.tanh(root * (x + 0.044715 * x**3))
    return (1 + tanh) / 2, (1 - tanh * tanh) / 2 * root * (1 + 3 * 0.044715 * x * x)


def _gated(s: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Function, Function]:
    """Returns x s(x) and its derivative, for a function that returns s and s′."""

    def function(x: Tensor) -> Tensor:
        return x * s(x)[0]

    def derivative(x: Tensor) -> Tensor:
        value, slope = s(x)
        return value + x * slope

    return function, derivative


SILU = Elementwise("silu", lambda x: x * torch.sigmoid(x), _silu_derivative, "silu")
GELU = Elementwise("gelu", *_gated(_normal), "gelu")
GELU_TANH = Elementwise("gelu_tanh", *_gated(_normal_by_tanh), "gelu")


@takes_dual_tensors
def silu(x: TensorOrDual, *, backend: str | None = None) -> TensorOrDual:
    """Computes x / (1 + e^(−x)), with its tangent.

    Args:
        x: any shape and strides, float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`:
            not float16).
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        Like x in shape and dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError: for an argument that is not a floating-point tensor.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return SILU(x, backend)


@takes_dual_tensors
def gelu(x: TensorOrDual, *, approximate: str = "none", backend: str | None = None) -> TensorOrDual:
    """Computes x · Φ(x), Φ the normal distribution, with its tangent.

    Args:
        x: any shape and strides, float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`:
            not float16).
        approximate: "none", or "tanh" for x · (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        Like x in shape and dtype; a `Dual` if `x` is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return (GELU if approximate == "none" else GELU_TANH)(x, backend)
