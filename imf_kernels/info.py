"""Report of this installation: `python -m imf_kernels.info`."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from typing import Any

import torch

from imf_kernels import _C
from imf_kernels.backends import cpu, cuda, flash, matmul, triton_launch, verified
from imf_kernels.backends.dispatch import Backend
from imf_kernels.backends.operators import OPERATIONS, Operation


def report() -> str:
    """Returns versions, instruction sets, libraries, and each operation's backends."""
    lines = [
        f"python              {platform.python_version()} on {platform.machine()}",
        f"torch               {torch.__version__}, {torch.get_num_threads()} threads",
        f"instruction sets    {', '.join(cpu.instruction_sets())}; in use: {cpu.instruction_set()}",
        f"OpenMP              {'yes' if _C.openmp else 'no: the kernels run on one thread'}",
        f"large fp32 products {matmul.library()}",
        f"Triton kernels      {triton_status()}",
        f"CUDA kernels        {cuda_status()}",
        f"flash-attn          {flash_status()}",
        *(f"{'verified, ' + device:<20}{verified.status(device)}" for device in verified.devices()),
        "",
        "operation                     backends, the default first",
    ]
    for name, operation in sorted(OPERATIONS.items()):
        backends = (_described(operation, backend) for backend in operation.backends)
        lines.append(f"{name:<29} {', '.join(backends)}")
    return "\n".join(lines)


def _described(operation: Operation[Any], backend: Backend[Any]) -> str:
    device = verified.devices()[:2][
        -1 if backend.name in verified.ON_GPU else 0
    ]  # the first GPU where there is one
    dtypes = [str(dtype).removeprefix("torch.") for dtype in triton_launch.DTYPES]
    off = [dtype for dtype in dtypes if verified.reason(operation.public, backend.name, device, dtype)]
    if not off or backend.name == "reference":
        return backend.name
    return f"{backend.name} (on request{'' if off == dtypes else ' in ' + ' and '.join(off)})"


def triton_status() -> str:
    """Returns Triton's version and where its kernels run."""
    if reason := triton_launch.missing():
        return f"cannot run: {reason}"
    version = f"Triton {importlib.import_module('triton').__version__}"
    if triton_launch.interpreted():
        return f"{version}, in its interpreter on the CPU"
    if not torch.cuda.is_available():
        return f"{version}; cannot run: PyTorch finds no GPU"
    x = torch.empty(0, device="cuda")
    if reason := triton_launch.unavailable([x]):
        return f"{version}; cannot run: {reason}"
    architecture = triton_launch.architecture(x)
    return f"{version} on {torch.cuda.get_device_name()} ({architecture})"


def cuda_status() -> str:
    """Returns whether the CUDA kernels were built, and why not or why they cannot run."""
    if torch.version.hip:
        return f"cannot run: {cuda.missing()}"
    if not _C.cuda:
        toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if nvcc := shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin"):
            return f"not built, though nvcc is at {nvcc}: set IMF_CUDA=ON and install again"
        return "not built: that needs nvcc, on PATH or in CUDA_HOME"
    built = "attention, built for compute capability 9.0"
    reason = cuda.missing()
    return f"{built}; cannot run: {reason}" if reason else built


def flash_status() -> str:
    """Returns flash-attn's version, or why it cannot run."""
    if reason := flash.missing():
        return f"cannot run: {reason}"
    return f"{importlib.import_module('flash_attn').__version__}, on request"


if __name__ == "__main__":
    sys.exit(print(report()))
