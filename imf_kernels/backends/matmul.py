"""Matrix products of a linear layer, by the PyTorch library that suits the processor.

PyTorch's fp32 products on x86 use MKL; oneDNN, part of the same PyTorch, is also available. On processors not
made by Intel oneDNN computes large outputs and input gradients faster: on Zen 4 by 5 to 25 % from 2²²
multiply-adds on. Small products and weight gradients stay with MKL.

The choice depends on the sizes and the processor, never on a clock, so that runs on one machine round alike.
The libraries may round differently by the number of threads: MKL sums some products of odd widths in another
order on three threads than on one, and so does oneDNN with a single row where it lacks AVX-512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import count_rows

# Multiply-adds from which oneDNN wins; below, its call costs more than it saves.
ONEDNN_FROM = 2**22


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _onednn_missing() -> str | None:
    """Returns why oneDNN's private operator cannot be used; `None` if it gives the right product."""
    a, b, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        equal = torch.equal(_onednn(a, b, bias), a @ b.t() + bias)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None if equal else "it gave a wrong product"


def library() -> str:
    """Returns the library of large fp32 products here and the reason: "oneDNN: …" or "PyTorch's: …"."""
    return f"PyTorch's: {_REASON}" if _REASON else "oneDNN: MKL on a processor that is not Intel's"


def _reason() -> str | None:
    """Returns why all products are PyTorch's own; `None` if large ones use oneDNN."""
    if not torch.backends.mkl.is_available():
        return "built without MKL"
    if _C.intel:
        return "MKL on an Intel processor"
    missing = _onednn_missing()
    return f"oneDNN cannot be used, {missing}" if missing else None


_REASON = _reason()


def matrix(x: Tensor) -> Tensor:
    """Reshapes [..., d] to [rows, d]."""
    return x if x.dim() == 2 else x.reshape(count_rows(x), x.shape[-1])


def _by_onednn(a: Tensor, columns: int) -> bool:
    """Returns whether oneDNN multiplies `a` [..., k] by a matrix of so many columns."""
    large = a.numel() * columns >= ONEDNN_FROM
    return large and _REASON is None and a.dtype == torch.float32 and a.is_cpu


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weightᵀ + bias: [..., in], [out, in], [out] or `None` → [..., out].

    The result is not a view of the product: autograd would not let anybody modify it.
    """
    if _by_onednn(x, weight.shape[0]):
        y = _onednn(matrix(x), weight, bias)
    elif bias is None and x.dim() > 1:
        return F.linear(x, weight)
    else:
        y = F.linear(matrix(x), weight, bias)
    return y if x.dim() == 2 else y.resize_((*x.shape[:-1], weight.shape[0]))


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Returns dy weight: [rows, out], [out, in] → [rows, in]."""
    if _by_onednn(dy, weight.shape[1]):
        return _onednn(dy, weight.t(), None)
    return dy @ weight


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Returns dyᵀ x: [rows, out], [rows, in] → [out, in]."""
    return dy.t() @ x
