"""The Triton kernels: when they can run, and how they are launched.

Importing this does not import Triton, which takes a second: that waits until a kernel is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels.backends.dispatch import Backend, cached_constant
from imf_kernels.backends.layout import without_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # row that a program keeps in its registers

# Architectures on which the tests have passed, each from a committed record; on others there is a warning.
VERIFIED: frozenset[str] = frozenset()

# Compiled kernels by kind of launch: at most so many, then all are forgotten.
_kept: dict[tuple[object, ...], Callable[..., None]] = {}
_MOST_KEPT = 1024

# Releases of Triton whose compiled kernels are launched directly; others are launched in the public way.
_DIRECT = (3, 6), (3, 9)

Tensors = Sequence["Tensor | tuple[Tensor | None, ...] | None"]
Fixed = tuple["int | Fixed | None", ...]


@cached_constant
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


@cached_constant
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET was set at first use."""
    if "TRITON_INTERPRET" in os.environ:
        with contextlib.suppress(ImportError):  # the reason of `missing`
            return importlib.import_module("triton").knobs.runtime.interpret
    return False


def unavailable(tensors: Sequence[Tensor], widest: int | None = None) -> str | None:
    """Why the `triton` backend cannot take these tensors, the first of rows up to `widest`; `None` where it can."""
    for x in tensors:
        if reason := _refused(x):
            return reason
    device = tensors[0].get_device()
    if reason := missing() or (None if device < 0 else _too_old(device)):
        return reason
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    return None if widest is None or width <= widest else f"it takes rows of at most {widest}, got {width}"


def _refused(x: Tensor) -> str | None:
    """Why the kernels cannot take a tensor; `None` where they can."""
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return f"it takes CUDA and ROCm tensors, got one on {x.device}"
    if x.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter is wrong in bfloat16; it takes float32 and float16"
    if reason := without_memory(x):
        return f"it takes tensors that lie in memory, got {reason}"
    return None


@cached_constant
def _too_old(device: int) -> str | None:
    """Why a GPU cannot run the kernels; `None` where it can."""
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return None
    major, minor = capability
    name = torch.cuda.get_device_name(device)
    return f"it needs a GPU of compute capability 8.0 or newer, got {name} of {major}.{minor}"


def backend(module: str, name: str | None = None, widest: int | None = None) -> Backend[Sequence[Tensor]]:
    """The `triton` backend of an operation, as in `Kernels`, for rows of the first tensor up to `widest`."""
    return Backend("triton", Kernels(module, name), functools.partial(unavailable, widest=widest))


class Kernels:
    """The launchers of an operation, imported at first use: `triton_kernels/<module>.py`, or `name` in it."""

    def __init__(self, module: str, name: str | None = None) -> None:
        self._module, self._name = f"imf_kernels.backends.triton_kernels.{module}", name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernels = importlib.import_module(self._module)
        launcher = getattr(kernels if self._name is None else getattr(kernels, self._name), name)
        setattr(self, name, launcher)  # the next time it is found without this function
        return launcher


class Launcher:
    """A kernel with its constants, launched on the device of its tensors and PyTorch's current stream of it.

    Triton's own launch examines every argument, 20 to 30 µs in Python. Here only the first launch of a kind
    takes that way; its compiled kernel is kept and launched directly from then on. The kind is all that
    Triton specialises a kernel on: the launcher itself, the device, dtype and 16-byte alignment of each
    tensor, which tensors are `None`, and which numbers need 64 bits.

    Args:
        kernel: a `triton.jit` function of tensors, `fixed`, numbers and constants, in this order. Its integer
            numbers are named in `do_not_specialize`.
        fixed: arguments that are the same in every launch, on which Triton may specialise: strides, counts.
        constants: `tl.constexpr` arguments, and options such as num_warps.
    """

    def __init__(self, kernel: Any, *fixed: int | Fixed | None, **constants: object) -> None:
        self.kernel, self.fixed = kernel, fixed
        # A product and a sum that become one fused operation in one form of a kernel and not in another make
        # the primal with a tangent differ from that without: kernels ask for `tl.fma` where they want it.
        self.constants = {"enable_fp_fusion": False, **constants}

    def __call__(self, grid: tuple[int, int], tensors: Tensors, *numbers: float) -> None:
        """Launches the kernel on `grid`, programs along two axes; nothing is launched if there are none.

        Args:
            tensors: tensors and tuples of them, `None` for what is not there; the first is a tensor.
            numbers: integers and floats, each the same type in every call.
        """
        if 0 in grid:
            return
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device < 0:  # in the interpreter
            self.kernel[grid](*tensors, *self.fixed, *numbers, **self.constants)
            return
        key: list[object] = [self, device]
        arguments = (*_addresses(tensors, key), *self.fixed, *numbers)
        if not max(numbers) < 1 << 31:
            key.append(("int64", *[not number < 1 << 31 for number in numbers]))
        kind = tuple(key)
        launch = _kept.get(kind)
        if launch is not None and torch._C._cuda_getDevice() == device:
            launch(grid, device, arguments)
            return
        with torch.cuda.device(device):
            if launch is not None:
                launch(grid, device, arguments)
                return
            _warn_unverified(device)
            compiled = self.kernel[grid](*tensors, *self.fixed, *numbers, **self.constants)
        if launch := _direct(compiled, len(self.kernel.arg_names) - len(arguments)):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[kind] = launch


def _addresses(tensors: Tensors, key: list[object]) -> list[object]:
    """The addresses of tensors; adds to `key` their dtypes, and which are not multiples of 16 if any."""
    addresses: list[Any] = []
    bits = 0
    for x in tensors:
        if x is None:
            key.append(None)
            addresses.append(None)
        elif isinstance(x, tuple):
            addresses.append(tuple(_addresses(x, key)))
        else:
            key.append(x.dtype)
            address = x.data_ptr()
            addresses.append(address)
            bits |= address
    if bits & 15:
        key.append(tuple([isinstance(address, int) and address & 15 > 0 for address in addresses]))
    return addresses


def _direct(compiled: Any, constants: int) -> Callable[..., None] | None:
    """The launch of a compiled kernel by what `triton.JITFunction.run` itself calls in the end.

    It takes the grid, the device, and the kernel's arguments without the last `constants`, with addresses for
    tensors. `None` for an unknown release of Triton, whose kernels are launched in the public way.
    """
    triton = importlib.import_module("triton")
    if compiled is None or not _DIRECT[0] <= _release(triton.__version__) <= _DIRECT[1]:
        return None
    runtime, stream_of = triton.knobs.runtime, torch._C._cuda_getCurrentRawStream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    unused = (None,) * constants  # the compiled kernel has them already

    def launch(grid: tuple[int, int], device: int, arguments: tuple[object, ...]) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):  # a profiler listens
            compiled[(*grid, 1)](*arguments, *unused)
        else:
            run(*grid, 1, stream_of(device), function, metadata, None, None, None, *arguments, *unused)

    return launch


def architecture(x: Tensor) -> str:
    """The architecture of the device of `x`: "sm_90", "gfx942", …; "interpreter" on the CPU."""
    device = x.get_device()
    return "interpreter" if device < 0 else _architecture(device)


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
