"""The choice of a backend: by name, or the first that can run, with the reasons why others cannot."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

logger = logging.getLogger("imf_kernels")
Answer = TypeVar("Answer")
Asked = TypeVar("Asked", contravariant=True)
Parameters = ParamSpec("Parameters")
Question = TypeVar("Question", bound=Callable[..., Any])

FLASH = "flash"  # attention's, of calls without a tangent; for all others the name means the default
NAMES = ("reference", "cpu", "triton", "cuda", FLASH)


def always(asked: object) -> str | None:
    """Returns `None`, for backends that can always run."""
    return None


def every(asked: object) -> bool:
    """Returns `True`, for backends whose name means them in every call."""
    return True


@dataclass(frozen=True)
class Backend(Generic[Asked]):
    """One implementation of an operation.

    Attributes:
        name: "reference", "cpu", "triton", "cuda" or "flash".
        kernels: an object with the functions `forward`, `backward` and `shares`; `None` for plain PyTorch.
        unavailable: why it cannot run on these tensors; `None` where it can.
        opt_in: why it runs on these tensors only if named; `None` where it may be the default.
        aliases: names of backends that have no kernels for this operation and mean this one, so that one name
            serves all operations of a network.
        function: what runs in place of the reference, with its arguments and an autograd of its own.
        concerns: whether its name means it in such a call; if not, the name means the default.
        not_differentiable: why its tangents carry no gradients; `None` where they can.
    """

    name: str
    kernels: Any = None
    unavailable: Callable[[Asked], str | None] = always
    opt_in: Callable[[Asked], str | None] = always
    aliases: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None
    concerns: Callable[[Asked], bool] = every
    not_differentiable: str | None = None


def choose(
    operation: str,
    backends: Sequence[Backend[Asked]],
    wanted: str | None,
    asked: Asked,
    differentiable: bool = False,
) -> Backend[Asked]:
    """Returns the backend named `wanted`, or with `None` the first that can run and is not opt-in.

    With `differentiable` it is one whose tangents carry gradients.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the wanted backend cannot run, with the reason.
    """

    def unavailable(backend: Backend[Asked]) -> str | None:
        return (backend.not_differentiable if differentiable else None) or backend.unavailable(asked)

    if wanted == FLASH and not any(b.name == FLASH and b.concerns(asked) for b in backends):
        wanted = None
    if wanted is not None:
        for backend in backends:
            if backend.name == wanted or wanted in backend.aliases:
                if reason := unavailable(backend):
                    raise RuntimeError(f"{operation}: backend {wanted!r} cannot run: {reason}")
                return backend
        names = ", ".join(repr(name) for b in backends for name in (*b.aliases, b.name))
        raise ValueError(f"{operation}: backend must be one of {names}, got {wanted!r}")
    refused: list[str] = []
    for backend in backends:
        if (reason := backend.opt_in(asked) or unavailable(backend)) is None:
            if refused and not torch.compiler.is_compiling():
                log_once(operation, backend.name, "; ".join(refused))
            return backend
        refused.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{operation}: no backend can run: {'; '.join(refused)}")


class _Default(threading.local):
    """The backend of calls that name none, per thread; `None` for the first that can run."""

    def __init__(self) -> None:
        self.backend: str | None = None  # of the instance: torch.compile guards no attribute of the class


default = _Default()


class _Blocks:
    """The blocks of `use_backend` that are entered, in all threads: what a graph is compiled again for.

    PyTorch 2.11 guards no attribute of a `threading.local`.
    """

    names = ""


_blocks, _blocks_change = _Blocks(), threading.Lock()


def traced_default() -> str | None:
    """`default.backend` as a graph reads it."""
    return default.backend if _blocks.names else None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs the operations inside on one backend, unless a call names another; in the current thread.

    A backward runs on the backend of its forward, wherever and whenever it runs. `imf_kernels.checkpoint`
    recomputes there too; `torch.utils.checkpoint` recomputes on the backend that its backward finds set.

    Args:
        name: "reference", "cpu", "triton"; "cuda", which means "triton" in all operations but attention;
            "flash", which means flash-attn in attention without a tangent and elsewhere the default; `None`
            for the first that can run.

    Raises:
        ValueError: for another name.
        RuntimeError: from an operation inside that cannot run there, with the reason.
    """
    if name is not None and name not in NAMES:
        raise ValueError(
            f"use_backend: name must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}"
        )
    before, default.backend = default.backend, name
    entry = f"{name} "
    change = contextlib.nullcontext() if torch.compiler.is_compiling() else _blocks_change
    with change:
        _blocks.names += entry
    try:
        yield
    finally:
        default.backend = before
        with change:
            _blocks.names = _blocks.names.replace(entry, "", 1)


def in_graph() -> bool:
    """Returns whether calls are traced, by the compiler or by modes such as `make_fx`'s."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns `torch.autocast` off where it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocasts(device: torch.device) -> bool:
    """Returns whether `torch.autocast` is on for the device."""
    if not torch._C._is_any_autocast_enabled():  # the common case, in one call instead of three
        return False
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


@functools.cache
def log_once(operation: str, chosen: str, refused: str) -> None:
    logger.info("%s runs on the %s backend (%s)", operation, chosen, refused)


def constant(function: Question) -> Question:
    """Marks a function that torch.compile calls while it traces, folding the result into the graph.

    This is `torch.compiler.assume_constant_result` without importing the compiler, which takes a second.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def cached_constant(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Makes a function a process-wide constant: computed once, cached, folded by torch.compile."""
    find: Any = functools.cache(function)

    @constant
    @functools.wraps(function)
    def answer(*arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
        return find(*arguments, **named)

    return answer


@cached_constant
def _has_autocast(device_type: str) -> bool:
    """Returns whether `torch.autocast` knows the device. PyTorch 2.11 cannot trace the call."""
    return torch.amp.is_autocast_available(device_type)
