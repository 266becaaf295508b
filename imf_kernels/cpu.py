"""The compiled CPU kernels: when they can run, with which instructions, on how many threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

# First, so that its OpenMP runtime is the one that the compiled module finds loaded.
import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.layout import without_memory

DTYPES = (torch.float32, torch.bfloat16)


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why the `cpu` backend cannot take these tensors; `None` where it can."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it takes CPU tensors, got one on {x.device}"
        if x.dtype not in DTYPES:
            return f"it takes float32 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
    return None


def call(function: str, x: Tensor, *arguments: Any) -> None:
    """Calls a function of the compiled module, on as many threads as PyTorch uses."""
    getattr(_C, function)(*arguments, torch.get_num_threads())


def instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, slowest first: of "plain", "neon" (ARM),
    "avx2", "avx512", "avx512_bf16" (AVX-512 with bf16 dot products)."""
    return _C.supported_isas()


def instruction_set() -> str:
    """The instruction set that the kernels use now; the best one unless chosen otherwise."""
    return _C.get_isa()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Makes the kernels of the whole process use one instruction set, for tests and measurements.

    Raises:
        ValueError: an unknown set, or one that this processor does not run.
    """
    before = _C.get_isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)
