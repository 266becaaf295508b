"""Rules for softmax, log_softmax and normalize inside `imf_kernels.jvp`.

- y = softmax(x):     ẏ = y (ẋ − Σ y ẋ)
- y = log_softmax(x): ẏ = ẋ − Σ eʸ ẋ
- y = x / n, n = max(‖x‖, ε): ẏ = (ẋ − y Σ y ẋ) / n, the sum only where ‖x‖ > ε
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.dual import pack, tangent_graph, unpack
from imf_kernels.transforms.rules import _ALSO, serves


@serves(torch.softmax, Tensor.softmax)
def _softmax(input: Any, dim: Any = None, dtype: Any = None) -> Any:
    if not isinstance(dim, int):
        return _ALSO
    x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
    y = torch.softmax(x, dim, dtype)
    with tangent_graph(input.differentiable):
        if torch.compiler.is_compiling():
            # In terms of its own: a term that backward has too would be kept for it.
            wide = torch.promote_types(y.dtype, torch.float32)
            products = y.to(wide) * x_dot.to(wide)
            return pack(y, (products - y.to(wide) * products.sum(dim, keepdim=True)).to(y.dtype), input)
        # Its Jacobian is symmetric: PyTorch's backward in one pass is the tangent.
        return pack(y, torch._softmax_backward_data(x_dot.to(y.dtype), y, dim, y.dtype), input)


@serves(torch.log_softmax, Tensor.log_softmax)
def _log_softmax(input: Any, dim: Any = None, dtype: Any = None) -> Any:
    if not isinstance(dim, int):
        return _ALSO
    x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
    y = torch.log_softmax(x, dim, dtype)
    with tangent_graph(input.differentiable):
        wide = torch.promote_types(y.dtype, torch.float32)
        x_dot = x_dot.to(wide)
        weights = y.exp() if y.dtype == wide else torch.softmax(x, dim, wide)
        products = weights * x_dot if input.differentiable else weights.mul_(x_dot)
        return pack(y, (x_dot - products.sum(dim, keepdim=True)).to(y.dtype), input)


@serves(F.softmax)
def _functional_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(input, dim, dtype)


@serves(F.log_softmax)
def _functional_log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _log_softmax(input, dim, dtype)


@serves(F.normalize)
def _normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    if p != 2 or not isinstance(dim, int) or not input.dtype.is_floating_point:
        return _ALSO
    x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
    norm = x.norm(p, dim, keepdim=True)  # as F.normalize does
    n = norm.clamp_min(eps)
    y = x / n.expand_as(x)
    with tangent_graph(input.differentiable):
        x_dot = x_dot.to(y.dtype)
        along = torch.where(norm > eps, (y * x_dot).sum(dim, keepdim=True), 0.0)
        return pack(y, torch.addcmul(x_dot, y, along.to(y.dtype), value=-1).div_(n), input)
