"""Derivative of an unmodified function or module along tangents, a `torch.func.jvp` for training.

Tangents travel in PyTorch's own dual tensors (`torch.autograd.forward_ad`), so that views, in-place methods,
indexing and all else with a forward-mode rule keep their meaning, and modules that require a tensor get one.
Differences from `torch.func.jvp`:

- Calls for which this library has an operation run on it (rules.py): primal and tangent in one pass,
  attention without the matrix of its weights. products.py has products without needless ones.
- No gradient flows through tangents, unless asked for by `differentiable=True`: the graph that PyTorch
  records of them is released after every call.
- Dual tensors are ordinary tensors, without the wrappers of `torch.func`: hooks run, so DDP, FSDP2 and
  profilers work.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from imf_kernels.backends.dispatch import constant, logger
from imf_kernels.backends.layout import in_dtype
from imf_kernels.dual import Dual, guarded, name_of
from imf_kernels.transforms import normalizers, products  # noqa: F401  (their rules register themselves)
from imf_kernels.transforms.corrections import (
    REFUSED_IF_DIFFERENTIABLE,
    REFUSED_INSIDE_TRANSFORMS,
    REWRITTEN,
    REWRITTEN_IF_DIFFERENTIABLE,
    REWRITTEN_WHILE_COMPILING,
    WRITES_INTO_ITS_GRAPH,
    WRONG_IN_PYTORCH,
)
from imf_kernels.transforms.dual_tensors import (
    NO_TANGENT,
    OURS,
    OUTSIDE,
    PYTORCHS,
    Run,
    Seen,
    as_dual,
    as_dual_tensor,
    can_move,
    carries_tangent,
    inside,
    make_dual_tensor,
    primal_of,
    traced_jvp,
    unpack_dual_tensor,
)
from imf_kernels.transforms.packages import serve_packages
from imf_kernels.transforms.pointwise import ARITHMETIC_WHILE_COMPILING, IN_EAGER_MODE
from imf_kernels.transforms.rules import (
    CONTROL_FLOW,
    REFUSED,
    REFUSED_WHILE_COMPILING,
    RULES,
    ZEROS_WHILE_COMPILING,
    NotServed,
)
from imf_kernels.transforms.surroundings import Surroundings
from imf_kernels.transforms.tracing import refuse_while_tracing

# PyTorch's function of many calls, which hands itself as one call to a mode unless this name in it says no.
_MULTI_HEAD_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {k: v for k, v in vars(F).items() if k != "__name__"} | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _with_zeros(x: Any) -> Any:
    """Returns a tensor without a tangent with one of zeros, anything else unchanged."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or carries_tangent(x):
        return x
    x = x.contiguous()  # the layout of an expanded one could not be kept
    return make_dual_tensor(x, torch.zeros_like(x))


def _method_name(func: Any) -> str:
    """Returns the name of a method, without the decorator of those that PyTorch writes in Python.

    From PyTorch 2.15 on torch.compile reads the name of the decorator's own function, "wrapped", from them.
    """
    return getattr(getattr(func, "__wrapped__", func), "__name__", "")


NO_RULE = NotServed("")
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
# Refused or corrected functions, by the names of the operators behind them.
_PUBLIC = {
    f"aten::{prefix}{_method_name(function)}": function
    for function in (*REFUSED, *REWRITTEN, *WRONG_IN_PYTORCH)
    for prefix in ("", "special_", "linalg_")
}
_WRONG_IF_DIFFERENTIABLE: dict[str | None, Any] = {
    f"aten::{_method_name(function)}": function for function in REFUSED_IF_DIFFERENTIABLE
}


class _Calls(TorchFunctionMode):
    """Mode that sends every call of PyTorch to where its tangent is computed."""

    run = Run()  # replaced in eager mode

    def __init__(
        self,
        differentiable: bool = False,
        seen: Seen | None = None,
        synchronize: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.seen, self.synchronize = seen, synchronize or (lambda: None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.run.over:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _MULTI_HEAD_ATTENTION(*args, **kwargs)
        if self.seen is None:
            return _call(func, args, kwargs, self.differentiable)[0]
        self.synchronize()
        start = time.perf_counter()
        result, why = _call(func, args, kwargs, self.differentiable)
        self.synchronize()
        path, reason = (OURS, "") if why is None else (_path(result), why.why)
        self.seen(name_of(func), path, reason, time.perf_counter() - start, (args, kwargs), result)
        return result


def _call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], differentiable: bool
) -> tuple[Any, NotServed | None]:
    """Returns the result of a call, and why PyTorch's rule made it, `None` if an operation of ours did."""
    compiling = torch.compiler.is_compiling()
    if isinstance(func, _OPERATORS):
        func = _PUBLIC.get(_operator_name(func).partition(".")[0], func)
    if torch._C._are_functorch_transforms_active():
        # Inside a vmap or grad PyTorch does not tell which tensors have a tangent.
        if func in REFUSED_INSIDE_TRANSFORMS:
            raise NotImplementedError(f"imf_kernels.jvp: {REFUSED_INSIDE_TRANSFORMS[func]}")
        return _by_pytorch(func, args, kwargs, differentiable), NO_RULE
    if func in REFUSED_WHILE_COMPILING if compiling else func in REFUSED or torch.is_inference_mode_enabled():
        _refuse(func, args, kwargs)
    rule, why = RULES.get(func) if not kwargs or kwargs.get("out") is None else None, NO_RULE
    if rule is None and len(args) == 2 and not kwargs:
        rule = ARITHMETIC_WHILE_COMPILING.get(_method_name(func)) if compiling else IN_EAGER_MODE.get(func)
    if rule is not None:
        given = [as_dual(x, differentiable) for x in args]
        named = {name: as_dual(x, differentiable) for name, x in kwargs.items() if name != "out"}
        moves = False
        for x in (*given, *named.values()):  # a generator takes four times the time
            moves = moves or type(x) is Dual
        if moves:
            result = rule(*given, **named)
            if not isinstance(result, NotServed):
                return as_dual_tensor(result), None
            why = result
    if differentiable:
        name = _operator_name(func).partition(".")[0] if isinstance(func, _OPERATORS) else None
        refused = _WRONG_IF_DIFFERENTIABLE.get(name, func)
        if refused in REFUSED_IF_DIFFERENTIABLE:
            _refuse(refused, args, kwargs, REFUSED_IF_DIFFERENTIABLE)
    if _writes_in_graph(func) if compiling else func in _IN_PLACE_METHODS:
        args, kwargs = _apart(args, kwargs)
    if compiling:
        if func is torch.utils.checkpoint.checkpoint:
            args = (_seen(args[0], differentiable), *args[1:])
        if func is Tensor.__getitem__ and carries_tangent(args[0]):
            _expect_some(args[1])
        if func in ZEROS_WHILE_COMPILING and any(map(carries_tangent, pytree.tree_leaves(args))):
            args = pytree.tree_map(_with_zeros, args)
        result = _by_pytorch(func, args, kwargs, differentiable)
        _refuse_lost_tangents(func, args, kwargs, result)
        return result, why
    try:
        result = _by_pytorch(func, args, kwargs, differentiable)
    except (NotImplementedError, RuntimeError) as error:
        if any(words in str(error) for words in ("forward AD", "forward grad")):
            raise NotImplementedError(
                f"imf_kernels.jvp: {name_of(func)} has no forward-mode rule in PyTorch: {error}"
            ) from error
        raise
    _refuse_lost_tangents(func, args, kwargs, result)
    if not differentiable:
        _release_graphs(result)
    return result, why


_IN_PLACE = frozenset(
    name
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and len(name) > 6)
)
_IN_PLACE_METHODS = frozenset(getattr(Tensor, name) for name in _IN_PLACE)


def _writes_in_graph(func: Any) -> bool:
    return not isinstance(func, torch._ops.HigherOrderOperator) and _method_name(func) in _IN_PLACE


def _apart(args: Any, kwargs: Any) -> Any:
    """Copies in-place arguments that share memory with the tensor written: PyTorch's rules read them then."""
    written = args[0]

    def apart(x: Any) -> Any:
        return x.clone() if can_move(x) and _may_be_same_memory(x, written) else x

    if len(args) == 2 and not kwargs:
        return (written, apart(args[1])), kwargs
    rest, named = pytree.tree_map(apart, (args[1:], kwargs))
    return (written, *rest), named


def _may_be_same_memory(x: Tensor, y: Any) -> bool:
    if not isinstance(y, Tensor) or x.shape != y.shape:
        return False
    if torch.compiler.is_compiling():
        return True
    if x.stride() != y.stride() or x.storage_offset() != y.storage_offset():
        return False
    return bool(torch._C._is_alias_of(x, y))  # type: ignore[attr-defined]


def _expect_some(index: Any) -> None:
    """Asserts that data-dependent indices are not empty, as forward mode needs."""
    for places in index if isinstance(index, tuple) else (index,):
        if isinstance(places, Tensor) and places.dtype == torch.int64 and guard_or_true(places.numel() != 0):
            torch._check(places.numel() >= 1)


def _seen(function: Callable[..., Any], differentiable: bool) -> Callable[..., Any]:
    """Makes a function's calls of PyTorch seen: torch.compile leaves the mode for what it checkpoints."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _Calls(differentiable):
            return function(*args, **kwargs)

    return call


class _AnyMode(TorchDispatchMode):
    """A dispatch mode without effect."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def _by_pytorch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], differentiable: bool) -> Any:
    if torch.compiler.is_compiling() and getattr(func, "__module__", None) == "torch._tensor":
        # torch.compile follows a call of a method written in Python, not of its function.
        return getattr(args[0], _method_name(func))(*args[1:], **kwargs)
    if differentiable:
        func = REWRITTEN_IF_DIFFERENTIABLE.get(func, func)
    own = differentiable and not torch.compiler.is_compiling() and func in WRITES_INTO_ITS_GRAPH
    func = REWRITTEN.get(func, func)
    if torch.compiler.is_compiling():
        func = REWRITTEN_WHILE_COMPILING.get(func, func)
    attention = func is F.scaled_dot_product_attention  # only plain attention has a derivative in PyTorch
    if attention or own:
        plain = sdpa_kernel(SDPBackend.MATH) if attention else contextlib.nullcontext()
        with plain, _AnyMode() if own else contextlib.nullcontext():
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _path(result: Any) -> str:
    return PYTORCHS if any(map(carries_tangent, pytree.tree_leaves(result))) else NO_TANGENT


def _refuse(func: Any, args: Any, kwargs: Any, reasons: dict[Any, str] = REFUSED) -> None:
    with contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        if not any(map(carries_tangent, pytree.tree_leaves((args, kwargs)))):
            return
    if func in reasons:
        raise NotImplementedError(f"imf_kernels.jvp: {reasons[func]}")
    raise NotImplementedError(
        f"imf_kernels.jvp: {name_of(func)} is called in torch.inference_mode, which drops tangents; enter "
        "torch.no_grad in its place"
    )


@constant
def _operator_name(func: Any) -> str:
    return func._qualified_op_name if isinstance(func, torch._ops.OpOverloadPacket) else func.name()


def _refuse_lost_tangents(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Raises for other libraries' operators and control flow, whose tangents PyTorch silently leaves out."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        refused = CONTROL_FLOW
    elif isinstance(func, _OPERATORS):
        name = _operator_name(func)
        if name.startswith(("aten::", "prim")):
            return
        refused = (
            f"the operator {name} has no forward-mode rule; PyTorch would leave its tangent out in silence. "
            "Detach its inputs if it needs none"
        )
    else:
        return
    lost = any(can_move(y) and not carries_tangent(y) for y in pytree.tree_leaves(result))
    if lost and any(map(carries_tangent, pytree.tree_leaves((args, kwargs)))):
        raise NotImplementedError(f"imf_kernels.jvp: {refused}")


def _release_graphs(result: Any) -> None:
    """Releases PyTorch's graphs of tangents, through which no gradient flows."""
    for y in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(y, Tensor) and y.requires_grad:
            _, tangent = unpack_dual_tensor(y)
            if tangent is not None and tangent.requires_grad and not tangent._is_view():
                tangent.detach_()


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...] = (),
    *,
    strict: bool = False,
    has_aux: bool = False,
    differentiable: bool = False,
    **of_functional: Any,
) -> Any:
    """Computes func(*primals) and its derivative along the tangents: `torch.func.jvp` for training.

    Gradients flow through the primal outputs, to inputs and weights, as if `func` had been called directly.
    None flows through the returned tangents, unless they are to be `differentiable`: differentiating them
    raises an error, `.detach()` makes them plain data.

    Args:
        func: any function or module made of PyTorch's calls, unmodified. Linear layers, attention,
            normalisations and activations run on this library's operations, convolutions and products by its
            rules; every other call follows PyTorch's forward-mode rule, and one that has none raises.
            Compiled parts run eagerly: compile the function that calls `jvp`.
        primals: arguments of `func`, tensors or pytrees of them.
        tangents: in the structure of `primals`, each of its primal's shape and device, cast if of another
            floating-point dtype, and without grad unless `differentiable`; `None`, unlike in
            `torch.func.jvp`, for an argument without a tangent.
        strict: raise if an output does not depend on the inputs, instead of returning a tangent of zeros.
        has_aux: `func` returns (output, aux); aux is returned unchanged, without tangents.
        differentiable: gradients flow through the returned tangents too, to weights, primals and tangents. A
            loss may use outputs and tangents; one backward serves both. Tangents then are part of the graph,
            with the memory that it takes.

    Returns:
        (output, tangent), each in the structure of func's result; with `has_aux` followed by aux.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        NotImplementedError: a call that has no forward-mode rule.
        RuntimeError: inside another forward-mode derivative; with `strict`, an independent output.
    """
    for name in of_functional:
        raise TypeError(f"jvp: there is no argument {name!r}{_ADVICE.get(name, '')}")
    if not isinstance(differentiable, bool):
        raise TypeError(f"jvp: differentiable must be True or False, got {differentiable!r}")
    return _jvp(func, primals, tangents, strict, has_aux, differentiable, _Calls)


# Arguments of torch.autograd.functional.jvp.
_ADVICE = {
    "v": "; hand it as `tangents`, a tuple like `primals`: jvp(func, (x,), (v,))",
    "create_graph": "; leave it out: gradients always flow through primal outputs, and with "
    "differentiable=True through tangents",
    "inputs": "; hand them as `primals`, a tuple: jvp(func, (x,), (v,))",
}


# PyTorch has one dual level per process: the jvps of several threads take turns.
_ONE_LEVEL = threading.Lock()
_TURN = 600.0  # seconds that a thread waits


def _jvp(
    func: Callable[..., Any],
    primals: Any,
    tangents: Any,
    strict: bool,
    has_aux: bool,
    differentiable: bool,
    calls: Callable[[bool], _Calls],
) -> Any:
    pairs, structure = _pairs(primals, tangents, differentiable)
    if torch.compiler.is_compiling():
        if fwAD._current_level >= 0:
            raise RuntimeError(_NESTED)
        if not torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(_NOT_STRICT)
        refuse_while_tracing()
        serve_packages()
        with fwAD._set_fwd_grad_enabled(True), fwAD.dual_level():
            duals = [_dual_input(x, x_dot) for x, x_dot in pairs]
            traced_jvp.depth += 1
            traced_jvp.differentiable = differentiable
            with calls(differentiable):
                result = func(*_arguments(duals, structure))
            traced_jvp.depth -= 1
            return _taken_apart(result, strict, has_aux, differentiable)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "imf_kernels.jvp: called inside a transform of torch.func (grad, vjp, vmap, functionalize …), "
            "which it does not nest in; torch.func.jvp does, and grad of jvp's primal outputs is .backward()"
        )
    return _without_compiler()(func, pairs, structure, strict, has_aux, differentiable, calls)


_NESTED = (
    "imf_kernels.jvp: called inside another forward-mode derivative (jvp, torch.func.jvp or "
    "dual_level), in which it does not nest; torch.func.jvp inside torch.func.jvp does"
)

_NOT_STRICT = "imf_kernels.jvp: torch.export follows it with strict=True alone, got strict=False"
_INSIDE = (
    "imf_kernels.jvp: a forward-mode derivative (torch.func.jvp, jacfwd, hessian …) inside, in which it does "
    "not nest; torch.func.jvp around it does"
)


def _without_compiler() -> Callable[..., Any]:
    """Returns `_eagerly`: after a graph break torch.compile must not compile its calls, without tangents."""
    return _disabled() if "torch._dynamo" in sys.modules else _eagerly


@functools.cache
def _disabled() -> Callable[..., Any]:
    return torch._dynamo.disable(_eagerly)


def _eagerly(
    func: Any,
    pairs: Any,
    structure: Any,
    strict: bool,
    has_aux: bool,
    differentiable: bool,
    calls: Callable[[bool], _Calls],
) -> Any:
    if not inside.run.over:
        raise RuntimeError(_NESTED)
    _say_what_runs_eagerly(func)
    if not _ONE_LEVEL.acquire(timeout=_TURN):
        raise RuntimeError(
            f"imf_kernels.jvp: another thread has been inside jvp for {_TURN:g} s, and one runs at a time. "
            "Does it wait for this thread?"
        )
    run = Run(differentiable)
    run.again = functools.partial(_again, calls)
    try:
        if fwAD._current_level >= 0:
            raise RuntimeError(_NESTED)
        inference = torch.is_inference_mode_enabled()  # it has no tangents
        with _outside_inference_mode() if inference else contextlib.nullcontext():
            return _at_a_level(func, pairs, structure, strict, has_aux, run, calls)
    finally:
        run.over = True
        _ONE_LEVEL.release()


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _again(calls: Callable[[bool], _Calls], func: Any, primals: Any, tangents: Any) -> None:
    """Runs a part of a differentiable jvp again, for the tensors that it saves."""
    pairs = list(zip(primals, tangents, strict=True))

    def call(*inputs: Any) -> Any:
        func(*inputs)
        return torch.empty(0)

    _eagerly(call, pairs, None, False, False, True, calls)


def _at_a_level(
    func: Any,
    pairs: Any,
    structure: Any,
    strict: bool,
    has_aux: bool,
    run: Run,
    calls: Callable[[bool], _Calls],
) -> Any:
    def mode() -> _Inside:
        return _Inside(calls(run.differentiable), run)

    with fwAD._set_fwd_grad_enabled(True), fwAD.dual_level():
        inputs = [_dual_input(x, x_dot) for x, x_dot in pairs]
        with Surroundings(mode), mode():
            try:
                result = func(*_arguments(inputs, structure))
            except (NotImplementedError, RuntimeError) as error:
                if str(error).startswith("Nested forward mode AD"):
                    raise NotImplementedError(_INSIDE) from error
                _name_function_without_rule(error)
                raise
        return _taken_apart(result, strict, has_aux, run.differentiable)


_asked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _say_what_runs_eagerly(func: Any) -> None:
    """Logs once which parts of a module torch.compile made, as they run eagerly here."""
    if "torch._dynamo" not in sys.modules or not isinstance(func, torch.nn.Module) or func in _asked:
        return
    _asked.add(func)
    compiled = [
        name or type(module).__name__
        for name, module in func.named_modules()
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
    ]
    if compiled:
        logger.info(
            "jvp runs eagerly what torch.compile made: %s. Compile the function that calls jvp",
            ", ".join(compiled),
        )


class _Inside:
    """Context of a thread inside a run of jvp, whose calls are seen."""

    def __init__(self, calls: _Calls, run: Run) -> None:
        self.calls, calls.run, self.run = calls, run, run

    def __enter__(self) -> None:
        self.calls.__enter__()
        inside.run = self.run

    def __exit__(self, *raised: Any) -> None:
        inside.run = OUTSIDE
        self.calls.__exit__(*raised)


def _dual_input(x: Any, x_dot: Tensor | None) -> Any:
    if torch.compiler.is_compiling():
        if x_dot is None:
            return x
        # Views of a dual tensor require the same memory layout and offset of its tangent.
        return make_dual_tensor(*(t.clone(memory_format=torch.contiguous_format) for t in (x, x_dot)))
    if isinstance(x, Tensor) and x.is_inference():
        x = x.clone()
    if x_dot is not None and x_dot.is_inference():
        x_dot = x_dot.clone()
    if x_dot is None:
        return x
    if x_dot.requires_grad:
        x_dot = x_dot.clone()  # in-place calls may write into it
    if not x.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(x):
        x = x.contiguous()  # a tangent has its primal's memory layout
    return make_dual_tensor(x, x_dot)


def _name_function_without_rule(error: Exception) -> None:
    """Reraises an error with the name of the autograd.Function that caused it."""
    if "jvp" not in str(error) or str(error).startswith("imf_kernels"):
        return
    trace = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        names = frame.f_locals
        # From PyTorch 2.14 on `self` is an object whose class was made of the Function.
        function = names.get("cls") or getattr(names.get("self"), "_forward_cls", None)
        if frame.f_code.co_filename.endswith("autograd/function.py") and function is not None:
            tensor_parallel = function.__module__.startswith("torch.distributed.tensor")
            advice = (
                "DTensors have no forward mode in PyTorch; parameters of FSDP2, which are gathered first, do"
                if tensor_parallel
                else "Attention of another package: call torch.nn.functional.scaled_dot_product_attention"
            )
            raise NotImplementedError(
                f"imf_kernels.jvp: the autograd.Function {function.__qualname__} has no forward-mode rule, a "
                f"static method jvp(ctx, *tangents). {advice}"
            ) from error


def _taken_apart(result: Any, strict: bool, has_aux: bool, differentiable: bool) -> Any:
    """Splits func's result into (output, tangent), with `has_aux` (output, tangent, aux)."""
    if isinstance(result, Tensor) and not has_aux:
        return _parts(result, strict, differentiable)
    aux: tuple[Any, ...] = ()
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"jvp: with has_aux func must return (output, aux), got {_about(result)}")
        result, aux = result[0], (pytree.tree_map_only(Tensor, primal_of, result[1]),)
    outputs, structure = pytree.tree_flatten(result)
    if not outputs or not all(isinstance(y, Tensor) for y in outputs):
        raise TypeError(f"jvp: func must return tensors, got {[_about(y) for y in outputs]}")
    primals_out, tangents_out = zip(*(_parts(y, strict, differentiable) for y in outputs), strict=True)
    return (
        pytree.tree_unflatten(list(primals_out), structure),
        pytree.tree_unflatten(list(tangents_out), structure),
        *aux,
    )


def _pairs(primals: Any, tangents: Any, differentiable: bool) -> tuple[list[tuple[Any, Tensor | None]], Any]:
    """Returns each leaf of the primals with its checked tangent, and the structure, `None` if flat."""
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple):
            raise TypeError(f"jvp: {name} must be a tuple, as in jvp(f, (x,), (x_dot,)); got {_about(value)}")
    structure = None
    if not (
        len(primals) == len(tangents)
        and all(isinstance(x, Tensor) for x in primals)
        and all(t is None or isinstance(t, Tensor) for t in tangents)
    ):
        primals, structure = pytree.tree_flatten(primals)
        tangents, tangent_structure = pytree.tree_flatten(tangents)
        if structure != tangent_structure:
            raise ValueError(
                "jvp: tangents must have the structure of primals, with None for no tangent; "
                f"got {tangent_structure} for {structure}"
            )
    pairs = zip(primals, tangents, strict=True)
    return [
        (x, t if t is None else _checked(i, x, t, differentiable)) for i, (x, t) in enumerate(pairs)
    ], structure


def _arguments(inputs: list[Any], structure: Any) -> Any:
    return inputs if structure is None else pytree.tree_unflatten(inputs, structure)


def _checked(i: int, x: Any, x_dot: Any, differentiable: bool) -> Tensor:
    if not can_move(x):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"jvp: primal {i} must be a floating-point tensor to have a tangent, got {got}")
    if not isinstance(x_dot, Tensor):
        raise TypeError(f"jvp: tangent {i} must be a tensor or None, got {type(x_dot).__name__}")
    same_kind = x.is_floating_point()
    fits = x_dot.is_floating_point() if same_kind else x_dot.dtype == x.dtype
    if x_dot.shape != x.shape or x_dot.device != x.device or not fits:
        raise ValueError(
            f"jvp: tangent {i} must be a {list(x.shape)} {'floating-point' if same_kind else x.dtype} tensor "
            f"on {x.device} like its primal, got {list(x_dot.shape)} of {x_dot.dtype} on {x_dot.device}"
        )
    if x_dot.requires_grad and not differentiable:
        raise ValueError(
            f"jvp: tangent {i} requires grad, but no gradient flows through tangents; pass tangent.detach(), "
            "or differentiable=True"
        )
    return in_dtype(x_dot, x.dtype)


def _parts(y: Tensor, strict: bool, differentiable: bool) -> tuple[Tensor, Tensor]:
    if not can_move(y):
        return y, torch.zeros_like(y)
    primal, tangent = unpack_dual_tensor(y)
    if tangent is None:
        if strict:
            raise RuntimeError(
                "jvp: with strict=True every output must depend on an input that has a tangent; an output of "
                f"shape {list(y.shape)} does not"
            )
        tangent = torch.zeros_like(primal)
    if differentiable:
        return primal, in_dtype(tangent, primal.dtype)
    return primal, guarded(in_dtype(tangent.detach(), primal.dtype), primal)


def _about(x: Any) -> str:
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
