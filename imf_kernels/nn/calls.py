"""Calls of PyTorch's layers; inputs of linear layers that backward computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imf_kernels.backends.dispatch import autocasts
from imf_kernels.dual import TAKING_DUALS, Dual
from imf_kernels.ops.elementwise import GELU, GELU_TANH, SILU, gelu, silu
from imf_kernels.ops.linear import linear
from imf_kernels.ops.recomputed import recomputed


class Deferred:
    """The result of an operation that is not computed yet: a linear layer that takes it keeps its arguments.

    Args:
        operation, inputs, others: see `recomputed`.
        plain: computes it.
        dtype: of the result.
    """

    def __init__(
        self, plain: Callable[[], Any], dtype: torch.dtype, operation: Any, inputs: Any, *others: Any
    ) -> None:
        self.plain, self.dtype = plain, dtype
        self.operation, self.inputs, self.others = operation, inputs, others

    def into(self, weight: Tensor, bias: Tensor | None) -> Any:
        x = self.inputs[0]
        cast = autocasts(x.device) and not isinstance(x, Dual) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if cast else self.dtype
        if torch.compiler.is_compiling() or not (cast or weight.dtype == dtype):
            return product(self.plain(), weight, bias)
        return recomputed(self.operation, self.inputs, self.others, weight, bias, dtype)


def product(x: Any, weight: Tensor, bias: Tensor | None) -> Any:
    return x.into(weight, bias) if isinstance(x, Deferred) else F.linear(x, weight, bias)


def computed(x: Any) -> Any:
    return x.plain() if isinstance(x, Deferred) else x


def apply(layer: Any, x: Any) -> Any:
    """Calls a layer; a linear one after something deferred does not keep what it takes."""
    if isinstance(x, Deferred) and is_plain_linear(layer):
        return x.into(layer.weight, layer.bias)
    return layer(computed(x))


def _dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if training and p:
        raise TypeError(f"dropout of a Dual drops both parts alike: p must be 0 in training, got {p}")
    return input


def _silu(input: Dual, inplace: bool = False) -> Dual:
    if inplace:
        raise TypeError("silu of a Dual takes inplace=False alone: a Dual does not change")
    return silu(input)


TAKING_DUALS.update(
    {
        F.linear: lambda input, weight, bias=None: linear(input, weight, bias),
        F.gelu: lambda input, approximate="none": gelu(input, approximate=approximate),
        F.silu: _silu,
        F.dropout: _dropout,
    }
)


def _is_identity(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity or (type(layer) is nn.Dropout and not (layer.training and layer.p))


def apply_all(layers: Iterable[nn.Module], x: Any) -> Any:
    """Calls layers one after the other; a linear one after an activation does not keep what it takes."""
    for layer in layers:
        if type(layer) in (nn.GELU, nn.SiLU) and is_as_made(layer):
            x = _activated(layer, x)
        elif not (isinstance(x, Deferred) and _is_identity(layer) and is_as_made(layer)):
            x = apply(layer, x)
    return computed(x)


def _activated(layer: Any, x: Any) -> Deferred:
    x = computed(x)
    approximate = getattr(layer, "approximate", None)
    function = SILU if approximate is None else GELU if approximate == "none" else GELU_TANH
    return Deferred(lambda: apply(layer, x), x.dtype, function.operation, (x,))


def is_plain_linear(layer: nn.Module) -> bool:
    """Returns whether a layer can be called by its weight and bias."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and is_as_made(layer)


def is_as_made(module: nn.Module) -> bool:
    """Returns whether a call of a module is one of its class's forward."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(layer: nn.Module) -> bool:
    """Returns whether calls of a layer run hooks, its own or those of every module."""
    return has_own_hooks(layer) or bool(nn.modules.module._has_any_global_hook())


def has_own_hooks(layer: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(map(vars(layer).get, hooks))


def check_skipped(module: Any) -> None:
    """Raises if a part that a module does not call, as it did nothing when `replace` saw it, now does."""
    for name in module.skipped:
        part = getattr(module, name)
        if "forward" in vars(part) or has_own_hooks(part) or (part.training and getattr(part, "p", 0)):
            raise RuntimeError(
                f"imf_kernels.nn.{type(module).__name__}: {name} is not called, and had no effect when "
                f"replace saw it; now it has hooks or drops something: change it before replace, got {part}"
            )
