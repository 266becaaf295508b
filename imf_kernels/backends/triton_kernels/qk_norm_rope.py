"""Per-head RMSNorm and RoPE with their tangent, and the primal backward: the kernels of rms_norm with tables.

Formulas: imf_kernels/ops/qk_norm_rope.py.
"""

from __future__ import annotations

from torch import Tensor

from imf_kernels.backends.triton_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from imf_kernels.backends.triton_kernels.rows import RowKernel
from imf_kernels.backends.triton_kernels.rows import shares as shares


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


_FORWARD, _BACKWARD = (RowKernel(kernel, stride=_strides) for kernel in (rms_norm_forward, rms_norm_backward))


def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor,
    y: Tensor, y_dot: Tensor | None, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    batch, heads, length, width = x.shape
    numbers = batch - (0 if x_dot is None else x_dot.shape[0]), heads, length, float(eps)
    _FORWARD.launch((x, x_dot), (x, x_dot, weight, cos, sin, y, y_dot, rstd), numbers, width, rstd.numel())


def backward(
    x: Tensor, dy: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dx: Tensor,
    partial: Tensor, dweight: Tensor,
) -> None:  # fmt: skip
    tensors, numbers = (x, dy, weight, cos, sin, rstd, dx), (x.shape[1], x.shape[2])
    _BACKWARD.sum((x, dy), tensors, numbers, rstd.numel(), partial, dweight)
