"""The blocks' weights as products take them: in the operands' dtype, the MLP's of aligned width."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# GPUs multiply 16-bit operands at full rate where a row is a multiple of 16 bytes, 8-bit ones of 16 channels.
ALIGNMENT = 16

_made: ContextVar[dict[tuple[int, torch.dtype], Tensor] | None] = ContextVar("_made", default=None)


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


def cast_weight(
    weight: Tensor, dtype: torch.dtype | None, padded: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A weight for a product with operands of `dtype`; gradients flow through, and come out in its own.

    Within `cast_once` rounded to it; elsewhere not yet: `imf_kernels.linear` rounds at each use.

    dtype: None for the weight's own, which is then taken as it is.
    padded: applied to the weight.
    """
    if dtype is None or dtype == weight.dtype:
        return weight
    if torch.compiler.is_compiling() or (made := _made.get()) is None:
        return weight if padded is None else padded(weight)
    key = id(weight), dtype
    if key not in made:
        with torch.enable_grad():  # although the first pass needs no graph: the one that does takes the same
            rounded = weight.to(dtype)
            made[key] = rounded if padded is None else padded(rounded)
    return made[key]


def missing(width: int) -> int:
    """Channels that a width lacks to be a multiple of `ALIGNMENT`."""
    return -width % ALIGNMENT


def padded_gate_up(weight: Tensor) -> Tensor:
    """[2 hidden, d], gate over up → the same with rows of zeros after each: SwiGLU gives 0 there."""
    hidden = weight.shape[0] // 2
    if not missing(hidden):
        return weight
    return F.pad(weight.unflatten(0, (2, hidden)), (0, 0, 0, missing(hidden))).flatten(0, 1)


def padded_down(weight: Tensor) -> Tensor:
    """[d, hidden] → the same with columns of zeros, for the channels that `padded_gate_up` adds."""
    pad = missing(weight.shape[1])
    return F.pad(weight, (0, pad)) if pad else weight
