"""Changes of a network that make `jvp` faster, or its graph smaller, and how much."""

from __future__ import annotations

import copy
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.advice import chains
from imf_kernels.advice.record import (
    Call,
    Run,
    StandIns,
    Value,
    call_module,
    called_instead,
    fastest,
    on_gpu,
    profiled,
    repeated,
)
from imf_kernels.backends.dispatch import logger
from imf_kernels.nn import swap
from imf_kernels.testing.timer import side_by_side
from imf_kernels.transforms.checkpoint import checkpoint
from imf_kernels.transforms.jvp import jvp

_LEAST = 1.05  # gain that is worth a line
_LEAST_BYTES = 2**26  # of a graph, that are worth a line


@dataclass
class Change:
    """A change and its gain.

    Attributes:
        what: to change.
        subject: of what takes this share, with its verb.
        share: of the time of `jvp` that they take.
        then: that they take once changed, of the time of `jvp` today.
    """

    what: str
    subject: str
    share: float
    then: float

    @property
    def gain(self) -> float:
        return 1 / (1 - self.share + self.then)

    def __str__(self) -> str:
        then = f", then about {self.then:.0%}" if self.then else ""
        return f"{self.what}. {self.subject} {self.share:.0%} of the time{then}."


@dataclass
class _Variant:
    """Modules that are changed in copies which stand in for all of a function's modules."""

    what: str
    modules: set[nn.Module]
    stand_ins: StandIns


def changes(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], has_aux: bool, run: Run
) -> list[Change]:
    """Returns changes that make `jvp` of a function faster, the largest gain first.

    Args:
        func, primals, tangents, has_aux: as of `jvp`.
        run: of this function, with the seconds of its calls.
    """

    def call(stand_ins: StandIns) -> None:
        with called_instead(stand_ins):
            jvp(func, primals, tangents, has_aux=has_aux)

    variants = [v for v in (_replaced(run), _fused(run)) if v is not None and _works(v, call)]
    forms = {"": partial(call, {})} | {v.what: partial(call, v.stand_ins) for v in variants}
    synchronize = torch.cuda.synchronize if on_gpu(primals) else lambda: None
    times = side_by_side(forms, rounds=5, seconds=0.02, synchronize=synchronize)
    total = max(times[""].best, sum(c.seconds for c in run.calls))

    def share(calls: Iterable[Call]) -> float:
        return sum(c.seconds for c in calls) / total

    found, changed = [], set[nn.Module]()
    for v in variants:
        taken = share(c for c in run.calls if not v.modules.isdisjoint(c.modules))
        rounds = [now / was for now, was in zip(times[v.what].rounds, times[""].rounds, strict=True)]
        then = max(taken - 1 + statistics.median(rounds), 0)
        change = Change(v.what, "These modules take", taken, then)
        if change.gain >= _LEAST and max(rounds) < 1:
            found.append(change)
            changed |= v.modules
    for visit in repeated(run.visits):
        calls = run.calls[visit.calls.start : visit.calls.stop]
        found.append(Change(_drop(run.place(visit.module)), "The second call takes", share(calls), 0))
    by_advice = defaultdict(list)
    for chain in chains.find(run.calls):
        if all(changed.isdisjoint(c.modules) for c in chain.calls):
            by_advice[chain.advice, chain.computes].append(chain)
    replacements: dict[Any, float] = {}
    for (advice, of), same in by_advice.items():
        for chain in same:
            if chain.key not in replacements:
                replacements[chain.key] = _seconds(chain)
        replaced = dict.fromkeys(c for chain in same for c in chain.calls)
        then = sum(replacements[chain.key] for chain in same) / total
        what = f"{advice} for {len(same)} × {of}{_at(run, [chain.calls[-1] for chain in same])}"
        found.append(Change(what, "These calls take", share(replaced), then))
    return sorted((c for c in found if c.gain >= _LEAST), key=lambda c: -c.gain)


def _drop(network: str) -> str:
    return (
        f"call {network} once where it is called twice with the same inputs: gradients flow through the "
        "output that comes with its tangent, and no gradient flows through tangents"
    )


def _at(run: Run, calls: list[Call]) -> str:
    places = list(dict.fromkeys(filter(None, map(run.where, calls))))
    return f", in {', '.join(places)}" if places else ""


def _seconds(chain: chains.Chain) -> float:
    """Times the replacement of a chain on inputs like its own."""
    primals = tuple(map(_random, chain.inputs))
    tangents = tuple(
        torch.randn_like(x) if v.moves else None for x, v in zip(primals, chain.inputs, strict=True)
    )
    return sum(call.seconds for call in fastest(3, chain.replacement, primals, tangents).calls)


def _random(value: Value) -> Tensor:
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=value.dtype, device=value.device)
    x = torch.randn(value.shape, dtype=value.dtype, device=value.device)
    return x.requires_grad_(value.requires_grad)


def _copies(run: Run) -> dict[nn.Module, nn.Module]:
    """Copies the modules of a run, which share their tensors; none if they cannot be copied."""
    roots = [m.module if isinstance(m, nn.parallel.DistributedDataParallel) else m for m in run.outermost]
    parts = [part for root in roots for part in root.modules()]
    memo: dict[int, Any] = {}
    for part in parts:
        own = (*part._parameters.values(), *part._buffers.values(), *vars(part).values())
        memo |= {id(x): x for x in own if isinstance(x, Tensor)}
    try:
        copy.deepcopy(roots, memo)
    except Exception as error:  # of objects of other people
        logger.info("explain tries no changes of modules, which cannot be copied: %s", error)
        return {}
    return {part: memo[id(part)] for part in parts}


def _works(variant: _Variant, call: Callable[[StandIns], None]) -> bool:
    try:
        call(variant.stand_ins)
    except Exception as error:  # of code of other people
        logger.info("explain leaves out a change with which jvp fails: %s: %s", variant.what, error)
        return False
    return True


def _replaced(run: Run) -> _Variant | None:
    """Copies a run's modules and replaces in the copies what `imf_kernels.nn.replace` would."""
    stand_ins = _copies(run)
    originals = {id(there): part for part, there in stand_ins.items()}
    modules, kinds = set(), Counter[str]()
    for root in [there for part, there in stand_ins.items() if part in run.outermost]:
        parts = dict(root.named_modules())
        for each in swap.swapped(root):
            if each.now and not each.was.startswith("torch.nn."):  # those run on operations as they are
                modules.add(originals[id(parts[each.name])])
                kinds[each.was.rpartition(".")[2]] += 1
    if not modules:
        return None
    what = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    return _Variant(f"imf_kernels.nn.replace(network) swaps {what}", modules, {**stand_ins})


def _fused(run: Run) -> _Variant | None:
    """Copies a run's modules and sets the flag of timm's by which they call fused attention."""
    unfused = {part for root in run.outermost for part in root.modules() if _is_unfused(part)}
    stand_ins = _copies(run) if unfused else {}
    for part in unfused & stand_ins.keys():
        stand_ins[part].fused_attn = True  # type: ignore[assignment]
    if not unfused or not stand_ins:
        return None
    places = ", ".join(dict.fromkeys(map(run.place, unfused)))
    what = f"fused_attn = True in {places}, or timm.layers.set_fused_attn() before the network is made"
    return _Variant(what, unfused, {**stand_ins})


def _is_unfused(module: nn.Module) -> bool:
    return getattr(module, "fused_attn", None) is False


def less_memory(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    has_aux: bool,
    run: Run,
    kept: int,
) -> str | None:
    """Returns the advice to checkpoint blocks, if their graph takes most of a step's memory and it halves it.

    Args:
        kept: bytes that the graph keeps.
    """
    weights = {p for root in run.outermost for p in root.parameters() if p.requires_grad}
    others = 4 * sum(p.nbytes for p in weights)  # with gradients and Adam's moments
    blocks = _blocks(run) if kept >= max(others, _LEAST_BYTES) else []
    if not blocks:
        return None
    stand_ins: StandIns = {block: partial(checkpoint, partial(call_module, block)) for block in blocks}
    then = profiled(func, primals, tangents, has_aux, stand_ins).held[-1]
    if 2 * then > kept:
        return None
    places = ", ".join(dict.fromkeys(map(run.place, blocks)))
    return (
        f"checkpoint_fn=imf_kernels.checkpoint around {places}: until backward the graph keeps "
        f"{then / 2**20:,.0f} MiB instead of {kept / 2**20:,.0f}, and backward runs their forward again."
    )


def _blocks(run: Run) -> list[nn.Module]:
    """Returns the modules in lists of a run's modules, each called once and in no other such one."""
    visited = Counter(module for module in run.entered)
    blocks: dict[nn.Module, None] = {}
    for root in run.outermost:
        for part in root.modules():
            if not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                continue
            for child in part.children():
                if visited[child] == 1 and any(True for _ in child.children()):
                    blocks[child] = None
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]
