"""Operations on the dual tensors of PyTorch's own forward mode, `torch.autograd.forward_ad`.

Inside a `dual_level` the tangent of an argument is taken out, the operation called with a `Dual`, and its result
made a dual tensor again. Like every tangent of this library it is data: differentiating it raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from imf_kernels.dual import Dual, guarded

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_dual_tensors(operation: Call) -> Call:
    """Lets an operation on `Dual`s take PyTorch's dual tensors, and return them then.

    `backend="reference"`, plain PyTorch, is left to PyTorch, which differentiates along weights too and whose
    tangents can be differentiated; and so are calls inside transforms of `torch.func`.
    """

    @functools.wraps(operation)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return operation(*arguments, **options)
        if options.get("backend") == "reference" or torch._C._are_functorch_transforms_active():
            return operation(*arguments, **options)
        return _at_dual_level(operation, arguments, options)

    return call  # type: ignore[return-value]


def _at_dual_level(operation: Callable[..., Any], arguments: Any, options: Any) -> Any:
    leaves, structure = pytree.tree_flatten((arguments, options), is_leaf=_is_dual)
    tangents = {
        i: tangent
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and (tangent := forward_ad.unpack_dual(x).tangent) is not None
    }
    if not tangents:
        return operation(*arguments, **options)
    if any(map(_is_dual, leaves)):
        raise TypeError(
            f"{operation.__name__}: arguments must be Duals or dual tensors of torch.autograd.forward_ad, "
            "got both"
        )
    for i, tangent in tangents.items():
        leaves[i] = Dual(forward_ad.unpack_dual(leaves[i]).primal, tangent.detach())
    arguments, options = pytree.tree_unflatten(leaves, structure)

    def dual_tensor(y: Tensor | Dual) -> Tensor:
        if not isinstance(y, Dual):
            return y
        return forward_ad.make_dual(y.primal, guarded(y.tangent_rows, y.primal, *tangents.values()))

    return pytree.tree_map(dual_tensor, operation(*arguments, **options), is_leaf=_is_dual)


def _is_dual(x: Any) -> bool:
    return isinstance(x, Dual)
