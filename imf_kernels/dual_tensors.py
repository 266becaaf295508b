"""Operations on the dual tensors of PyTorch's own forward mode, `torch.autograd.forward_ad`.

Inside a `dual_level` the tangent of an argument is taken out, the operation called with a `Dual`, and its
result made a dual tensor again. Like every tangent of this library it is data: differentiating it raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from imf_kernels.dispatch import constant
from imf_kernels.dual import Dual, guarded

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_dual_tensors(operation: Call) -> Call:
    """Lets an operation on `Dual`s take PyTorch's dual tensors, and return them then.

    `backend="reference"`, plain PyTorch, is left to PyTorch, which differentiates along weights too and whose
    tangents can be differentiated; and so are calls inside transforms of `torch.func`.
    """

    @functools.wraps(operation)
    def call(*arguments: Any, **options: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and forward_ad._current_level < 0:
            return operation(*arguments, **options)
        if options.get("backend") == "reference" or torch._C._are_functorch_transforms_active():
            return operation(*arguments, **options)
        if not compiling:
            return _on_dual_tensors(operation, arguments, options)
        # Asked twice: the first sees a level that the graph itself enters; the second lets no graph that was
        # made outside be called at a level.
        if _at_dual_level() or forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{operation.__name__}: torch.compile loses the tangents of torch.autograd.forward_ad; call "
                "torch.func.jvp inside what is compiled, or pass a Dual"
            )
        return operation(*arguments, **options)

    return call  # type: ignore[return-value]


def unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of a dual tensor; a tangent that PyTorch knows to be zero is `None`."""
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is not None and not torch.compiler.is_compiling() and tangent._is_zerotensor():
        tangent = None
    return primal, tangent


@constant
def _at_dual_level() -> bool:
    return forward_ad._current_level >= 0


@torch._disable_dynamo  # else what falls back to eager mode here would be compiled function by function
def _on_dual_tensors(operation: Callable[..., Any], arguments: Any, options: Any) -> Any:
    leaves, structure = pytree.tree_flatten((arguments, options), is_leaf=_is_dual)
    unpacked = [unpack(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    tangents = [tangent for _, tangent in unpacked if tangent is not None]
    if not tangents:
        return operation(*arguments, **options)
    if any(map(_is_dual, leaves)):
        raise TypeError(
            f"{operation.__name__}: arguments must be Duals or dual tensors of torch.autograd.forward_ad, "
            "got both"
        )
    leaves = [
        x if tangent is None else Dual(primal, tangent.detach())
        for x, (primal, tangent) in zip(leaves, unpacked, strict=True)
    ]
    arguments, options = pytree.tree_unflatten(leaves, structure)

    def dual_tensor(y: Tensor | Dual) -> Tensor:
        if not isinstance(y, Dual):
            return y
        assert y.tangent_rows is not None  # only arguments with a tangent were made a Dual
        return forward_ad.make_dual(y.primal, guarded(y.tangent_rows, y.primal, *tangents))

    return pytree.tree_map(dual_tensor, operation(*arguments, **options), is_leaf=_is_dual)


def _is_dual(x: Any) -> bool:
    return isinstance(x, Dual)
