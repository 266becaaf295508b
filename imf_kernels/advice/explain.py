"""Report of the path that each call of a function takes inside `jvp`, where, why, and what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.advice.changes import changes, less_memory
from imf_kernels.advice.record import Call, Memory, Run, fastest, profiled


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
    """Prints which calls of `func` take which path inside `jvp`, their time and memory, and what to change.

    Below the table it says which changes make `jvp` faster, each with its gain. A change of modules
    (`imf_kernels.nn.replace`, `fused_attn = True`, a second call of a network with the same inputs) it tries
    on copies of the modules that share their parameters, and measures. Calls that one call could replace
    (RMSNorm, modulation, SiLU and attention by hand) it compares with that call on inputs of the same shapes.
    Where activations take more memory than weights, their gradients and Adam's moments together, it says how
    much `imf_kernels.checkpoint` leaves.

    It runs `func` dozens of times, the more the more changes it tries; on a GPU it waits for each call. The
    network and PyTorch's random numbers are afterwards as they were, apart from what `func` itself changes:
    running statistics move as often as it runs.

    Args:
        func, primals, tangents, has_aux: as of `jvp`.

    Returns:
        The printed calls, the longest first.
    """
    used = {x.device for x in pytree.tree_leaves(primals) if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(list(used)):
        return _explain(func, primals, tangents, has_aux)


def _explain(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], has_aux: bool
) -> list[Calls]:
    Run(func, primals, tangents, has_aux)
    run = fastest(3, func, primals, tangents, has_aux)
    memory = profiled(func, primals, tangents, has_aux)
    ranked = _ranked(run, memory)
    _print(ranked)
    found = changes(func, primals, tangents, has_aux, run)
    if found:
        print("\nWhat makes jvp faster, each by itself, backward not counted:")
    for change in found:
        _say(f"{change.gain:.1f} times  ", str(change))
    advice = less_memory(func, primals, tangents, has_aux, run, memory.held[-1])
    if advice is not None:
        print("\nWhat makes its graph smaller:")
        _say("", advice)
    return ranked


def _ranked(run: Run, memory: Memory) -> list[Calls]:
    found: dict[tuple[str, ...], Calls] = {}

    def of(run: Run, call: Call) -> Calls:
        key = call.name, call.path, run.where(call), call.why
        return found.setdefault(key, Calls(*key))

    for call in run.calls:
        calls = of(run, call)
        calls.count += 1
        calls.seconds += call.seconds
    for call in memory.run.calls:
        calls = of(memory.run, call)
        calls.memory = max(calls.memory, memory.of(call))
    return sorted(found.values(), key=lambda calls: -calls.seconds)


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


def _say(head: str, advice: str) -> None:
    lines = textwrap.wrap(advice, 110 - len(head), break_long_words=False, break_on_hyphens=False)
    print(head + ("\n" + " " * len(head)).join(lines))
