"""The Triton kernels: when they can run, and how they are launched.

Triton is imported when a kernel is first needed: that takes a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.dispatch import Backend, cached_constant
from imf_kernels.backends.layout import too_wide, unfit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # elements of a row in a program's registers

# Releases of Triton whose compiled kernels the driver launches; others use the public API.
_DIRECT = (3, 6), (3, 9)
_MOST_SHARED = 228 << 10  # bytes; for more a launch needs an attribute
_TYPES = {"i32": "i", "i64": "l", "fp32": "f", "constexpr": "c"}  # of parameters, for csrc/launch.h

Tensors = tuple["Tensor | None", ...]
Fixed = tuple["int | Fixed | None", ...]


@cached_constant
def missing() -> str | None:
    """Returns why Triton cannot be used in this process; `None` if it can."""
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
    """Returns the first two numbers of a version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@cached_constant
def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter on the CPU, by TRITON_INTERPRET at first use."""
    if "TRITON_INTERPRET" in os.environ:
        with contextlib.suppress(ImportError):  # reported by `missing`
            return importlib.import_module("triton").knobs.runtime.interpret
    return False


def unavailable(tensors: Sequence[Tensor], widest: int | None = None) -> str | None:
    """Returns why `triton` cannot take these tensors, whose first has rows up to `widest`; else `None`."""
    on_cpu = interpreted() and tensors[0].device.type == "cpu"
    if reason := unfit(tensors, "cpu" if on_cpu else "cuda", DTYPES, "CUDA and ROCm"):
        return reason
    if on_cpu and any(x.dtype == torch.bfloat16 for x in tensors):
        return "Triton's interpreter is wrong in bfloat16; it takes float32 and float16"
    device = tensors[0].get_device()
    return missing() or (None if device < 0 else _too_old(device)) or too_wide(tensors[0], widest)


@cached_constant
def _too_old(device: int) -> str | None:
    """Returns why a GPU cannot run the kernels; `None` if it can."""
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return None
    major, minor = capability
    name = torch.cuda.get_device_name(device)
    return f"it needs a GPU of compute capability 8.0 or newer, got {name} of {major}.{minor}"


def backend(module: str, name: str | None = None, widest: int | None = None) -> Backend[Sequence[Tensor]]:
    """Returns an operation's `triton` backend, see `Kernels`, for rows of the first tensor up to `widest`.

    The name "cuda" means it too: only attention has CUDA kernels, and one name serves a network.
    """
    fits = functools.partial(unavailable, widest=widest)
    return Backend("triton", Kernels(module, name), fits, aliases=("cuda",))


class Kernels:
    """The launchers of an operation, imported at first use: `triton_kernels/<module>.py`, or `name` in it."""

    def __init__(self, module: str, name: str | None = None) -> None:
        self.module, self._name = module, name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernels = importlib.import_module(f"imf_kernels.backends.triton_kernels.{self.module}")
        launcher = getattr(kernels if self._name is None else getattr(kernels, self._name), name)
        setattr(self, name, launcher)  # found without this function from now on
        return launcher


class Launcher:
    """A kernel with its constants, launched on the device of its tensors, in PyTorch's current stream.

    Triton's own launch inspects every argument, 20 to 30 µs in Python. Here only the first launch of a kind
    does so; its compiled kernel is cached and launched by the driver from then on (csrc/launch.h). The kind
    is all that Triton specialises a kernel on: the launcher, the device, each tensor's dtype and 16-byte
    alignment, which tensors are `None`, and which numbers need 64 bits.

    Args:
        kernel: a `triton.jit` function of tensors, `fixed`, numbers and constants, in this order. Its integer
            numbers are named in `do_not_specialize`.
        fixed: arguments equal in every launch, on which Triton may specialise: strides, counts.
        constants: `tl.constexpr` arguments, and options such as num_warps.
    """

    def __init__(self, kernel: Any, *fixed: int | Fixed | None, **constants: object) -> None:
        self.kernel, self.fixed = kernel, fixed
        # If a product and a sum were fused in one variant of a kernel only, the primal would depend on
        # whether there is a tangent: kernels call `tl.fma` instead.
        self.constants = {"enable_fp_fusion": False, **constants}
        self._kinds = _C.Kinds()

    def __call__(self, grid: tuple[int, int], tensors: Tensors, *numbers: float | None) -> None:
        """Launches the kernel on `grid`, programs along two axes, unless that is empty.

        Args:
            tensors: tensors, `None` for missing ones.
            numbers: integers, floats and `None`, each the same type in every call.
        """
        if 0 in grid or (by_triton := self._kinds.launch(grid, tensors, numbers)) is None:
            return
        kind, device = by_triton
        with torch.cuda.device(device) if device >= 0 else contextlib.nullcontext():
            if device >= 0 and self._kinds.launch(grid, tensors, numbers) is None:
                return  # another device was current
            compiled = self.kernel[grid](*tensors, *self.fixed, *numbers, **self.constants)
        if direct := _direct(compiled):
            self._kinds.add(kind, *direct, len(tensors), tuple(_flat(self.fixed)), compiled)


def replayed(function: Callable[..., None]) -> Callable[..., None]:
    """Marks a function that launches kernels on its arguments and does nothing else.

    Grids, numbers and strides must depend on the arguments' shapes, strides, dtypes and values of numbers
    alone: on a GPU a call's launches are repeated in later calls that are alike in these, without Python.
    """
    return functools.update_wrapper(_C.Replayed(function), function)


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for part in x:
            yield from _flat(part)
    else:
        yield x


def _direct(compiled: Any) -> tuple[int, int, int, int, str] | None:
    """Returns how the driver launches a compiled kernel, as `triton.JITFunction.run` would make it.

    These are the addresses of cuLaunchKernel and of the kernel, its threads, its bytes of shared memory, and
    the types of its arguments. `None` for what is not a plain launch of a known release of Triton.
    """
    triton = importlib.import_module("triton")
    if compiled is None or torch.version.hip or not _DIRECT[0] <= _release(triton.__version__) <= _DIRECT[1]:
        return None
    run, made = compiled.run, compiled.metadata
    special = run.global_scratch_size, run.profile_scratch_size, run.launch_cooperative_grid, run.launch_pdl
    sanitized = getattr(run, "gsan_enabled", False)
    if any(special) or sanitized or made.num_ctas > 1 or made.shared > _MOST_SHARED:
        return None
    _C.watch(triton.knobs.runtime)
    types = "".join("p" if t[0] == "*" else _TYPES[t] for t in _flat(tuple(compiled.src.signature.values())))
    return _launch_kernel(), compiled.function, 32 * made.num_warps, made.shared, types


@functools.cache
def _launch_kernel() -> int:
    """Returns the address of cuLaunchKernel."""
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def architecture(x: Tensor) -> str:
    """Returns the architecture of the device of `x`: "sm_90", "gfx942", …; "interpreter" on the CPU."""
    device = x.get_device()
    return "interpreter" if device < 0 else architecture_of(device)


@functools.cache
def architecture_of(device: int) -> str:
    """Returns the architecture of a GPU by its index."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
