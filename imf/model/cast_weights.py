"""The blocks' weights as products take them: in the operands' dtype, the MLP's of aligned width."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# GPUs multiply 16-bit operands at full rate where a row is a multiple of 16 bytes, 8-bit ones of 16 channels.
ALIGNMENT = 16

Made = dict[tuple[int, torch.dtype], tuple[Tensor, ...]]
_made: ContextVar[Made | None] = ContextVar("_made", default=None)


class Padding(NamedTuple):
    """Zeros behind each of `groups` equal parts of dimension `dim`, to a multiple of `ALIGNMENT`."""

    dim: int
    groups: int

    def missing(self, weight: Tensor) -> int:
        """Returns how many rows or columns a part of the weight lacks."""
        return -(weight.shape[self.dim] // self.groups) % ALIGNMENT

    def pad(self, weight: Tensor) -> Tensor:
        """Returns the weight with zeros, or itself if nothing is missing."""
        if not (missing := self.missing(weight)):
            return weight
        behind = (0, 0) * (weight.dim() - 1 - self.dim)
        parts = F.pad(weight.unflatten(self.dim, (self.groups, -1)), (*behind, 0, missing))
        return parts.flatten(self.dim, self.dim + 1)

    def parts(self, x: Tensor, size: int) -> tuple[Tensor, ...]:
        """Returns views of the first `size` rows or columns of each part of x."""
        return x.unflatten(self.dim, (self.groups, -1)).narrow(self.dim + 1, 0, size).unbind(self.dim)


# SwiGLU's gate over up, [2 hidden, d], and the product that takes its result, [d, hidden]: SwiGLU of 0 is 0.
GATE_UP, DOWN = Padding(0, 2), Padding(1, 1)


@contextlib.contextmanager
def cast_once() -> Iterator[None]:
    """Within it a weight is rounded once, for all passes and their backward; the weights must not change.

    Holds the rounded weights of all blocks until backward is done: for GPUs (on a CPU new memory costs more
    than rounding into memory that is at hand), unless weights are sharded because there is no room.
    """
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def cast_weights(
    dtype: torch.dtype | None, *weights: Tensor, padding: Sequence[Padding | None] | None = None
) -> tuple[Tensor, ...]:
    """Returns a block's weights for products with operands of `dtype`; gradients come out in their own.

    Within `cast_once` rounded to it, by one kernel for all; elsewhere not yet: `imf_kernels.linear` rounds at
    each use.

    dtype: None for the weights' own, which are then taken as they are.
    padding: of each weight, None for none.
    """
    paddings = padding or (None,) * len(weights)
    if dtype is None or dtype == weights[0].dtype:
        return weights
    if torch.compiler.is_compiling() or (made := _made.get()) is None:
        return tuple(w if p is None else p.pad(w) for w, p in zip(weights, paddings, strict=True))
    key = id(weights[0]), dtype
    if key not in made:
        with torch.enable_grad():  # although the first pass needs no graph: the one that does takes the same
            made[key] = _Rounded.apply(dtype, paddings, *weights)
    return made[key]


class _Rounded(torch.autograd.Function):
    """Weights in another dtype, padded with zeros."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, paddings: Sequence[Padding | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.like = weights
        ctx.paddings = [p if p and p.missing(w) else None for w, p in zip(weights, paddings, strict=True)]
        rounded = []
        for weight, padding in zip(weights, ctx.paddings, strict=True):
            if padding is None:
                rounded.append(torch.empty_like(weight, dtype=dtype))
                continue
            shape = list(weight.shape)
            shape[padding.dim] += padding.groups * padding.missing(weight)
            rounded.append(torch.zeros(shape, dtype=dtype, device=weight.device))
        _copy(rounded, ctx.like, ctx)
        return tuple(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = [torch.empty_like(weight) for weight in ctx.like]
        _copy(wide, gradients, ctx)
        return None, None, *wide


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor], ctx: Any) -> None:
    """Copies what is not padding, all that lies alike in one kernel."""
    if not any(ctx.paddings):
        torch._foreach_copy_([*targets], [*sources])
        return
    pairs: list[tuple[Tensor, Tensor]] = []
    for target, source, like, padding in zip(targets, sources, ctx.like, ctx.paddings, strict=True):
        if padding is None:
            pairs.append((target, source))
        else:
            size = like.shape[padding.dim] // padding.groups
            pairs += zip(padding.parts(target, size), padding.parts(source, size), strict=True)
    alike = [(a, b) for a, b in pairs if a.stride() == b.stride()]
    if alike:
        torch._foreach_copy_([a for a, _ in alike], [b for _, b in alike])
    for a, b in pairs:
        if a.stride() != b.stride():
            a.copy_(b)
