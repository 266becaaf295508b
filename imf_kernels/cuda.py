"""The compiled CUDA kernels: when they can run, and on which stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.dispatch import fact
from imf_kernels.layout import DTYPES


@fact
def missing() -> str | None:
    """Why no CUDA kernel can run in this process; `None` where they can."""
    if not _C.cuda_architectures:
        return "it was not built (set IMF_CUDA=ON where nvcc is, and install again)"
    return _C.cuda_unavailable() or None


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why the `cuda` backends cannot take these tensors; `None` where they can."""
    for x in tensors:
        if x.device.type != "cuda":
            return f"it takes CUDA tensors, got one on {x.device}"
        if x.dtype not in DTYPES:
            return f"it takes float32 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return missing()


def launch(x: Tensor) -> tuple[int, int]:
    """Device and stream that a kernel on `x` runs on: PyTorch's current ones."""
    device = x.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream
