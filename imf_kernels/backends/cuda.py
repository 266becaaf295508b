"""The compiled CUDA kernels, attention for compute capability 9.0: whether they can run."""

from __future__ import annotations

import torch

from imf_kernels import _C
from imf_kernels.backends.dispatch import cached_constant


@cached_constant
def missing() -> str | None:
    """Returns why no CUDA kernel can run in this process; `None` if they can."""
    if torch.version.hip:
        return "it takes NVIDIA's GPUs, and this PyTorch is built for ROCm, on which 'triton' runs"
    if not _C.cuda:
        return "it was not built (set IMF_CUDA=ON where nvcc is, and install again)"
    return _C.cuda_unavailable() or None
