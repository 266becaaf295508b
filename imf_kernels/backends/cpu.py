"""The compiled CPU kernels: when they can run, and with which instructions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

# First, so that the compiled module finds its OpenMP runtime loaded.
import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.dispatch import Backend
from imf_kernels.backends.layout import unfit

DTYPES = (torch.float32, torch.bfloat16)


def backend(operation: str) -> Backend[Sequence[Tensor]]:
    """Returns the `cpu` backend of an operation of the compiled module."""
    return Backend("cpu", kernels(operation), unavailable)


def kernels(operation: str) -> SimpleNamespace:
    """Returns an operation's compiled functions, which run on as many threads as PyTorch uses."""
    functions = {
        name: getattr(_C, f"{operation}_{name}")
        for name in ("forward", "backward", "pair_backward")
        if f"{operation}_{name}" in _C.schemas
    }
    return SimpleNamespace(**functions, shares=shares)


def shares(groups: int, length: int, width: int, count: int) -> int:
    """Returns the number of partial sums per group of `length` rows; 0 for a single one, which needs no room.

    It depends on the shape alone, `count` sums of `width` elements, so that no result depends on the number
    of threads; csrc/cpu/rows.h splits by the same rule.
    """
    rows = 64 if count * width < 1024 else 32
    return -(-length // rows) if length > rows else 0


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Returns why the `cpu` backend cannot take these tensors; `None` if it can."""
    return unfit(tensors, "cpu", DTYPES)


def instruction_sets() -> list[str]:
    """Returns the instruction sets that this processor runs, slowest first: of "plain", "neon" (ARM), "avx2",
    "avx512", "avx512_bf16" (AVX-512 with bf16 dot products), "amx_bf16" (and products of tiles)."""
    return _C.supported_isas()


def instruction_set() -> str:
    """Returns the instruction set in use; the best one unless chosen otherwise."""
    return _C.get_isa()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Makes the process's kernels use one instruction set, for tests and measurements.

    Raises:
        ValueError: an unknown set, or one that this processor does not run.
    """
    before = _C.get_isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)
