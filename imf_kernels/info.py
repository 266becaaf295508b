"""What this installation can do: `python -m imf_kernels.info`."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys

import torch

from imf_kernels import _C, cpu, cuda, gemm, triton_backend
from imf_kernels.dispatch import Backend

OPERATIONS = (
    "linear",
    "rms_norm",
    "layer_norm",
    "layer_norm_modulate",
    "qk_norm_rope",
    "attention",
    "swiglu",
    "gated_residual",
    "gelu",
    "silu",
    "sinusoidal_embedding",
    "prepend_tokens",
)


def backends(operation: str) -> tuple[Backend, ...]:
    """The backends of an operation's file, in the order in which they are tried."""
    return importlib.import_module(f"imf_kernels.ops.{operation}")._BACKENDS


def report() -> str:
    """Versions, instruction sets, libraries, and each operation's backends."""
    lines = [
        f"python              {platform.python_version()} on {platform.machine()}",
        f"torch               {torch.__version__}, {torch.get_num_threads()} threads",
        f"instruction sets    {', '.join(cpu.instruction_sets())}; in use: {cpu.instruction_set()}",
        f"OpenMP              {'yes' if _C.openmp else 'no: the kernels run on one thread'}",
        f"large fp32 products {gemm.library()}",
        f"Triton kernels      {triton_status()}",
        f"CUDA kernels        {cuda_status()}",
        "",
        "operation             backends, the default first",
    ]
    for operation in OPERATIONS:
        names = (f"{b.name} (on request)" if _only_on_request(b) else b.name for b in backends(operation))
        lines.append(f"{operation:<21} {', '.join(names)}")
    return "\n".join(lines)


def _only_on_request(backend: Backend) -> bool:
    return not backend.default or (backend.name == "cuda" and not cuda.VERIFIED)


def triton_status() -> str:
    """Triton's version, where its kernels run, and on what they have been verified."""
    if reason := triton_backend.missing():
        return f"cannot run: {reason}"
    version = f"Triton {importlib.import_module('triton').__version__}"
    verified = ", ".join(sorted(triton_backend.VERIFIED)) or "no GPU yet"
    if triton_backend.interpreted():
        return f"{version}, in its interpreter on the CPU; verified on {verified}"
    if not torch.cuda.is_available():
        return f"{version}; cannot run: PyTorch finds no GPU; verified on {verified}"
    x = torch.empty(0, device="cuda")
    if reason := triton_backend.unavailable([x]):
        return f"{version}; cannot run: {reason}"
    architecture = triton_backend.architecture(x)
    return f"{version} on {torch.cuda.get_device_name()} ({architecture}); verified on {verified}"


def cuda_status() -> str:
    """What was built for CUDA, and why it cannot run here if it cannot."""
    if torch.version.hip:
        return f"cannot run: {cuda.missing()}"
    if not _C.cuda_architectures:
        toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if nvcc := shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin"):
            return f"not built, though nvcc is at {nvcc}: set IMF_CUDA=ON and install again"
        return "not built: that needs nvcc, on PATH or in CUDA_HOME"
    built = f"built for {_C.cuda_architectures}"
    reason = cuda.missing()
    return f"{built}; cannot run: {reason}" if reason else built


if __name__ == "__main__":
    sys.exit(print(report()))
