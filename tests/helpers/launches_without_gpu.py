"""What the driver is given for launches of Triton kernels, in a process with tests/cuda_runtime.

Every function of kernels that small cases call is called again: recorded, replayed, replayed on other
tensors. Each time the driver must be given what `Launcher` was: grid, addresses and numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import warnings
from unittest import mock

import torch
import triton

from imf_kernels.backends import triton_launch
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import cases, errors

CODES = {"p": "Q", "l": "q", "i": "i", "f": "f"}
CASES = [
    *(cases.rms_norm("rows", 2, 5, width=24), cases.layer_norm("rows", 2, 5, width=24)),
    *(cases.qk_norm_rope("heads", 2, 3, 21, 24), cases.swiglu("rows", 2, 5, width=24)),
    *(cases.gated_residual("rows", 2, 5, width=24), cases.gated_residual_rms_norm("rows", 2, 5, width=24)),
    cases.layer_norm_modulate("rows", 2, 5, width=24),
    *(
        c
        for c in cases.SMALL
        if c.name in ("digits", "causal", "mask added") and "triton" not in c.refused_by
    ),
]
types: dict[int, str] = {}  # of a kernel's arguments, by its address
driver: list[tuple[object, ...]] = []  # launches by the driver
wanted: list[tuple[object, ...]] = []  # those that a Launcher was asked for


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)  # fmt: skip
def cu_launch_kernel(function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
    codes = [CODES[t] for t in types[function] if t != "c"]
    values = [
        struct.unpack(code, ctypes.string_at(parameters[i], struct.calcsize(code)))[0]
        for i, code in enumerate([*codes, "Q", "Q"])
    ]
    assert (z, _y, _z, extra, *values[-2:]) == (1, 1, 1, None, 0, 0)
    driver.append(((x, y), values[:-2]))
    return 0


direct, launch = triton_launch._direct, triton_launch.Launcher.__call__


def remembered(compiled):
    found = direct(compiled)
    types[found[1]] = found[4]
    return found


def asked(launcher, grid, tensors, *numbers):
    """Notes what the kernel takes: Triton leaves out None and the fixed numbers that are 1."""
    if 0 not in grid:
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in tensors]
        fixed = [x for x in triton_launch._flat(launcher.fixed) if x is not None and x != 1]
        rounded = [struct.unpack("f", struct.pack("f", x))[0] if isinstance(x, float) else x for x in numbers]
        wanted.append((tuple(grid), [x for x in given if x is not None] + fixed + rounded))
    launch(launcher, grid, tensors, *numbers)


def calls_of(case):
    """The functions of kernels that a case calls, with their arguments."""
    calls = []

    def spied(function):
        def call(*arguments):
            calls.append((function, arguments))
            function(*arguments)

        return call

    with contextlib.ExitStack() as stack, torch.device("cuda"):
        for operation in OPERATIONS.values():
            for backend in operation.backends:
                if operation.public == case.operation and backend.name == "triton":
                    for name in ("forward", "backward", "pair_backward"):
                        with contextlib.suppress(AttributeError):
                            function = getattr(backend.kernels, name)
                            stack.enter_context(mock.patch.object(backend.kernels, name, spied(function)))
        attention = case.operation == "scaled_dot_product_attention"
        for tangents in (True, False):
            errors.problem(case, torch.float32).evaluate("triton", tangents=tangents)
        if not attention:
            errors.problem(case, torch.float32, differentiable=True).evaluate("triton")
    return calls


def launched(function, arguments):
    """What the driver is given by a call."""
    driver.clear()
    function(*arguments)
    return list(driver)


def expected(function, arguments):
    """What a call asks of its launchers: nothing is replayed while a hook waits for Triton's launches."""
    wanted.clear()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print_nothing)
    function(*arguments)
    hooks.remove(print_nothing)
    return list(wanted)


def print_nothing(metadata):
    """A hook of Triton's."""


def moved(x):
    """A tensor of the same form elsewhere; the one it was stays in place."""
    if not isinstance(x, torch.Tensor):
        return x
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.empty(size + 16, dtype=x.dtype, device="cuda")
    first = x.data_ptr() % 16 // x.element_size()
    return memory[first:].as_strided(x.shape, x.stride(), first)


def main() -> None:
    warnings.simplefilter("ignore")
    pointer = ctypes.cast(cu_launch_kernel, ctypes.c_void_p).value
    with (
        mock.patch.object(triton_launch, "_launch_kernel", lambda: pointer),
        mock.patch.object(triton_launch, "_direct", remembered),
        mock.patch.object(triton_launch.Launcher, "__call__", asked),
    ):
        checked = 0
        for case in CASES:
            for function, arguments in calls_of(case):
                function(*arguments)
                wanted.clear()
                replayed = launched(function, arguments)
                assert not wanted, f"{case}: {function} runs in Python again"
                assert replayed == expected(function, arguments) != [], case
                others = tuple(map(moved, arguments))
                replayed = launched(function, others)
                assert replayed == expected(function, others), case
                checked += len(replayed)
        print(f"{checked} launches in {len(CASES)} cases")


if __name__ == "__main__":
    main()
