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
def made_once() -> Iterator[None]:
    """Within it a weight is rounded once, for all passes and their backward; the weights must not change.

    Holds the rounded weights of all blocks until backward is done: not for weights that are sharded because
    there is no room for all of them.
    """
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def operand(
    weight: Tensor, dtype: torch.dtype | None, padded: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A weight in the dtype of a product's operands; gradients flow through, and come out in its own.

    dtype: None for the weight's own, which is then taken as it is.
    padded: applied to the rounded weight.
    """
    if dtype is None or dtype == weight.dtype:
        return weight
    if torch.compiler.is_compiling() or (made := _made.get()) is None:
        return _operand(weight, dtype, padded)
    key = id(weight), dtype
    if key not in made:
        with torch.enable_grad():  # although the first pass needs no graph: the one that does takes the same
            made[key] = _operand(weight, dtype, padded)
    return made[key]


def _operand(weight: Tensor, dtype: torch.dtype, padded: Callable[[Tensor], Tensor] | None) -> Tensor:
    rounded = weight.to(dtype)
    return rounded if padded is None else padded(rounded)


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
