"""Which backend runs an operation, and why another cannot."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("imf_kernels")
Answer = TypeVar("Answer")
Parameters = ParamSpec("Parameters")
Question = TypeVar("Question", bound=Callable[..., Any])


def always(tensors: Sequence[Tensor]) -> str | None:
    """The availability of the `reference` backends."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: "reference", "cpu", "triton" or "cuda".
        eager: the implementation; takes what the operation's public function hands it.
        unavailable: why it cannot run on these tensors; `None` where it can.
        default: False for one that runs on request only.
        on_request: why it runs only on request on these tensors; `None` where it may be the default.
        also: names of backends that have no kernels of their own for this operation, and mean this one: so
            that a network may hand one name to all of its operations.
        traced: what stands for it in the graphs of `torch.compile` and `torch.export`; `None` for plain
            PyTorch, which they trace as it is.
    """

    name: str
    eager: Callable[..., Any]
    unavailable: Callable[[Sequence[Tensor]], str | None]
    default: bool = True
    traced: Callable[..., Any] | None = None
    on_request: Callable[[Sequence[Tensor]], str | None] = always
    also: tuple[str, ...] = ()

    def run(self, x: Tensor, *arguments: Any) -> Any:
        """The operation, with `torch.autocast` off meanwhile: the inputs' dtypes decide what it computes."""
        call = self.traced if self.traced is not None and in_graph() else self.eager
        if not torch._C._is_any_autocast_enabled():  # mostly not, and asked here it costs no call
            return call(x, *arguments)
        with without_autocast(x.device):
            return call(x, *arguments)


def choose(operation: str, backends: Sequence[Backend], wanted: str | None, *tensors: Tensor) -> Backend:
    """The backend named `wanted`, or where that is `None` the first default one that can run.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the wanted backend cannot run, with the reason.
    """
    if wanted is not None:
        for backend in backends:
            if backend.name == wanted or wanted in backend.also:
                if reason := backend.unavailable(tensors):
                    raise RuntimeError(f"{operation}: backend {wanted!r} cannot run: {reason}")
                return backend
        names = ", ".join(repr(b.name) for b in backends)
        raise ValueError(f"{operation}: backend must be one of {names}, got {wanted!r}")
    refused: list[str] = []
    for backend in backends:
        if not backend.default:
            continue
        reason = None if backend.on_request is always else backend.on_request(tensors)
        if (reason := reason or backend.unavailable(tensors)) is None:
            if refused and not torch.compiler.is_compiling():
                log_once(operation, backend.name, "; ".join(refused))
            return backend
        refused.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{operation}: no backend can run: {'; '.join(refused)}")


def in_graph() -> bool:
    """Whether calls are recorded or looked at one by one, by the compiler or by modes such as `make_fx`'s."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def with_result(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What `choose` is asked about: the input, and an empty tensor for a result of another dtype."""
    return (x,) if x.dtype == dtype else (x, x.new_empty(0, dtype=dtype))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns `torch.autocast` off where it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether `torch.autocast` is on for the device."""
    if not torch._C._is_any_autocast_enabled():  # mostly not: one question instead of three
        return False
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


@functools.cache
def log_once(operation: str, chosen: str, refused: str) -> None:
    logger.info("%s runs on the %s backend (%s)", operation, chosen, refused)


def constant(function: Question) -> Question:
    """Marks a question about the process, which `torch.compile` asks while it traces: no part of a graph.

    It is `torch.compiler.assume_constant_result` without the import of the compiler, which takes a second.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def fact(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """What is true as long as the process lives: found out once, a constant for `torch.compile`."""
    find: Any = functools.cache(function)

    @constant
    @functools.wraps(function)
    def answer(*arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
        return find(*arguments, **named)

    return answer


@fact
def _has_autocast(device_type: str) -> bool:
    """Whether `torch.autocast` knows the device. PyTorch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device_type)
