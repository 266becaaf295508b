"""The derivative of an unmodified function or module along tangents, in the place of `torch.func.jvp`.

The tangents travel in PyTorch's own dual tensors (`torch.autograd.forward_ad`), so that views, in-place
methods, indexing and whatever else PyTorch has a forward-mode rule for keep their meaning, and modules that
insist on a tensor get one. What is different from `torch.func.jvp`:

- A call that this library has an operation for goes there (rules.py): primal and tangent in one pass,
  attention without the matrix of its weights.
- No gradient flows through tangents: the graph that PyTorch records of a tangent is let go after every call.
- Dual tensors are ordinary tensors, without the wrappers of `torch.func`: hooks run, so DDP, FSDP2 and
  profilers work.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from imf_kernels.dual import Dual, guarded
from imf_kernels.dual_tensors import primal_of, unpack_dual_tensor
from imf_kernels.rules import ARITHMETIC_WHILE_COMPILING, RULES, ZEROS_WHILE_COMPILING

# Attention's plain form is the only one of PyTorch's that has a derivative.
_WITH_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def _carries_tangent(x: Any) -> bool:
    moves = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return moves and unpack_dual_tensor(x)[1] is not None


def _as_dual(x: Any) -> Any:
    """A dual tensor of PyTorch as a `Dual`, anything else as it is."""
    if type(x) is not Tensor or not x.is_floating_point():
        return x
    primal, tangent = unpack_dual_tensor(x)
    return x if tangent is None else Dual(primal, tangent.detach())


def _as_tensor(y: Any) -> Any:
    """The reverse."""
    if not isinstance(y, Dual):
        return y
    return y.primal if y.tangent_rows is None else fwAD.make_dual(y.primal, y.tangent_rows)


def _with_zeros(x: Any) -> Any:
    """A tensor without a tangent with one of zeros, anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or _carries_tangent(x):
        return x
    x = x.contiguous()  # of an expanded one the layout could not be kept
    return fwAD.make_dual(x, torch.zeros_like(x))


# By which path the tangent of a call comes.
OURS, PYTORCHS, NONE = "imf_kernels", "PyTorch's rule", "no tangent"


class _Calls(TorchFunctionMode):
    """Sees every call of PyTorch, and sends it where its tangent is computed."""

    def __init__(
        self,
        seen: Callable[[Any, str, float], None] | None = None,
        synchronize: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.seen, self.synchronize = seen, synchronize or (lambda: None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.seen is None:
            return _call(func, args, kwargs)[0]
        self.synchronize()
        start = time.perf_counter()
        result, ours = _call(func, args, kwargs)
        self.synchronize()
        self.seen(func, OURS if ours else _path(result), time.perf_counter() - start)
        return result


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The result of a call; and whether one of our operations made it."""
    rule = RULES.get(func)
    if rule is None and torch.compiler.is_compiling() and len(args) == 2 and not kwargs:
        rule = ARITHMETIC_WHILE_COMPILING.get(_method_name(func))
    if rule is not None:
        given, named = [_as_dual(x) for x in args], {name: _as_dual(x) for name, x in kwargs.items()}
        if any(isinstance(x, Dual) for x in (*given, *named.values())):
            result = rule(*given, **named)
            if result is not NotImplemented:
                return _as_tensor(result), True
    if torch.compiler.is_compiling():
        if func in ZEROS_WHILE_COMPILING and any(map(_carries_tangent, pytree.tree_leaves(args))):
            args = pytree.tree_map(_with_zeros, args)
        return _by_pytorch(func, args, kwargs), False
    try:
        result = _by_pytorch(func, args, kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if any(words in str(error) for words in ("forward AD", "forward grad")):
            raise NotImplementedError(
                f"imf_kernels.jvp: {_name(func)} has no forward-mode rule in PyTorch: {error}"
            ) from error
        raise
    _refuse_lost_tangents(func, args, kwargs, result)
    _release_graphs(result)
    return result, False


def _by_pytorch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() and getattr(func, "__module__", None) == "torch._tensor":
        # A method that PyTorch writes in Python: torch.compile follows the call of one, not the function.
        return getattr(args[0], _method_name(func))(*args[1:], **kwargs)
    if func in _WITH_ATTENTION:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _method_name(func: Any) -> str:
    """The name of a method, behind the decorator of those that PyTorch writes in Python.

    From PyTorch 2.15 on torch.compile reads the name of the decorator's own function, "wrapped", from them.
    """
    return getattr(getattr(func, "__wrapped__", func), "__name__", "")


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__qualname__", repr(func))


def _path(result: Any) -> str:
    return PYTORCHS if any(map(_carries_tangent, pytree.tree_leaves(result))) else NONE


def _refuse_lost_tangents(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Operators of other libraries give no tangent, and PyTorch says nothing."""
    if isinstance(func, torch._ops.OpOverload):
        name = func.name()
    elif isinstance(func, torch._ops.OpOverloadPacket):
        name = func._qualified_op_name
    else:
        return
    if name.partition("::")[0] in ("aten", "prim", "prims"):
        return
    if any(map(_carries_tangent, pytree.tree_leaves((args, kwargs)))) and _path(result) == NONE:
        raise NotImplementedError(
            f"imf_kernels.jvp: the operator {name} has no forward-mode rule; PyTorch would leave its tangent "
            "out in silence. Detach its inputs if it needs none"
        )


def _release_graphs(result: Any) -> None:
    """No gradient flows through tangents: lets go of what PyTorch recorded to differentiate them."""
    for y in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(y, Tensor) and y.requires_grad:
            tangent = fwAD.unpack_dual(y).tangent
            if tangent is not None and tangent.requires_grad and not tangent._is_view():
                tangent.detach_()


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """func(*primals) and its derivative along the tangents, in one pass: `torch.func.jvp` for training.

    Gradients flow through the primal outputs, to inputs and weights, as if `func` had been called by itself.
    None flows through the tangents that come back: differentiating them raises an error, `.detach()` makes
    them plain data.

    Args:
        func: any function or module made of PyTorch's calls, unmodified. Linear layers, attention,
            normalisations and activations run on this library's operations; every other call follows
            PyTorch's forward-mode rule, and one that has none raises. Parts of it that torch.compile made run
            eagerly: compile the function that calls `jvp`.
        primals: arguments of `func`, tensors or pytrees of them.
        tangents: in the structure of `primals`, each of its primal's shape, dtype and device, and without
            grad; `None` where an argument has no tangent, which `torch.func.jvp` does not take.
        strict: raise where an output does not depend on the inputs, in the place of a tangent of zeros.
        has_aux: `func` returns (output, aux); aux is handed on as it is, without tangents.

    Returns:
        (output, tangent), each in the structure of what `func` returns; with `has_aux` aux behind them.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        NotImplementedError: a call that has no forward-mode rule.
        RuntimeError: inside another forward-mode derivative; with `strict`, an independent output.
    """
    return _jvp(func, primals, tangents, strict, has_aux, _Calls())


def _jvp(
    func: Callable[..., Any], primals: Any, tangents: Any, strict: bool, has_aux: bool, calls: _Calls
) -> Any:
    pairs, structure = _pairs(primals, tangents)
    if fwAD._current_level >= 0:
        raise RuntimeError(
            "imf_kernels.jvp: called inside another forward-mode derivative (jvp, torch.func.jvp or "
            "dual_level), in which it does not nest; torch.func.jvp inside torch.func.jvp does"
        )
    with fwAD.dual_level():
        duals = [x if x_dot is None else fwAD.make_dual(x, x_dot) for x, x_dot in pairs]
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _surroundings(), calls:
            result = func(*pytree.tree_unflatten(duals, structure))
        aux: tuple[Any, ...] = ()
        if has_aux:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(f"jvp: with has_aux func must return (output, aux), got {_about(result)}")
            result, aux = result[0], (pytree.tree_map_only(Tensor, primal_of, result[1]),)
        outputs, structure = pytree.tree_flatten(result)
        if not outputs or not all(isinstance(y, Tensor) for y in outputs):
            raise TypeError(f"jvp: func must return tensors, got {[_about(y) for y in outputs]}")
        parts = [_parts(y, strict) for y in outputs]
    primals_out, tangents_out = zip(*parts, strict=True)
    return (
        pytree.tree_unflatten(list(primals_out), structure),
        pytree.tree_unflatten(list(tangents_out), structure),
        *aux,
    )


def _pairs(primals: Any, tangents: Any) -> tuple[list[tuple[Any, Tensor | None]], Any]:
    """Each leaf of the primals with its tangent, checked; and the primals' structure."""
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple):
            raise TypeError(f"jvp: {name} must be a tuple, as in jvp(f, (x,), (x_dot,)); got {_about(value)}")
    leaves, structure = pytree.tree_flatten(primals)
    tangent_leaves, tangent_structure = pytree.tree_flatten(tangents)
    if structure != tangent_structure:
        raise ValueError(
            "jvp: tangents must have the structure of primals, with None for no tangent; "
            f"got {tangent_structure} for {structure}"
        )
    for i, (x, x_dot) in enumerate(zip(leaves, tangent_leaves, strict=True)):
        if x_dot is not None:
            _check_tangent(i, x, x_dot)
    return list(zip(leaves, tangent_leaves, strict=True)), structure


def _check_tangent(i: int, x: Any, x_dot: Any) -> None:
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"jvp: primal {i} must be a floating-point tensor to have a tangent, got {got}")
    if not isinstance(x_dot, Tensor):
        raise TypeError(f"jvp: tangent {i} must be a tensor or None, got {type(x_dot).__name__}")
    if x_dot.shape != x.shape or x_dot.dtype != x.dtype or x_dot.device != x.device:
        raise ValueError(
            f"jvp: tangent {i} must be {list(x.shape)} of {x.dtype} on {x.device} like its primal, "
            f"got {list(x_dot.shape)} of {x_dot.dtype} on {x_dot.device}"
        )
    if x_dot.requires_grad:
        raise ValueError(
            f"jvp: tangent {i} requires grad, but no gradient flows through tangents; pass tangent.detach()"
        )


def _parts(y: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
    if not (y.is_floating_point() or y.is_complex()):
        return y, torch.zeros_like(y)
    primal, tangent = unpack_dual_tensor(y)
    if tangent is None:
        if strict:
            raise RuntimeError(
                "jvp: with strict=True every output must depend on an input that has a tangent; an output of "
                f"shape {list(y.shape)} does not"
            )
        tangent = torch.zeros_like(primal)
    tangent = tangent.detach()
    return primal, tangent if torch.compiler.is_compiling() else guarded(tangent, primal)


def _about(x: Any) -> str:
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """What eager PyTorch needs around `func`, as far as it is loaded."""
    fsdp = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            # Code that torch.compile made knows nothing of tangents, and would drop them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if fsdp is not None:
            # FSDP2 sends what enters a module through a function that returns it as it is. Forward mode wants
            # a view of the tangent there; its rule gives the tangent itself (2.13) or does not exist (2.11).
            function = fsdp.RegisterPostBackwardFunction
            stack.callback(setattr, function, "jvp", staticmethod(function.jvp))
            function.jvp = staticmethod(_views)
        yield


def _views(ctx: Any, param_group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.view_as(t) for t in tangents)


@dataclass
class Calls:
    """The calls of one function of PyTorch that `explain` has seen.

    Attributes:
        name: as PyTorch documents it.
        path: "imf_kernels" (an operation of this library), "PyTorch's rule" or "no tangent".
        count: how many.
        seconds: in all.
    """

    name: str
    path: str
    count: int = 0
    seconds: float = 0.0


def explain(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False
) -> list[Calls]:
    """Prints which calls of `func` take which path inside `jvp`, and their share of its time.

    Runs it twice and times the second; on a GPU it waits for each call.

    Args:
        func, primals, tangents, has_aux: as of `jvp`.

    Returns:
        What it printed, the longest first.
    """
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in pytree.tree_leaves(primals))
    seen: dict[tuple[str, str], Calls] = {}

    def record(function: Any, path: str, seconds: float) -> None:
        name = _name(function)
        calls = seen.setdefault((name, path), Calls(name, path))
        calls.count += 1
        calls.seconds += seconds

    for _ in range(2):
        seen.clear()
        _jvp(
            func,
            primals,
            tangents,
            False,
            has_aux,
            _Calls(record, torch.cuda.synchronize if on_gpu else None),
        )
    ranked = sorted(seen.values(), key=lambda calls: -calls.seconds)
    total = sum(calls.seconds for calls in ranked) or 1.0
    width = max((len(calls.name) for calls in ranked), default=4)
    print(f"{'call':{width}}  {'path':14}  {'count':>5}  {'time':>5}")
    for calls in ranked:
        print(f"{calls.name:{width}}  {calls.path:14}  {calls.count:5}  {calls.seconds / total:5.1%}")
    return ranked
