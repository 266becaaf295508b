"""Operations on dual tensors of PyTorch's forward mode, `torch.autograd.forward_ad` and `torch.func.jvp`.

The tangent of an argument is unpacked, the operation called with a `Dual`, and its result made a dual tensor
again. Like every tangent of this library it is data, and differentiating it raises, except inside
`imf_kernels.jvp` with `differentiable=True`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from imf_kernels.backends.dispatch import constant, default, log_once, traced_default
from imf_kernels.backends.layout import in_dtype
from imf_kernels.dual import Dual, NoTangent, guarded, is_dual, not_a_view, unchecked, unpack

Call = TypeVar("Call", bound=Callable[..., Any])


def unpack_dual_tensor(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns primal and tangent of a dual tensor of PyTorch; `None` for a tangent known to be zero."""
    if torch.compiler.is_compiling():
        primal, tangent = forward_ad.unpack_dual(x)
        return primal, tangent
    level = forward_ad._current_level
    if level < 0:
        return x, None
    primal, tangent = torch._unpack_dual(x, level=level)  # what forward_ad calls, at a third of its cost
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def make_dual_tensor(primal: Tensor, tangent: Tensor) -> Tensor:
    """Makes a dual tensor of PyTorch at the current level."""
    if torch.compiler.is_compiling():
        if tangent.stride() != primal.stride():  # PyTorch would copy it, and cannot where sizes are symbols
            tangent = torch.empty_like(primal).copy_(tangent)
        return forward_ad.make_dual(primal, tangent)
    _load_decompositions()
    return torch._make_dual(primal, tangent, level=forward_ad._current_level)


@functools.cache
def _load_decompositions() -> None:
    """Loads the forward-mode rules that PyTorch writes in Python, as its own `make_dual` does."""
    forward_ad._maybe_load_decompositions()


def can_move(x: Any) -> bool:
    """Returns whether x is a tensor of numbers that may have a tangent."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def carries_tangent(x: Any) -> bool:
    """Returns whether a tensor has a tangent at the current dual level."""
    return can_move(x) and unpack_dual_tensor(x)[1] is not None


def refusing(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """Wraps a function so that it refuses tensors with a tangent."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(carries_tangent, pytree.tree_leaves((args, kwargs)))):
            raise NotImplementedError(f"imf_kernels.jvp: {reason}")
        return function(*args, **kwargs)

    return call


def primal_of(x: Any) -> Any:
    """Returns a `Dual` or a dual tensor of PyTorch without its tangent; anything else unchanged."""
    if isinstance(x, Dual):
        return x.primal
    return unpack_dual_tensor(x)[0] if can_move(x) else x


def tangent_of(x: Any) -> Tensor | None:
    """Returns the stored tangent of a `Dual` or a dual tensor of PyTorch; `None` for anything else."""
    if isinstance(x, Dual):
        return x.tangent_rows
    return unpack_dual_tensor(x)[1] if can_move(x) else None


def as_dual(x: Any, differentiable: bool = False) -> Any:
    """Converts a dual tensor of PyTorch to a `Dual`; returns anything else unchanged."""
    if type(x) is not Tensor or not (x.is_floating_point() or x.is_complex()):
        return x
    primal, tangent = unpack_dual_tensor(x)
    if tangent is None:
        return x
    if tangent.requires_grad and not differentiable:
        tangent = tangent.detach()
    # Under `torch.autocast` PyTorch's rules may leave a tangent in another dtype.
    return unchecked(primal, in_dtype(tangent, primal.dtype), differentiable)


def as_dual_tensor(y: Any) -> Any:
    """Converts a `Dual` to a dual tensor of PyTorch; returns anything else unchanged."""
    if not isinstance(y, Dual):
        return y
    primal, tangent = y._primal, y._tangent
    if tangent is None:
        return primal
    if torch.compiler.is_compiling():
        # No view of the primal, whose in-place calls would differentiate through strides; the compiler drops
        # the copy.
        return make_dual_tensor(primal, tangent).clone()
    if tangent._is_view() and not tangent.requires_grad:
        # A view made without autograd must not be modified.
        tangent = not_a_view(tangent, tangent.shape)
    return make_dual_tensor(primal, tangent)


def takes_dual_tensors(operation: Call) -> Call:
    """Makes an operation on `Dual`s take PyTorch's dual tensors, and return them then.

    `backend="reference"`, plain PyTorch, is left to PyTorch, which differentiates along weights too and whose
    tangents can be differentiated. So are calls in which a weight has a tangent, unless a backend is named,
    and those inside other transforms of `torch.func` than a single `jvp`.
    """

    @functools.wraps(operation)
    def call(*arguments: Any, **options: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and forward_ad._current_level < 0:
            return operation(*arguments, **options)
        asked = options.get("backend")
        if asked is None:
            asked = traced_default() if compiling else default.backend
        if asked == "reference":
            return operation(*arguments, **options)
        transformed = torch._C._are_functorch_transforms_active()
        if compiling:
            # Two questions: the first sees a level that the graph itself enters; the second keeps a graph
            # traced outside from being called at a level.
            if not transformed and (_at_dual_level() or forward_ad._current_level >= 0):
                if traced_jvp.depth:
                    return _on_traced_dual_tensors(operation, arguments, options)
                raise RuntimeError(
                    f"{operation.__name__}: torch.compile loses the tangents of torch.autograd.forward_ad; "
                    "call torch.func.jvp inside what is compiled, or pass a Dual"
                )
            return operation(*arguments, **options)
        jvp = _single_jvp() if transformed else None
        if transformed and jvp is None:
            return operation(*arguments, **options)
        return _on_dual_tensors(operation, arguments, options, jvp)

    return call  # type: ignore[return-value]


# The path of a call's tangent.
OURS, PYTORCHS, NO_TANGENT = "imf_kernels", "PyTorch's rule", "no tangent"


# Takes a call's name, path, why not another, seconds, arguments (args, kwargs) and result.
Seen = Callable[[str, str, str, float, Any, Any], None]


class _Watch:
    """Observer of each operation, for `imf_kernels.explain`."""

    seen: Seen | None = None


watch = _Watch()


class _TracedJVP:
    """The `imf_kernels.jvp` in a graph that torch.compile traces: nesting depth, and its option."""

    depth = 0
    differentiable = False


traced_jvp = _TracedJVP()


class Run:
    """A run of `imf_kernels.jvp`; threads that it started and that outlive it continue without it.

    Attributes:
        differentiable: gradients flow through tangents.
        over: it has ended.
        again: runs a part of it again, `again(func, primals, tangents)`.
    """

    again: Callable[[Callable[..., Any], Any, Any], Any]

    def __init__(self, differentiable: bool = False, over: bool = False) -> None:
        self.differentiable, self.over = differentiable, over


class _Inside(threading.local):
    """The run of `imf_kernels.jvp` that a thread is in."""

    run = Run(over=True)


OUTSIDE, inside = _Inside.run, _Inside()


def _on_traced_dual_tensors(operation: Callable[..., Any], arguments: Any, options: Any) -> Any:
    """Runs the operation on dual tensors of a level that the graph itself enters, in `imf_kernels.jvp`."""
    leaves, structure = pytree.tree_flatten((arguments, options))
    duals = [as_dual(x, traced_jvp.differentiable) for x in leaves]
    arguments, options = pytree.tree_unflatten(duals, structure)
    result = operation(*arguments, **options)
    return tuple(map(as_dual_tensor, result)) if isinstance(result, tuple) else as_dual_tensor(result)


@constant
def _at_dual_level() -> bool:
    return forward_ad._current_level >= 0


def _single_jvp() -> Any:
    """Returns the interpreter of `torch.func.jvp` if it is the only transform, else `None`."""
    from torch._functorch import pyfunctorch

    innermost = pyfunctorch.retrieve_current_functorch_interpreter()
    is_jvp = innermost.key() == torch._C._functorch.TransformType.Jvp
    return innermost if is_jvp and innermost.level() == 1 else None


@torch._disable_dynamo  # after a graph break it would be compiled function by function
def _on_dual_tensors(operation: Callable[..., Any], arguments: Any, options: Any, jvp: Any) -> Any:
    """Runs the operation at a dual level of `forward_ad`, or inside `jvp`, a transform that wraps tensors."""
    start = time.perf_counter()
    with torch._C.DisableTorchFunction():  # its calls are not those of the function in `jvp`
        results, moves = _results(operation, arguments, options, jvp)
    if watch.seen is not None:
        path = OURS if moves else NO_TANGENT
        seconds = time.perf_counter() - start
        watch.seen(f"imf_kernels.{operation.__name__}", path, "", seconds, (arguments, options), results)
    return results


def _refuse_linearize(name: str, primals: Sequence[Any]) -> None:
    """Raises where a traced primal is a constant of the graph, as in `torch.func.linearize`.

    It computes once what depends on constants alone, without the kernels that fill given tensors.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    if (mode := get_proxy_mode()) is None:
        return
    for primal in primals:
        if not isinstance(primal, Tensor) or (slot := get_proxy_slot(primal, mode.tracer, None)) is None:
            continue
        nodes, kinds = [slot.proxy.node], set()
        for node in nodes:  # grows: all that the primal is computed from
            kinds.add(node.op)
            nodes += [n for n in node.all_input_nodes if n not in nodes]
        if "get_attr" in kinds and "placeholder" not in kinds:
            raise RuntimeError(
                f"{name}: torch.func.linearize cannot keep a kernel's results; call torch.func.jvp for each "
                "tangent, or linearize inside imf_kernels.use_backend('reference')"
            )


def _results(operation: Callable[..., Any], arguments: Any, options: Any, jvp: Any) -> tuple[Any, bool]:
    """Returns the operation's result, and whether an argument carries a tangent."""

    def unwrapped(x: Any) -> Any:
        wrapping = jvp is not None and isinstance(x, Tensor)
        return torch._C._functorch._unwrap_for_grad(x, jvp.level()) if wrapping else x

    def wrapped(x: Tensor) -> Tensor:
        return x if jvp is None else torch._C._functorch._wrap_for_grad(x, jvp.level())

    differentiable = jvp is None and inside.run.differentiable
    leaves, structure = pytree.tree_flatten((arguments, options), is_leaf=is_dual)
    parts = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    primals, tangents = ([unwrapped(part) for part in both] for both in zip(*parts, strict=True))
    sources = [t for t in tangents if t is not None]
    if sources and torch._C._len_torch_dispatch_stack() > 0:
        moving = [x for x, x_dot in zip(primals, tangents, strict=True) if x_dot is not None]
        _refuse_linearize(operation.__name__, moving)
    if any(map(is_dual, leaves)):
        if sources:
            raise TypeError(
                f"{operation.__name__}: arguments must be Duals or dual tensors of PyTorch's forward mode, "
                "got both"
            )
        return operation(*arguments, **options), True

    def handed_out(y: Tensor | Dual) -> tuple[Tensor, Tensor | None]:
        y, y_dot = unpack(y)
        return y, y_dot if y_dot is None or differentiable else guarded(y_dot, y, *sources)

    try:
        if not all(map(torch._C._has_storage, sources)):
            raise NoTangent(
                f"{operation.__name__}: kernels cannot read a batch of tangents (jacobian(vectorize=True), "
                "vmap); pass them one by one, or use backend='reference'"
            )
        with contextlib.nullcontext() if jvp is None else jvp.lower():
            duals = [
                x
                if t is None
                else unchecked(x, in_dtype(t if differentiable else t.detach(), x.dtype), differentiable)
                for x, t in zip(primals, tangents, strict=True)
            ]
            plain_arguments, plain_options = pytree.tree_unflatten(duals, structure)
            result = operation(*plain_arguments, **plain_options)
            results = [handed_out(y) for y in (result if isinstance(result, tuple) else (result,))]
    except NoTangent as error:
        if options.get("backend") is not None or default.backend is not None:
            raise
        log_once(operation.__name__, "reference", str(error))
        return operation(*arguments, **{**options, "backend": "reference"}), True
    dual_tensors = tuple(
        wrapped(y) if y_dot is None else forward_ad.make_dual(wrapped(y), wrapped(y_dot))
        for y, y_dot in results
    )
    return dual_tensors if isinstance(result, tuple) else dual_tensors[0], bool(sources)
