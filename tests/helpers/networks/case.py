"""What a network of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT = 6  # tokens of text


@dataclass
class Case:
    """A network and a call of it.

    Attributes:
        module: with random weights.
        call: of the module, or of what wraps it, the moving inputs and the fixed ones.
        moving: have a tangent.
        fixed: have none; the floating-point ones follow the dtype of the module.
        training: whether the module is in training mode.
    """

    module: nn.Module
    call: Callable[..., Any]
    moving: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()
    training: bool = False

    def function(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
        """Of the moving inputs."""
        fixed = [x.to(dtype) if x.is_floating_point() else x for x in self.fixed]
        return lambda *moving: self.call(module, *moving, *fixed)


def image(channels: int = 4, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


def time(scale: float = 1.0, batch: int = 2) -> Tensor:
    """`scale` 1e-3 for networks that multiply times by 1000, after which bfloat16 would not resolve them."""
    return scale * torch.rand(batch)


def text(width: int, length: int = TEXT, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width)
