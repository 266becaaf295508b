"""Activation checkpointing that knows tangents: they are computed once, backward recomputes the primal alone.

`torch.utils.checkpoint` runs the function again in backward with all it did before. Nothing of a tangent is
needed there, and what is saved differs between a run with tangents and one without, which it refuses.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.utils.checkpoint
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.dual import Dual, is_dual
from imf_kernels.dual_tensors import primal_of, tangent_of
from imf_kernels.layout import not_a_view

Context = contextlib.AbstractContextManager[Any]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = False,
    preserve_rng_state: bool = True,
    context_fn: Callable[[], tuple[Context, Context]] | None = None,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """function(*args, **kwargs) without keeping what its backward needs: that recomputes it.

    The signature is that of `torch.utils.checkpoint.checkpoint`, to be handed to networks that checkpoint
    their blocks by a function of one's choice, as `checkpoint_wrapper(block, checkpoint_fn=ik.checkpoint)`
    does; inside `jvp` a call of PyTorch's own comes here too. With tangents (inside `jvp`, or arguments that
    are `Dual`s) the first run computes them without a graph, and backward recomputes the primal alone;
    otherwise this is PyTorch's own.

    Args:
        function: takes tensors, and gives the same each time.
        args, kwargs: of `function`; gradients reach tensors among them, at any depth.
        preserve_rng_state: whether random numbers are repeated.
        context_fn: makes the contexts of the first run and of the second.
        use_reentrant, determinism_check, debug, early_stop: of PyTorch's own; without effect with tangents.

    Raises:
        RuntimeError: with tangents, in a backward by `torch.autograd.grad` or with `inputs`, which do not see
            into `function`: `.backward()` on the loss works.
        NotImplementedError: with tangents, inside DistributedDataParallel(find_unused_parameters=True).
    """
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_dual)
    with_tangents = fwAD._current_level >= 0 or any(map(is_dual, leaves))
    compiling = torch.compiler.is_compiling()
    if not with_tangents or compiling or not torch.is_grad_enabled():
        own: Any = torch.utils.checkpoint.checkpoint
        if with_tangents and not compiling:
            own = own.__wrapped__  # inside `jvp` its name stands for this function
        options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
        if not use_reentrant:
            options |= {"determinism_check": determinism_check, "debug": debug, "early_stop": early_stop}
        options |= {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
        return own(function, *args, **options, **kwargs)
    _refuse_search_of_unused_parameters()
    first, second = context_fn() if context_fn is not None else (contextlib.nullcontext(),) * 2
    inputs = [primal_of(x) for x in leaves]
    again = _Again(function, inputs, structure, preserve_rng_state, second)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    with torch.no_grad(), first:
        outputs, result_structure = pytree.tree_flatten(function(*args, **kwargs), is_leaf=is_dual)
    moving = [i for i, y in enumerate(outputs) if isinstance(y, (Tensor, Dual)) and y.dtype.is_floating_point]
    anchor = torch.ones((), requires_grad=True)  # backward must come even if only weights inside require grad
    primals = _Recompute.apply(again, anchor, len(moving), *(primal_of(outputs[i]) for i in moving), *tensors)
    of_inputs = tuple(t for t in map(tangent_of, leaves) if t is not None)
    for i, primal in zip(moving, primals, strict=True):
        outputs[i] = _with_tangent_of(outputs[i], primal, of_inputs)
    return pytree.tree_unflatten(outputs, result_structure)


def _refuse_search_of_unused_parameters() -> None:
    distributed = sys.modules.get("torch.nn.parallel.distributed")
    ddp = distributed.DistributedDataParallel._active_ddp_module if distributed else None
    if ddp is not None and ddp.find_unused_parameters and not ddp.static_graph:
        raise NotImplementedError(
            "imf_kernels.checkpoint: DistributedDataParallel(find_unused_parameters=True) does not find the "
            "parameters inside a checkpoint that carries tangents and would take them for unused; "
            "static_graph=True in its place finds those that are"
        )


def _with_tangent_of(y: Tensor | Dual, primal: Tensor, of_inputs: tuple[Tensor, ...]) -> Tensor | Dual:
    tangent = tangent_of(y)
    tangent = None if tangent is None else _own(tangent, of_inputs)
    if isinstance(y, Dual):
        return Dual(primal, tangent)
    return primal if tangent is None else fwAD.make_dual(primal, tangent)


def _own(y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a Function may return for others to modify: no view, and no memory of its inputs."""
    if any(torch._C._is_alias_of(y, x) for x in inputs):  # type: ignore[attr-defined]
        return y.clone()
    return not_a_view(y, y.shape)


class _Again:
    """The function with what is no tensor of its arguments, the random states and autocast it ran under."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: list[Any],
        structure: Any,
        preserve_rng_state: bool,
        context: Context,
    ) -> None:
        self.function, self.structure, self.context = function, structure, context
        self.leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in self.places]
        devices = sorted({x.device.type for x in tensors} | {"cpu"})
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        self.preserve_rng_state = preserve_rng_state
        if preserve_rng_state:
            self.cpu_state = torch.get_rng_state()
            self.device_states = torch.utils.checkpoint.get_device_states(*tensors)

    def __call__(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        leaves = list(self.leaves)
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        with contextlib.ExitStack() as stack:
            if self.preserve_rng_state:
                stack.enter_context(torch.random.fork_rng([x.device for x in tensors if x.is_cuda]))
                torch.set_rng_state(self.cpu_state)
                torch.utils.checkpoint.set_device_states(*self.device_states)
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            stack.enter_context(self.context)
            return pytree.tree_leaves(self.function(*args, **kwargs), is_leaf=is_dual)


class _Recompute(torch.autograd.Function):
    """Hands outputs that were computed without a graph on; backward runs the function again with one."""

    @staticmethod
    def forward(ctx: Any, again: _Again, anchor: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors[count:])
        return tuple(_own(y, tensors[count:]) for y in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "imf_kernels.checkpoint: a checkpoint that carried tangents takes .backward() on the loss, "
                "not torch.autograd.grad nor backward(inputs=…), which do not see into it"
            )
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in ctx.saved_tensors]
        with torch.enable_grad(), fwAD._set_fwd_grad_enabled(False):
            outputs = [y for y in ctx.again(tuple(inputs)) if isinstance(y, Tensor) and y.is_floating_point()]
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
        return (
            None,
            None,
            None,
            *(None for _ in dys),
            *(x.grad if x.requires_grad else None for x in inputs),
        )
