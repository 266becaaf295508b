"""The Triton kernels: when they can run, and how they are launched.

Triton is imported when a kernel is first needed: that takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.dispatch import Backend, cached_constant
from imf_kernels.backends.layout import too_wide, unfit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # elements of a row in a program's registers

# Compiled kernels by kind of launch; at this many all are dropped.
_kept: dict[tuple[object, ...], Callable[..., None]] = {}
_MOST_KEPT = 1024

# Releases of Triton whose compiled kernels are launched directly; others use the public API.
_DIRECT = (3, 6), (3, 9)

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
    does so; its compiled kernel is cached and launched directly from then on. The kind is all that Triton
    specialises a kernel on: the launcher, the device, each tensor's dtype and 16-byte alignment, which
    tensors are `None`, and which numbers need 64 bits.

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

    def __call__(self, grid: tuple[int, int], tensors: Tensors, *numbers: float | None) -> None:
        """Launches the kernel on `grid`, programs along two axes, unless that is empty.

        Args:
            tensors: tensors, `None` for missing ones.
            numbers: integers, floats and `None`, each the same type in every call.
        """
        if 0 in grid:
            return
        kind, device, arguments = _C.launch(tensors, self.fixed, numbers)
        if device < 0:  # in the interpreter
            self.kernel[grid](*tensors, *self.fixed, *numbers, **self.constants)
            return
        launch = _kept.get((self, device, kind))
        if launch is not None and torch._C._cuda_getDevice() == device:
            launch(grid, device, arguments)
            return
        with torch.cuda.device(device):
            if launch is not None:
                launch(grid, device, arguments)
                return
            compiled = self.kernel[grid](*tensors, *self.fixed, *numbers, **self.constants)
        if launch := _direct(compiled, len(self.kernel.arg_names) - len(arguments)):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[self, device, kind] = launch


def _direct(compiled: Any, constants: int) -> Callable[..., None] | None:
    """Returns a direct launch of a compiled kernel, by the calls that `triton.JITFunction.run` ends in.

    It takes the grid, the device, and the kernel's arguments without the last `constants`, tensors as
    addresses. `None` for an unknown release of Triton.
    """
    triton = importlib.import_module("triton")
    if compiled is None or not _DIRECT[0] <= _release(triton.__version__) <= _DIRECT[1]:
        return None
    runtime, stream_of = triton.knobs.runtime, torch._C._cuda_getCurrentRawStream
    run, function = compiled.run, compiled.function
    fixed: tuple[Any, ...] = (compiled.packed_metadata, None, None, None)
    unused = (None,) * constants  # the compiled kernel has them already
    if _release(triton.__version__) == (3, 6) and not torch.version.hip and not _scratch(run):
        # What `run` does, in two thirds of its time.
        fixed = run.launch_cooperative_grid, run.launch_pdl, None, None, *fixed
        run = run.launch

    def launch(grid: tuple[int, int], device: int, arguments: tuple[object, ...]) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):  # a profiler is active
            compiled[(*grid, 1)](*arguments, *unused)
        else:
            run(*grid, 1, stream_of(device), function, *fixed, *arguments, *unused)

    return launch


def _scratch(run: Any) -> int:
    """Returns the bytes of memory that each program of a kernel needs besides its tensors."""
    return run.global_scratch_size + run.profile_scratch_size


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
