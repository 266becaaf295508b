"""The compiled CUDA kernels: when they can run. They are the default where verified.py says so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.cpu import kernels as compiled
from imf_kernels.backends.dispatch import Backend, cached_constant
from imf_kernels.backends.layout import too_wide, unfit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # elements of a row in a block's registers: csrc/cuda/rows.h


def backend(operation: str, widest: int | None = None) -> Backend[Sequence[Tensor]]:
    """Returns the `cuda` backend of an operation, for rows of the first tensor up to `widest`."""
    functions = compiled(operation)
    functions.shares = shares
    return Backend("cuda", functions, partial(unavailable, widest=widest))


@cached_constant
def missing() -> str | None:
    """Returns why no CUDA kernel can run in this process; `None` if they can."""
    if torch.version.hip:
        return "it takes NVIDIA's GPUs, and this PyTorch is built for ROCm, on which 'triton' runs"
    if not _C.cuda_architectures:
        return "it was not built (set IMF_CUDA=ON where nvcc is, and install again)"
    return _C.cuda_unavailable() or None


def unavailable(tensors: Sequence[Tensor], widest: int | None = None) -> str | None:
    """Returns why a `cuda` backend cannot take these tensors; `None` if it can."""
    if reason := unfit(tensors, "cuda", DTYPES):
        return reason
    return missing() or _not_built_for(tensors[0].get_device()) or too_wide(tensors[0], widest)


@cached_constant
def _not_built_for(device: int) -> str | None:
    """Returns why the module has no kernels for a GPU; `None` if it has."""
    capability = torch.cuda.get_device_capability(device)
    if any(runs_on(built, *capability) for built in _C.cuda_architectures.split()):
        return None
    major, minor = capability
    return f"it was built for {_C.cuda_architectures}, not for sm_{major}{minor} (IMF_CUDA_ARCHITECTURES)"


def runs_on(built: str, major: int, minor: int) -> bool:
    """Returns whether code for a CMake architecture, "80-real", "90a-real", "100", …, runs on a GPU."""
    name, _, kind = built.partition("-")
    number, wanted = int(name.rstrip("af")), 10 * major + minor
    if name[-1] in "af":  # with instructions that no other GPU has
        return number == wanted
    if kind == "real":  # machine code
        return number // 10 == major and number <= wanted
    return number <= wanted


def shares(groups: int, length: int, width: int, count: int) -> int:
    """Returns the number of partial sums per group of `length` rows: a few blocks per processor, of 8 rows or
    more.

    It is the same on all GPUs with as many processors.
    """
    rows = max(8, -(-groups * length // (4 * _processors())))
    return -(-length // rows)


@cached_constant
def _processors() -> int:
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
