"""Runs of a function inside `jvp`, seen call by call and module by module."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import re
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from imf_kernels.transforms import dual_tensors
from imf_kernels.transforms.dual_tensors import can_move, unpack_dual_tensor
from imf_kernels.transforms.jvp import _Calls, _jvp

StandIns = dict[nn.Module, Callable[..., Any]]


@dataclass(eq=False)
class Value:
    """A tensor that calls take and make; the same object where it is the same tensor, unmodified."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    moves: bool  # it has a tangent
    requires_grad: bool
    maker: Call | None


@dataclass(eq=False)
class Call:
    """A call of PyTorch, or of an operation of this library, with the modules around it, outermost first.

    Attributes:
        kind: its name without what tells methods, operators and in-place forms apart.
        given: its arguments, those by name last, tensors as `Value`s.
        end: time in nanoseconds.
    """

    name: str
    path: str
    why: str
    kind: str
    given: list[Any]
    named: dict[str, Any]
    made: list[Value]
    modules: tuple[nn.Module, ...]
    seconds: float
    end: int = field(default_factory=time.time_ns)

    @property
    def tensors(self) -> list[Value]:
        return [x for x in self.given if isinstance(x, Value)]


@dataclass(eq=False)
class Visit:
    """A call of a network: its inputs and all else that its outputs depend on.

    Attributes:
        calls: the range of its calls among those of the run.
        draws: it has drawn random numbers.
    """

    module: nn.Module
    inputs: list[Any]
    structure: Any
    versions: list[int]
    calls: range
    draws: bool = False
    outputs: list[Any] = field(default_factory=list)


class Run:
    """A run of `func` inside `jvp`, recorded.

    Args:
        func, primals, tangents, has_aux: as of `jvp`.
        stand_ins: what is called instead of a module.

    Attributes:
        calls: in their order.
        outermost: modules that no other one calls.
        entered: modules in the order of their calls.
        visits: of modules that hold half of the parameters of the outermost one, or more.
        names: of the modules, with * for numbers.
        result: of `jvp`.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        primals: tuple[Any, ...],
        tangents: tuple[Any, ...],
        has_aux: bool = False,
        stand_ins: StandIns | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.visits: list[Visit] = []
        self.result: Any = None
        self.outermost: list[nn.Module] = []
        self.names: dict[nn.Module, str] = {}
        self.stack: list[nn.Module] = []
        self.entered: list[nn.Module] = []
        self.values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self.sizes: dict[nn.Module, int] = {}
        if isinstance(func, nn.Module):
            self._name(func)
        gpu = on_gpu(primals)
        record = self._record
        dual_tensors.watch.seen = record
        try:
            with called_instead(stand_ins or {}, self._visited):
                self.result = _jvp(
                    *(func, primals, tangents, False, has_aux, False),
                    lambda graph: _Calls(graph, record, torch.cuda.synchronize if gpu else None),
                )
        finally:
            dual_tensors.watch.seen = None
            self.values.clear()

    def where(self, call: Call) -> str:
        """Returns the name of the module that made a call; its class if it has none."""
        return self.place(call.modules[-1]) if call.modules else ""

    def place(self, module: nn.Module) -> str:
        return self.names.get(module) or type(module).__name__

    def _name(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            self.names.setdefault(part, re.sub(r"\d+", "*", name))

    def _record(self, name: str, path: str, why: str, seconds: float, arguments: Any, result: Any) -> None:
        end = time.time_ns()
        if name.endswith("__get__"):  # an attribute
            return
        with torch._C.DisableTorchFunction():
            args, kwargs = arguments
            kind, reflected, in_place = _kind(name)
            given = [self._value(x) for x in pytree.tree_leaves(args)]
            named = {key: self._value(x) for key, x in kwargs.items()}
            call = Call(
                *(name, path, why, kind, [*(given[::-1] if reflected else given), *named.values()]),
                *(named, [], tuple(self.stack), seconds, end),
            )
            in_place = in_place or kwargs.get("out") is not None
            results = pytree.tree_leaves(args[0] if kind == "setitem" else result)
            call.made = [self._value(y, call, in_place) for y in results if isinstance(y, Tensor)]
        self.calls.append(call)

    def _value(self, x: Any, maker: Call | None = None, modified: bool = False) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = self.values.get(id(x))
        if known is not None and known[0]() is x and not modified:
            return known[1]
        moves = can_move(x) and unpack_dual_tensor(x)[1] is not None
        value = Value(tuple(x.shape), x.dtype, x.device, moves, x.requires_grad, maker)
        self.values[id(x)] = weakref.ref(x), value
        return value

    @contextlib.contextmanager
    def _visited(self, module: nn.Module, arguments: Any) -> Iterator[Callable[[Any], None]]:
        if not self.stack:
            self._name(module)
            if module not in self.outermost:
                self.outermost.append(module)
        visit = self._visit(module, arguments) if self._is_main(module) else None
        self.entered.append(module)
        self.stack.append(module)
        random = None if visit is None else _random_state()

        def returned(result: Any) -> None:
            if visit is None:
                return
            with torch._C.DisableTorchFunction():
                visit.draws = any(
                    not torch.equal(x, y) for x, y in zip(random or [], _random_state(), strict=True)
                )
                visit.outputs = [_parts(y) for y in pytree.tree_leaves(result)]
            visit.calls = range(visit.calls.start, len(self.calls))
            self.visits.append(visit)

        try:
            yield returned
        finally:
            self.stack.pop()

    def _is_main(self, module: nn.Module) -> bool:
        root = self.stack[0] if self.stack else module
        with torch._C.DisableTorchFunction():
            for part in (root, module):
                if part not in self.sizes:
                    self.sizes[part] = sum(p.numel() for p in part.parameters())
        return 2 * self.sizes[module] >= self.sizes[root] > 0

    def _visit(self, module: nn.Module, arguments: Any) -> Visit:
        leaves, structure = pytree.tree_flatten(arguments)
        with torch._C.DisableTorchFunction():
            inputs = [_parts(x) for x in leaves]
            versions = _versions([*module.parameters(), *module.buffers()])
        return Visit(module, inputs, structure, versions, range(len(self.calls), len(self.calls)))


_OPERATOR = re.compile(r"__([ri]?)(add|sub|mul|truediv|div|pow|matmul)__")
_SAME = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}


def _kind(name: str) -> tuple[str, bool, bool]:
    """Returns a call's name without its form, if its operands are swapped, and if it is in place."""
    short = name.rpartition(".")[2]
    operator = _OPERATOR.fullmatch(short)
    form, kind = operator.groups() if operator else ("", short.strip("_"))
    in_place = form == "i" or short.endswith(kind + "_") or kind == "setitem"
    return _SAME.get(kind, kind), form == "r", in_place


def _versions(tensors: list[Tensor]) -> list[int]:
    return [-1 if x.is_inference() else x._version for x in tensors]


def _parts(x: Any) -> Any:
    """Returns a tensor's primal and tangent, detached, and the primal's version; anything else unchanged."""
    if not isinstance(x, Tensor):
        return x
    primal, tangent = unpack_dual_tensor(x) if can_move(x) else (x, None)
    tangent = None if tangent is None else tangent.detach()
    return primal.detach(), tangent, _versions([primal])[0]


def _random_state() -> list[Tensor]:
    on_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_gpus else [])]


def fastest(
    count: int,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    has_aux: bool = False,
) -> Run:
    """Runs a function `count` times and returns the last run, with the least seconds of each of its calls."""
    runs: list[Run] = []
    for _ in range(count):
        runs.append(Run(func, primals, tangents, has_aux))
        runs[-1].result = None  # which holds the graph
    *others, last = runs
    names = [call.name for call in last.calls]
    for run in others:
        if [call.name for call in run.calls] == names:
            for call, other in zip(last.calls, run.calls, strict=True):
                call.seconds = min(call.seconds, other.seconds)
    return last


@dataclass
class Memory:
    """Bytes of tensors over a run.

    Attributes:
        times: of allocations and releases, in nanoseconds.
        held: bytes before the first of them and after each.
    """

    run: Run
    times: list[int]
    held: list[int]

    def of(self, call: Call) -> int:
        """Returns the additional bytes at the peak of a call."""
        start = call.end - round(1e9 * call.seconds)
        first, last = bisect.bisect_left(self.times, start), bisect.bisect_right(self.times, call.end)
        return max(self.held[first : last + 1]) - self.held[first]


def profiled(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    has_aux: bool = False,
    stand_ins: StandIns | None = None,
) -> Memory:
    """Runs a function and asks PyTorch's profiler for the memory; the last `held` is what its graph keeps."""
    gpu = on_gpu(primals)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds, profile_memory=True) as record:
        run = Run(func, primals, tangents, has_aux, stand_ins)
    run.result = None
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e for e in events if e.device_type() == device), key=lambda e: e.start_ns())
    held = [0, *itertools.accumulate(e.nbytes() for e in events)]
    return Memory(run, [e.start_ns() for e in events], held)


def on_gpu(primals: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_cuda for x in pytree.tree_leaves(primals))


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module as it is, inside `called_instead` too."""
    return _CALL(module, *args, **kwargs)


_CALL = nn.Module.__call__


@contextlib.contextmanager
def called_instead(
    stand_ins: StandIns,
    around: Callable[[nn.Module, Any], Any] | None = None,
) -> Iterator[None]:
    """Calls stand-ins instead of their modules, and enters a context around each call of a module.

    Args:
        around: is given a module and its arguments; its context takes the result.
    """
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = stand_ins.get(module) or (lambda *args, **kwargs: original(module, *args, **kwargs))
        if around is None:
            return function(*args, **kwargs)
        with around(module, (args, kwargs)) as returned:
            result = function(*args, **kwargs)
            returned(result)
        return result

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def repeated(visits: list[Visit]) -> list[Visit]:
    """Returns visits whose outputs another visit of the run has too: same network, inputs and state.

    Of two it is the one without tangents, otherwise the later one. Visits inside of one another, those that
    draw random numbers, and any two of which a tensor was modified in between, are not compared.
    """
    found: list[Visit] = []
    with torch._C.DisableTorchFunction():
        for i, later in enumerate(visits):
            for earlier in visits[:i]:
                if earlier in found or later in found or not _same_result(earlier, later):
                    continue
                spare = later if _tangents(earlier) or not _tangents(later) else earlier
                inside = any(_within(spare.calls, other.calls) for other in found)
                if not inside:
                    found = [other for other in found if not _within(other.calls, spare.calls)] + [spare]
    return found


def _within(calls: range, others: range) -> bool:
    return others.start <= calls.start and calls.stop <= others.stop


def _tangents(visit: Visit) -> bool:
    return any(isinstance(x, tuple) and x[1] is not None for x in visit.inputs)


def _same_result(a: Visit, b: Visit) -> bool:
    if a.module is not b.module or a.structure != b.structure or a.draws or b.draws:
        return False
    if a.versions != b.versions or len(a.outputs) != len(b.outputs) or _within(b.calls, a.calls):
        return False
    one_without = not (_tangents(a) and _tangents(b))
    return all(_same(x, y, one_without) for x, y in zip(a.inputs, b.inputs, strict=True)) and all(
        _close(x, y) for x, y in zip(a.outputs, b.outputs, strict=True)
    )


def _same(x: Any, y: Any, primals_alone: bool) -> bool:
    if not (isinstance(x, tuple) and isinstance(y, tuple)):
        return x is y or (type(x) is type(y) and isinstance(x, (int, float, str)) and x == y)
    if any(_versions([z[0]])[0] != z[2] for z in (x, y)):  # modified since
        return False
    pairs = [(x[0], y[0])] if primals_alone else [(x[0], y[0]), (x[1], y[1])]
    return all(
        p is q or (p is not None and q is not None and p.dtype == q.dtype and torch.equal(p, q))
        for p, q in pairs
    )


def _close(x: Any, y: Any) -> bool:
    """Returns whether outputs are equal to rounding: kernels with and without tangents may differ by it."""
    if not (isinstance(x, tuple) and isinstance(y, tuple)):
        return True
    if x[0].shape != y[0].shape or x[0].dtype != y[0].dtype:
        return False
    if not x[0].is_floating_point():
        return torch.equal(x[0], y[0])
    a, b = x[0].double(), y[0].double()
    return bool((a - b).norm() <= math.sqrt(torch.finfo(x[0].dtype).eps) * a.norm())
