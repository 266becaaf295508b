"""An operation h = f(x, …) that backward computes again, alone or before a linear layer y = h Wᵀ + b.

It keeps its arguments as they are: not h, which an operation and a layer after each other keep as well as x,
and no copy of a view, such as a third of a projection.

Tangent:  ḣ of the operation,  ẏ = ḣ Wᵀ.
Backward: dW = dyᵀ h,  db = Σ_rows dy,  dh = dy W,  and f's own backward of dh.
Kernels: those of the operation, and of linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imf_kernels.backends import matmul
from imf_kernels.backends.dispatch import default
from imf_kernels.backends.layout import in_dtype
from imf_kernels.backends.operators import Operation, first_derivatives
from imf_kernels.dual import Dual, is_differentiable, map_both, no_gradient, unchecked, unpack
from imf_kernels.ops.linear import LINEAR, gradients
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _computed(
    backend: str | None, operation: Operation[Any], inputs: Sequence[Any], others: tuple[Any, ...],
    weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None,
) -> Any:  # fmt: skip
    h = operation(backend, inputs, *others)
    if weight is None:
        return h
    if dtype not in (None, h.dtype):
        h = map_both(lambda t: t.to(dtype), h)
    return LINEAR(backend, (h,), weight, bias)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str | None, operation: Operation[Any], others: tuple[Any, ...],
        dtype: torch.dtype | None, weight: Tensor | None, bias: Tensor | None, *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        primals, tangents = parts[::2], parts[1::2]
        inputs = [*map(unchecked, primals, tangents)]
        y, y_dot = unpack(_computed(backend, operation, inputs, others, weight, bias, dtype))
        if y_dot is not None:
            no_gradient(ctx, y_dot)
        ctx.save_for_backward(weight, bias, *primals)
        ctx.compute = lambda leaves: operation(backend, leaves, *others)
        return y, y_dot

    @staticmethod
    @partial(first_derivatives, "recomputed", count=1)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *primals = ctx.saved_tensors
        of_parameters, of_primals = ctx.needs_input_grad[4:6], ctx.needs_input_grad[6::2]
        with torch.enable_grad():
            leaves = [
                x if x is None else x.detach().requires_grad_(n)
                for x, n in zip(primals, of_primals, strict=True)
            ]
            h = ctx.compute(leaves)
        dh: Any = dy
        dweight = dbias = None
        if weight is not None:
            again, needed = in_dtype(h.detach(), dy.dtype), (any(of_primals), *of_parameters)
            dh, dweight, dbias = gradients(matmul, dy, again, weight, bias, needed)
        of_leaves: Iterator[Tensor] = iter(())
        if any(of_primals):
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            of_leaves = iter(torch.autograd.grad(h, wanted, in_dtype(dh, h.dtype)))
        of_all = [part for n in of_primals for part in (next(of_leaves) if n else None, None)]
        return None, None, None, None, dweight, dbias, *of_all


@takes_dual_tensors
def recomputed(
    operation: Operation[Any],
    inputs: Sequence[Any],
    others: tuple[Any, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Any:
    """Computes h = operation(*inputs, *others), and with a weight h weightᵀ + bias, with its tangent.

    Args:
        operation: with one result, [..., in].
        inputs, others: its arguments; the former are tensors, `Dual`s or `None`.
        weight, bias: [out, in], and [out] or `None`, as of `linear`.
        dtype: that h is cast to for the product; its own by default.
        backend: of both, in backward too.

    Returns:
        [..., in] or [..., out]; a `Dual` if an input is one.
    """
    backend = backend or default.backend
    plain = backend == "reference" or torch._C._are_functorch_transforms_active()
    if plain or not torch.is_grad_enabled() or is_differentiable(*inputs):
        return _computed(backend, operation, inputs, others, weight, bias, dtype)
    parts = [part for x in inputs for part in unpack(x)]
    y, y_dot = _Recomputed.apply(backend, operation, others, dtype, weight, bias, *parts)
    return unchecked(y, y_dot) if any(isinstance(x, Dual) for x in inputs) else y
