"""SiLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/silu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.triton_backend import launch


@triton.jit
def sigmoid(x):
    """1 / (1 + e^(−x)): 0 where e^(−x) overflows."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x, s):
    """s + x s (1 − s) for s = sigmoid(x), in the form that is 0 where s is."""
    return s * tl.fma(x, 1.0 - s, 1.0)


@triton.jit
def _forward(x, x_dot, y, y_dot, elements, first_tangent, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xi = tl.load(x + i, mask=i < elements, other=0.0).to(tl.float32)
    s = sigmoid(xi)
    tl.store(y + i, xi * s, mask=i < elements)
    if x_dot is not None:
        j = i - first_tangent
        inside = (i < elements) & (j >= 0)
        ti = tl.load(x_dot + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot + j, silu_derivative(xi, s) * ti, mask=inside)


@triton.jit
def _backward(x, dy, dx, elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xi = tl.load(x + i, mask=i < elements, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < elements, other=0.0).to(tl.float32)
    tl.store(dx + i, d * silu_derivative(xi, sigmoid(xi)), mask=i < elements)


_BLOCK = 1024


def forward(x: Tensor, x_dot: Tensor | None, y: Tensor, y_dot: Tensor | None) -> None:
    elements = x.numel()
    first_tangent = elements - (0 if x_dot is None else x_dot.numel())
    grid = (triton.cdiv(elements, _BLOCK),)
    launch(_forward, grid, x, x_dot, y, y_dot, elements, first_tangent, BLOCK=_BLOCK)


def backward(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    elements = x.numel()
    launch(_backward, (triton.cdiv(elements, _BLOCK),), x, dy, dx, elements, BLOCK=_BLOCK)
