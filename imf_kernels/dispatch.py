"""Which backend runs an operation, and why another cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("imf_kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: "reference", "cpu", "triton" or "cuda".
        run: the implementation; takes what the operation's public function hands it.
        unavailable: why it cannot run on these tensors; `None` where it can.
        default: False for one that runs on request only.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[Sequence[Tensor]], str | None]
    default: bool = True


def always(tensors: Sequence[Tensor]) -> str | None:
    """The availability of the `reference` backends."""
    return None


def choose(operation: str, backends: Sequence[Backend], wanted: str | None, *tensors: Tensor) -> Backend:
    """The backend named `wanted`, or where that is `None` the first default one that can run.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the wanted backend cannot run, with the reason.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operation}: the operations of imf_kernels cannot be traced by torch.compile yet; "
            "wrap the call in torch.compiler.disable"
        )
    if wanted is not None:
        for backend in backends:
            if backend.name == wanted:
                if reason := backend.unavailable(tensors):
                    raise RuntimeError(f"{operation}: backend {wanted!r} cannot run: {reason}")
                return _outside_autocast(backend, tensors)
        names = ", ".join(repr(b.name) for b in backends)
        raise ValueError(f"{operation}: backend must be one of {names}, got {wanted!r}")
    refused: list[str] = []
    for backend in backends:
        if not backend.default:
            continue
        if (reason := backend.unavailable(tensors)) is None:
            if refused:
                _log_once(operation, backend.name, "; ".join(refused))
            return _outside_autocast(backend, tensors)
        refused.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{operation}: no backend can run: {'; '.join(refused)}")


def _outside_autocast(backend: Backend, tensors: Sequence[Tensor]) -> Backend:
    """The backend, with `torch.autocast` off while it runs: the inputs' dtypes decide what it computes."""
    device = tensors[0].device
    if not _autocasts(device):
        return backend

    def run(*arguments: Any) -> Any:
        with without_autocast(device):
            return backend.run(*arguments)

    return dataclasses.replace(backend, run=run)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns `torch.autocast` off where it is on."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else contextlib.nullcontext()


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@functools.cache
def _log_once(operation: str, chosen: str, refused: str) -> None:
    logger.info("%s runs on the %s backend (%s)", operation, chosen, refused)
