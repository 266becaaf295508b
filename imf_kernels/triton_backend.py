"""The Triton kernels: when they can run, how they are launched, how they are compiled for a GPU elsewhere.

Importing this does not import Triton, which takes a second: that waits until a kernel is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels.dispatch import fact
from imf_kernels.layout import without_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Architectures on which the tests have passed, each from a committed record; on others there is a warning.
VERIFIED: frozenset[str] = frozenset()

# What `ahead_of_time` compiles for, and what it has compiled; `None` outside it.
_target: Any = None
_compiled: list[Any] = []


@fact
def missing() -> str | None:
    """Why Triton cannot be used in this process; `None` where it can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error} (PyTorch's builds for GPUs bring it)"
    if not interpreted():
        return None
    numpy = importlib.import_module("numpy")
    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return (
            "Triton's interpreter works with NumPy 2.4 and newer from Triton 3.7 on, got Triton "
            f"{triton.__version__} and NumPy {numpy.__version__}"
        )
    return None


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@fact
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET was set at first use."""
    if "TRITON_INTERPRET" in os.environ:
        with contextlib.suppress(ImportError):  # the reason of `missing`
            return importlib.import_module("triton").knobs.runtime.interpret
    return False


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why the `triton` backend cannot take these tensors; `None` where it can."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        if _target is not None:
            continue
        if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
            return f"it takes CUDA and ROCm tensors, got one on {x.device}"
        if x.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter is wrong in bfloat16; it takes float32 and float16"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
    device = tensors[0].get_device()
    return missing() or (None if _target is not None or device < 0 else _too_old(device))


@fact
def _too_old(device: int) -> str | None:
    """Why a GPU cannot run the kernels; `None` where it can."""
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return None
    major, minor = capability
    name = torch.cuda.get_device_name(device)
    return f"it needs a GPU of compute capability 8.0 or newer, got {name} of {major}.{minor}"


class Kernels:
    """The launchers of an operation, `imf_kernels/_triton/<operation>.py`, imported at first use."""

    def __init__(self, operation: str) -> None:
        self._module = f"imf_kernels._triton.{operation}"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launcher = getattr(importlib.import_module(self._module), name)
        setattr(self, name, launcher)  # the next time it is found without this function
        return launcher


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor, on PyTorch's current stream of it.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes; nothing is launched if there are none.
        arguments: tensors, numbers, `None` for what is not there.
        constants: `tl.constexpr` arguments, and options such as num_warps.
    """
    if 0 in grid:
        return
    # A product and a sum that become one fused operation in one form of a kernel and not in another would
    # make the primal with a tangent differ from that without: kernels ask for `tl.fma` where they want it.
    constants.setdefault("enable_fp_fusion", False)
    if _target is not None:
        _compiled.append(kernel.warmup(*arguments, grid=grid, **constants))
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cpu":  # in the interpreter
        kernel[grid](*arguments, **constants)
        return
    _warn_unverified(device.index)
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants)


def architecture(x: Tensor) -> str:
    """What a kernel on `x` is compiled for: "sm_90", "gfx942", …; "interpreter" on the CPU."""
    if _target is not None:
        return f"sm_{_target.arch}" if _target.backend == "cuda" else _target.arch
    return "interpreter" if x.device.type == "cpu" else _architecture(x.get_device())


@functools.cache
def _architecture(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _warn_unverified(device: int) -> None:
    if _architecture(device) not in VERIFIED:
        warnings.warn(
            f"imf_kernels: the Triton kernels have not been verified on {torch.cuda.get_device_name(device)} "
            f"({_architecture(device)}): they passed their tests in Triton's interpreter and compile for it. "
            "backend='reference' is the plain PyTorch to compare with",
            stacklevel=2,
        )


@contextlib.contextmanager
def ahead_of_time(backend: str, arch: int | str, warp_size: int) -> Iterator[list[Any]]:
    """Compiles for a GPU that need not be there what is launched inside, and launches nothing.

    The operations are called on meta tensors. Gives the list of compiled kernels, a launch each; a process
    in which Triton interprets cannot compile.

    Args:
        backend: "cuda" or "hip", with the arch and warp size of the GPU: 90 and 32, "gfx942" and 64.
    """
    global _target
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    _target = GPUTarget(backend, arch, warp_size)
    driver.set_active(_NoDevice(_target))
    _compiled.clear()
    try:
        yield _compiled
    finally:
        _target = None
        driver.set_active(None)  # the next launch looks for a device again


class _NoDevice:
    """In the place of Triton's driver: a device of the wanted kind, as far as compiling asks for one."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # Triton keeps the kernels of each device apart by this

    def get_current_stream(self, device: str) -> int:
        return 0
