"""Report of the path that each call of a function takes inside `jvp`, where, why, and what to change."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from imf_kernels.transforms import dual_tensors
from imf_kernels.transforms.jvp import _Calls, _jvp


@dataclass
class Calls:
    """Calls of one function of PyTorch, or of one operation, that `explain` has seen in one place.

    Attributes:
        name: as PyTorch documents it.
        path: "imf_kernels" (an operation of this library), "PyTorch's rule" or "no tangent".
        where: the module that called it, as `named_modules` names it, with * for numbers; "" outside of all.
        why: the reason why no operation of this library served it, where there is one.
        count: number of calls.
        seconds: total time.
        memory: additional bytes of tensors at the peak of the call that needed most.
    """

    name: str
    path: str
    where: str = ""
    why: str = ""
    count: int = 0
    seconds: float = 0.0
    memory: int = 0


def explain(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False
) -> list[Calls]:
    """Prints which calls of `func` take which path inside `jvp`, their share of its time, memory, and advice.

    Runs it three times, times the second and asks PyTorch's profiler for the memory of the third; on a GPU it
    waits for each call.

    Args:
        func, primals, tangents, has_aux: as of `jvp`.

    Returns:
        The printed calls, the longest first.
    """
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in pytree.tree_leaves(primals))
    seen: dict[tuple[str, ...], Calls] = {}
    names: list[str] = []
    spans: list[tuple[Calls, int, int]] = []
    modules = _Modules(func)

    def record(name: str, path: str, why: str, seconds: float) -> None:
        end = time.time_ns()
        if name.endswith("__get__"):  # an attribute
            return
        names.append(name)
        where = modules.inside
        calls = seen.setdefault((name, path, where, why), Calls(name, path, where, why))
        calls.count += 1
        calls.seconds += seconds
        spans.append((calls, end - round(1e9 * seconds), end))

    def run() -> None:
        for found in (seen, names, spans):
            found.clear()
        with modules.followed(), _operations(record):
            _jvp(
                *(func, primals, tangents, False, has_aux, False),
                lambda graph: _Calls(graph, record, torch.cuda.synchronize if on_gpu else None),
            )

    run()
    run()
    timed = {key: calls.seconds for key, calls in seen.items()}
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, profile_memory=True) as profiled:
        run()
    _add_memory(spans, profiled, DeviceType.CUDA if on_gpu else DeviceType.CPU)
    for key, calls in seen.items():
        calls.seconds = timed.get(key, calls.seconds)
    ranked = sorted(seen.values(), key=lambda calls: -calls.seconds)
    _print(ranked)
    for advice in _advice(names):
        print(advice)
    return ranked


def _add_memory(spans: list[tuple[Calls, int, int]], profiled: Any, device: DeviceType) -> None:
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e for e in events if e.device_type() == device), key=lambda e: e.start_ns())
    times = [e.start_ns() for e in events]
    held = [0, *itertools.accumulate(e.nbytes() for e in events)]
    for calls, start, end in spans:
        first, last = bisect.bisect_left(times, start), bisect.bisect_right(times, end)
        calls.memory = max(calls.memory, max(held[first : last + 1]) - held[first])


def _print(ranked: list[Calls]) -> None:
    total = sum(calls.seconds for calls in ranked) or 1.0
    width = max((len(calls.name) for calls in ranked), default=4)
    place = max([5, *(len(calls.where) for calls in ranked)])
    head = f"{'call':{width}}  {'path':14}  {'count':>5}  {'time':>5}  {'memory':>9}  {'where':{place}}"
    print(f"{head}  not served because")
    for calls in ranked:
        share = f"{calls.seconds / total:5.1%}"
        memory = f"{calls.memory / 2**20:5.1f} MiB"
        line = f"{calls.name:{width}}  {calls.path:14}  {calls.count:5}  {share}  {memory}"
        print(f"{line}  {calls.where:{place}}  {calls.why}".rstrip())


class _Modules:
    """Tracker of the module of a function that is being called."""

    def __init__(self, func: Any) -> None:
        self.names = {}
        if isinstance(func, nn.Module):
            self.names = {module: re.sub(r"\d+", "*", name) for name, module in func.named_modules()}
        self.stack: list[str] = []

    @property
    def inside(self) -> str:
        return self.stack[-1] if self.stack else ""

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.stack.append(self.names.get(module) or type(module).__name__)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.stack.pop()

        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            self.stack.clear()
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def _operations(record: Callable[[str, str, str, float], None]) -> Iterator[None]:
    """Records each operation of this library as one call."""
    dual_tensors.watch.seen = record
    try:
        yield
    finally:
        dual_tensors.watch.seen = None


_PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")
# Sequences of calls, with others between, and their replacements.
_ADVICE = (
    (
        (_PRODUCTS, ("softmax",), _PRODUCTS),
        "matmul, softmax and matmul make the matrix of attention's weights and its tangent: call "
        "torch.nn.functional.scaled_dot_product_attention, which is one pass here",
    ),
    (
        (("pow", "__pow__", "square"), ("mean",), ("rsqrt",)),
        "x · rsqrt(mean(x²)) takes many passes: torch.nn.functional.rms_norm with an eps takes one here",
    ),
)
_BETWEEN = 6  # calls at most, between two of a sequence


def _advice(names: list[str]) -> Iterator[str]:
    short = [name.rpartition(".")[2] for name in names]
    for sequence, advice in _ADVICE:
        count = sum(_begins(sequence, short, i) for i in range(len(short)))
        if count:
            print()
            yield f"{count} times: {advice}."


def _begins(sequence: tuple[tuple[str, ...], ...], names: list[str], at: int) -> bool:
    if names[at] not in sequence[0]:
        return False
    for wanted in sequence[1:]:
        near = range(at + 1, min(at + 2 + _BETWEEN, len(names)))
        found = next((i for i in near if names[i] in wanted), None)
        if found is None:
            return False
        at = found
    return True
