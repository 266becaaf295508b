"""The compiled CUDA kernels: when they can run, where they are the default, on which stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.dispatch import fact
from imf_kernels.layout import DTYPES, without_memory
from imf_kernels.verified import CUDA as VERIFIED

WIDEST = 8192  # row that a block's threads hold in registers: csrc/cuda/rows.h

# What has the kernels. Tests put the same sources in its place, compiled for the CPU.
library: Any = _C


@fact
def missing() -> str | None:
    """Why no CUDA kernel can run in this process; `None` where they can."""
    if torch.version.hip:
        return "it takes NVIDIA's GPUs, and this PyTorch is built for ROCm, on which 'triton' runs"
    if not _C.cuda_architectures:
        return "it was not built (set IMF_CUDA=ON where nvcc is, and install again)"
    return _C.cuda_unavailable() or None


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why the `cuda` backends cannot take these tensors; `None` where they can."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        if x.device.type != ("cuda" if library is _C else "cpu"):
            return f"it takes CUDA tensors, got one on {x.device}"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
    if library is not _C:
        return None
    return missing() or _not_built_for(tensors[0].get_device())


@fact
def _not_built_for(device: int) -> str | None:
    """Why the module has nothing for a GPU; `None` where it has."""
    capability = torch.cuda.get_device_capability(device)
    if any(runs_on(built, *capability) for built in _C.cuda_architectures.split()):
        return None
    major, minor = capability
    return f"it was built for {_C.cuda_architectures}, not for sm_{major}{minor} (IMF_CUDA_ARCHITECTURES)"


def runs_on(built: str, major: int, minor: int) -> bool:
    """Whether what was compiled for an architecture of CMake's names, "80-real", "90a-real", "100", … runs on
    GPUs of a compute capability."""
    name, _, kind = built.partition("-")
    number, wanted = int(name.rstrip("af")), 10 * major + minor
    if name[-1] in "af":  # with instructions that no other GPU has
        return number == wanted
    if kind == "real":  # machine code
        return number // 10 == major and number <= wanted
    return number <= wanted


def unavailable_for_rows(tensors: Sequence[Tensor]) -> str | None:
    """The same for kernels that hold whole rows of the first tensor."""
    if reason := unavailable(tensors):
        return reason
    width = tensors[0].shape[-1]
    return None if width <= WIDEST else f"it takes rows of at most {WIDEST}, got {width}"


def on_request(tensors: Sequence[Tensor]) -> str | None:
    """Why the `cuda` backends are not the default for these tensors; `None` where they are."""
    if not VERIFIED or library is not _C:
        return "it runs on request, being verified on no GPU yet"
    device = tensors[0].get_device()
    if device < 0 or (name := _architecture(device)) in VERIFIED:  # not on a GPU it is unavailable
        return None
    return f"it runs on request, not being verified on {name}"


@fact
def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def call(function: str, x: Tensor, *arguments: Any) -> None:
    """Launches a function of the compiled module on the device of `x`, on PyTorch's current stream of it."""
    device = x.get_device()
    stream = 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
    getattr(library, f"{function}_cuda")(*arguments, max(device, 0), stream)


def shares_of(x: Tensor, groups: int, length: int) -> int:
    """In how many shares a kernel sums over the rows of a group: a few blocks a processor, of 8 rows or more.

    The sums are the same each time on GPUs with as many processors.
    """
    rows = max(8, -(-groups * length // (4 * _processors(x.get_device()))))
    return -(-length // rows)


@functools.cache
def _processors(device: int) -> int:
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def sums(x: Tensor, groups: int, length: int, *shape: int) -> tuple[Tensor, Tensor, int]:
    """Room for sums over the rows of each group, [groups, *shape] in fp32, and for those of its shares; the
    number of shares."""
    shares = shares_of(x, groups, length)
    partial = x.new_empty((groups, shares, *shape), dtype=torch.float32)
    return x.new_empty((groups, *shape), dtype=torch.float32), partial, shares
