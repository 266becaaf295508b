"""Activation checkpointing with tangents: they are computed once; backward recomputes the primal alone, or
the pair if gradients flow through the tangents.

`torch.utils.checkpoint` reruns the complete function in backward, which needs no tangents, and raises if the
second run saves other tensors than the first, as it would without tangents.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imf_kernels.backends.dispatch import default, use_backend
from imf_kernels.dual import Dual, is_dual, not_a_view
from imf_kernels.transforms.dual_tensors import (
    can_move,
    carries_tangent,
    inside,
    make_dual_tensor,
    primal_of,
    tangent_of,
    unpack_dual_tensor,
)

Context = contextlib.AbstractContextManager[Any]
# The contexts of selective checkpointing, which keep the results of chosen calls for backward.
_SELECTIVE = tuple(
    getattr(torch.utils.checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(torch.utils.checkpoint, name)
)


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
    """Calls function(*args, **kwargs) without saving activations, which backward recomputes.

    The signature is that of `torch.utils.checkpoint.checkpoint`, for networks that take a checkpoint
    function, such as `checkpoint_wrapper(block, checkpoint_fn=ik.checkpoint)`; inside `jvp` calls of
    PyTorch's own come here too. With tangents (inside `jvp`, or arguments that are `Dual`s) the first run
    computes them without a graph, and backward recomputes the primal alone; with differentiable tangents it
    recomputes both, by PyTorch's own without `use_reentrant`; otherwise PyTorch's own runs as it is.

    Args:
        function: takes tensors, and is deterministic. Gradients also reach the tensors it closes over. A loss
            must use its results: inside `jvp`, differentiating a tensor that it leaves elsewhere, in a list
            or as an attribute, raises.
        args, kwargs: of `function`; gradients reach tensors among them, at any depth.
        preserve_rng_state: whether random numbers are repeated.
        context_fn: makes the contexts of the first run and of the second. With tangents those of selective
            checkpointing are ignored: nothing is saved.
        use_reentrant, determinism_check, debug, early_stop: of PyTorch's own; without effect with tangents
            that are not differentiable.

    Raises:
        RuntimeError: with tangents that are not differentiable, in a backward by `torch.autograd.grad` or
            with `inputs`, which do not see into `function`: `.backward()` on the loss works.
        NotImplementedError: with such tangents, inside DistributedDataParallel(find_unused_parameters=True).
    """
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_dual)
    at_a_level, compiling = fwAD._current_level >= 0, torch.compiler.is_compiling()
    with_tangents = not compiling and (
        any(map(is_dual, leaves)) or (at_a_level and _is_of_this_thread(leaves))
    )
    if with_tangents and not torch.is_grad_enabled():
        return function(*args, **kwargs)  # no backward; PyTorch's reentrant one would raise
    differentiable = with_tangents and (
        inside.run.differentiable or any(isinstance(x, Dual) and x.differentiable for x in leaves)
    )
    if differentiable:
        use_reentrant = False  # it runs the first time without a graph
        contexts = None if context_fn is None else _without_selection(*context_fn())
        context_fn = None if contexts is None else lambda: contexts
        if at_a_level:
            function, args, kwargs = _with_tangents(function, structure), tuple(_parts(leaves)), {}
    if not with_tangents or differentiable:
        own: Any = torch.utils.checkpoint.checkpoint
        if at_a_level and not compiling:
            own = own.__wrapped__  # while a thread is in a `jvp`, its name means this function
        if not compiling:
            function = use_backend(default.backend)(function)  # for the recomputation too
        options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
        if not use_reentrant:
            options |= {"determinism_check": determinism_check, "debug": debug, "early_stop": early_stop}
        options |= {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
        return own(function, *args, **options, **kwargs)
    _refuse_search_of_unused_parameters()
    first, second = _without_selection(
        *(context_fn() if context_fn is not None else (contextlib.nullcontext(),) * 2)
    )
    inputs = [primal_of(x) for x in leaves]
    again = _Again(function, inputs, structure, preserve_rng_state, second)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    # A mode does not see operations on `Dual`s, only the calls that they consist of, at a cost.
    calls = _FirstRun([*leaves, *tensors]) if at_a_level else None
    with torch.no_grad(), first, calls or contextlib.nullcontext():
        outputs, result_structure = pytree.tree_flatten(function(*args, **kwargs), is_leaf=is_dual)
    if calls is not None:
        again.captured = calls.captured_with(outputs)
    moving = [i for i, y in enumerate(outputs) if isinstance(y, Dual) or can_move(y)]
    anchor = torch.ones((), requires_grad=True)  # for a backward even if only weights inside require grad
    primals = _Recompute.apply(
        again,
        anchor,
        len(moving),
        *(primal_of(outputs[i]) for i in moving),
        *tensors,
        *map(primal_of, again.captured),
    )
    of_inputs = tuple(t for t in map(tangent_of, leaves) if t is not None)
    for i, primal in zip(moving, primals, strict=True):
        outputs[i] = _with_tangent_of(outputs[i], primal, of_inputs)
    if calls is not None:
        calls.refuse_gradients_of_leftovers()
    return pytree.tree_unflatten(outputs, result_structure)


def _without_selection(*contexts: Context) -> tuple[Context, Context]:
    """Replaces the contexts of selective checkpointing by such without effect."""
    first, second = (contextlib.nullcontext() if isinstance(c, _SELECTIVE) else c for c in contexts)
    return first, second


def _parts(leaves: list[Any]) -> Iterator[Any]:
    """Yields the primal and the tangent, or `None`, of each argument."""
    for x in leaves:
        yield from unpack_dual_tensor(x) if can_move(x) else (x, None)


def _with_tangents(function: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    """Makes a function of the parts of its arguments, which runs at the current dual level.

    Where there is none, in backward, it enters a level as the `jvp` did in which it was first called.
    """
    run = inside.run

    def call(*parts: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(parts), structure)
        return function(*args, **kwargs)

    def at_a_level(*parts: Any) -> Any:
        if not inside.run.over:
            return call(*(x if t is None else make_dual_tensor(x, t) for x, t in _pairs(parts)))
        primals, tangents = zip(*_pairs(parts), strict=True)
        return run.again(call, primals, tangents)

    return at_a_level


def _pairs(parts: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(parts[0::2], parts[1::2], strict=True)


def _is_of_this_thread(leaves: list[Any]) -> bool:
    """Returns whether the current dual level is that of the calling thread."""
    if not inside.run.over or torch._C._are_functorch_transforms_active():
        return True
    return any(map(carries_tangent, leaves))  # a level that the caller has entered itself


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
    """Returns y as a Function may return it for modification: no view, no memory of the inputs."""
    if any(torch._C._is_alias_of(y, x) for x in inputs):  # type: ignore[attr-defined]
        return y.clone()
    return not_a_view(y, y.shape)


class _Again:
    """A function, its non-tensor arguments, and the random states, autocast and backend of its run."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: list[Any],
        structure: Any,
        preserve_rng_state: bool,
        context: Context,
    ) -> None:
        self.function, self.structure, self.context = function, structure, context
        self.captured: list[Tensor] = []  # tensors with a graph that the function closes over
        self.leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in self.places]
        devices = sorted({x.device.type for x in tensors} | {"cpu"})
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        self.backend = default.backend
        self.preserve_rng_state = preserve_rng_state
        if preserve_rng_state:
            self.cpu_state = torch.get_rng_state()
            self.device_states = torch.utils.checkpoint.get_device_states(*tensors)

    def __call__(self, tensors: list[Tensor]) -> list[Any]:
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
            stack.enter_context(use_backend(self.backend))
            stack.enter_context(self.context)
            return pytree.tree_leaves(self.function(*args, **kwargs), is_leaf=is_dual)


class _FirstRun(TorchFunctionMode):
    """Mode that observes the first run: which tensors its calls take from outside, and which they make.

    The run has no graph, so each tensor is recorded with whether a run with one would differentiate it.
    References are weak. Only calls of PyTorch are seen, not those of `autograd.Function`s, scripts and the
    operations of this library.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.captured: list[Tensor] = []
        self.seen: dict[int, _Seen] = {}
        self.grad_contexts: dict[int, bool] = {}  # entered and not left
        with torch._C.DisableTorchFunction():
            for x in inputs:
                if isinstance(x, Tensor):
                    self.seen[id(x)] = _Seen(weakref.ref(x), x.requires_grad, False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name == "__get__" and func not in _VIEWS) or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        if name == "_set_grad_enabled":
            self._enter_or_leave(*args)
            return func(*args, **kwargs)
        given = _tensors_among(args, kwargs)
        moves = False
        for x in given:
            moves = self._of(x).moves or moves
        result = func(*args, **kwargs)
        moves = moves and name not in _CONSTANT and (not self.grad_contexts or self._with_grad())
        if result is None and given:
            self._make(given[0], moves, name)  # as `__setitem__` does
        else:
            for y in _tensors_among((result,), {}):
                self._make(y, moves, name)
        return result

    def captured_with(self, outputs: list[Any]) -> list[Tensor]:
        """Returns the tensors with a graph that calls took from outside, or that are outputs."""
        for y in outputs:
            if isinstance(y, Tensor):
                self._of(y)
        return self.captured

    def refuse_gradients_of_leftovers(self) -> None:
        """Makes backward raise at a tensor of the run that is still referenced."""
        with torch._C.DisableTorchFunction():
            for seen in self.seen.values():
                y = seen.tensor() if seen.is_made and seen.moves else None
                if y is None or not can_move(y) or y.is_inference() or y.grad_fn is not None:
                    continue
                if y._is_view() or not y.requires_grad:  # a view without a graph says it requires grad
                    y.requires_grad_().register_hook(_refuse_gradient)

    def _of(self, x: Tensor) -> _Seen:
        seen = self.seen.get(id(x))
        if seen is None or seen.tensor() is not x:
            with torch._C.DisableTorchFunction():
                moves = x.requires_grad
                if moves and x.grad_fn is not None:
                    self.captured.append(x)
                # With a tangent it was made by an unseen call.
                seen = self.seen[id(x)] = _Seen(weakref.ref(x), moves or carries_tangent(x), False)
        return seen

    def _make(self, y: Tensor, moves: bool, name: str) -> None:
        seen = self.seen.get(id(y))
        if seen is None or seen.tensor() is not y:
            self.seen[id(y)] = _Seen(weakref.ref(y), moves, True)
        elif name == "detach_":
            seen.moves = False
        elif moves and seen.is_made and not seen.moves:  # in place
            seen.moves = True
            with torch._C.DisableTorchFunction():
                base = y._base
            if base is not None and id(base) in self.seen:
                self._make(base, moves, name)

    def _enter_or_leave(self, enabled: bool) -> None:
        """Tracks `torch.no_grad` and the like, which gradient mode, already off, does not show."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename != _GRAD_MODE:
            frame = frame.f_back
        if frame is None:
            return
        while frame.f_back is not None and frame.f_back.f_code.co_filename == _GRAD_MODE:
            frame = frame.f_back
        context = id(frame.f_locals.get("self"))
        self.grad_contexts.pop(context, None)
        if frame.f_code.co_name != "__exit__":
            self.grad_contexts[context] = enabled

    def _with_grad(self) -> bool:
        return next(reversed(self.grad_contexts.values()))


@dataclass(slots=True)
class _Seen:
    """A tensor of the first run, if a run with a graph would differentiate it, and if it was made there."""

    tensor: weakref.ref[Tensor]
    moves: bool
    is_made: bool


_GRAD_MODE = torch.no_grad.__enter__.__code__.co_filename
# Attributes derived from a tensor, and calls without a derivative.
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_CONSTANT = {
    *("detach", "detach_", "empty_like", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like"),
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "tensor"),
}


def _tensors_among(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among arguments or results, and in lists and tuples of them."""
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _refuse_gradient(dy: Tensor) -> None:
    raise RuntimeError(
        "imf_kernels.checkpoint: backward reached a tensor that a checkpointed function left in a list, an "
        "attribute or the like, where it has no graph: return it from the checkpointed function"
    )


class _Replaced(TorchFunctionMode):
    """Mode that replaces tensors in the arguments of calls.

    Args:
        others: the replacements, by the `id` of the tensor.
    """

    def __init__(self, others: dict[int, Tensor]) -> None:
        super().__init__()
        self.others = others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self.of, args), **{name: self.of(x) for name, x in (kwargs or {}).items()})

    def of(self, x: Any) -> Any:
        if type(x) in (list, tuple):
            return type(x)(map(self.of, x))
        return self.others.get(id(x), x)


class _Recompute(torch.autograd.Function):
    """Identity on outputs computed without a graph; backward runs the function again with one."""

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
        again = ctx.again
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in ctx.saved_tensors]
        own = len(inputs) - len(again.captured)
        others = {id(c): x for c, x in zip(again.captured, inputs[own:], strict=True)}
        before = torch._C._autograd._get_sequence_nr()
        replaced = _Replaced(others) if others else contextlib.nullcontext()
        with torch.enable_grad(), fwAD._set_fwd_grad_enabled(False), replaced:
            outputs = again(inputs[:own])
        outputs = [others.get(id(y), y) for y in outputs if can_move(y)]
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
        ys = [y for y, _ in pairs]
        kept = _reaches_outside(ys, before, ctx._sequence_nr())
        torch.autograd.backward(ys, [dy for _, dy in pairs], retain_graph=kept or None)
        return (
            None,
            None,
            None,
            *(None for _ in dys),
            *(x.grad if x.requires_grad else None for x in inputs),
        )


def _reaches_outside(outputs: list[Tensor], start: int, checkpoint: int) -> bool:
    """Returns whether the graph of recomputed outputs continues into one older than the recomputation.

    It does if an unseen call takes a tensor with a graph from outside. Such a graph is kept: the backward
    around this one, or that of another checkpoint, also passes through it.

    Args:
        start: sequence number of the recomputation's first node.
        checkpoint: sequence number of the checkpoint's own node.
    """
    nodes = {y.grad_fn: None for y in outputs if y.grad_fn is not None}
    waiting = list(nodes)
    end = torch._C._autograd._get_sequence_nr()
    while waiting:
        node = waiting.pop()
        number = node._sequence_nr()
        if not start <= number < end and node.name() != "torch::autograd::AccumulateGrad":
            if number >= checkpoint:
                raise RuntimeError(
                    "imf_kernels.checkpoint: a checkpointed function closes over a variable that has been "
                    "given another value since, which backward would recompute with: pass it as an argument"
                )
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in nodes:
                nodes[following] = None
                waiting.append(following)
    return False
