"""Results that backward computes again instead of keeping them.

A linear layer needs its input for its weight's gradient, a product its factors. Where these are results of
an activation or a norm, whose own inputs are kept anyway, backward computes them again, in one pass and into
memory that lasts as long as that backward: fresh memory takes more time than the pass. A quarter less is then
kept of a transformer's layer.

This is for CPUs in eager mode; in graphs torch.compile decides what is computed again. Nothing is computed
again from parameters: FSDP gathers them for the backward of their own module alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imf_kernels.backends.dispatch import in_graph

# Computes a result of a node again from the tensors that the node keeps.
Recompute = Callable[..., Tensor]
SMALLEST = 2**14  # elements for which the work on the host is worth while
# Nodes of views of all elements in order: of `Tensor.view`, and of dual tensors and their primals.
_VIEWS = frozenset(("ViewBackward0", "UnsafeViewBackward0", "AliasBackward0", "torch::autograd::Identity"))


def kept(x: Tensor) -> tuple[Recompute | None, tuple[Tensor | None, ...]]:
    """Returns what backward needs of x: `None` and x itself, or how to compute it again, and from what.

    The function's context of an operation whose result can be computed again has a `recompute`, which takes
    the tensors that it saved.
    """
    node, _ = _made_by(x)
    tensors = _saved_by(node, "recompute")
    return (None, (x,)) if tensors is None else (node.recompute, tensors)


def kept_pair(x: Tensor, x_dot: Tensor) -> tuple[Callable[..., Any] | None, tuple[Tensor | None, ...]]:
    """Returns likewise what backward needs of a result and its tangent, or `None` and nothing.

    The context of the function of a pair has a `recompute_pair`.
    """
    (node, index), (node_of_tangent, index_of_tangent) = _made_by(x), _made_by(x_dot)
    if node is not node_of_tangent or (index, index_of_tangent) != (0, 1):
        return None, ()
    tensors = _saved_by(node, "recompute_pair")
    return (None, ()) if tensors is None else (node.recompute_pair, tensors)


def _made_by(x: Tensor) -> tuple[Any, int]:
    """Returns the node that made x, or of which it is a view as a whole, and which of its results x is."""
    node, index = x.grad_fn, x.output_nr
    if node is None or x.numel() < SMALLEST or x.device.type != "cpu" or x._version or in_graph():
        return None, 0
    while node is not None and node.name() in _VIEWS:
        node, index = node.next_functions[0]
    return node, index


def _saved_by(node: Any, recompute: str) -> tuple[Tensor | None, ...] | None:
    """Returns what a node keeps if it can compute its result again, else `None`."""
    if getattr(node, recompute, None) is None:
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None  # they may move what is saved, at a cost
    try:
        return tuple(t if t is None else t.detach() for t in node.saved_tensors)
    except RuntimeError:  # modified since, which PyTorch reports if it matters
        return None


def again(recompute: Recompute | None, tensors: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
    """Returns a tensor of this shape that `kept` took apart, in memory that the next call may use."""
    return tensors[0] if recompute is None else recompute(*tensors).view(shape)  # type: ignore[return-value]


class _Scratch(threading.local):
    """Memory of a thread's backward, by dtype."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def scratch(like: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised contiguous tensor for use within a node's backward, until the next call."""
    size, dtype, memory = math.prod(shape), dtype or like.dtype, _scratch.memory
    if not memory:
        torch.autograd.Variable._execution_engine.queue_callback(memory.clear)
    found = memory.get(dtype)
    if found is None or found.numel() < size:
        found = memory[dtype] = like.new_empty(size, dtype=dtype)
    return found[:size].view(shape)
