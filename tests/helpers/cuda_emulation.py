"""The CUDA kernels on the CPU: the sources of csrc/cuda, compiled by a C++ compiler on tests/cuda_host."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from imf_kernels.backends import cuda
from imf_kernels.backends.layout import too_wide, without_memory
from imf_kernels.backends.operators import OPERATIONS

ROOT = Path(__file__).parents[2]
# With AddressSanitizer, whose library the process must have loaded first.
SANITIZE = "IMF_SANITIZE" in os.environ
BUILD = ROOT / "build" / f"cuda_host-{sysconfig.get_config_var('SOABI')}{'-asan' * SANITIZE}"


def missing():
    """Why it cannot be built here; `None` where it can."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    names = [name for name in ("cmake", "ninja") if _program(name) is None]
    return f"not found: {', '.join(names)}" if names else None


def _program(name):
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@functools.cache
def module():
    """The module, built where it is not, or where a source has changed since: a minute on one core."""
    import pybind11

    configure = [
        *(_program("cmake"), "-S", ROOT / "tests" / "cuda_host", "-B", BUILD, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSANITIZE={'ON' if SANITIZE else 'OFF'}",
    ]
    # The compiler is not to be looked after: it keeps what it allocates.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for command in (configure, [_program("cmake"), "--build", BUILD]):
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
    (path,) = BUILD.glob("_cuda_host.*.so")
    specification = importlib.util.spec_from_file_location("_cuda_host", path)
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    return found


def _unavailable(widest, tensors):
    """As `cuda.unavailable`, of tensors on the CPU."""
    for x in tensors:
        if x.dtype not in cuda.DTYPES:
            return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        if x.device.type != "cpu":
            return f"it takes CPU tensors, got one on {x.device}"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
    return too_wide(tensors[0], widest)


@contextlib.contextmanager
def emulated():
    """The `cuda` backends take CPU tensors meanwhile."""
    functions, before = module(), []
    for operation in OPERATIONS.values():
        backend = next((b for b in operation.backends if b.name == "cuda"), None)
        kernels = {} if backend is None else vars(backend.kernels)
        if "shares" not in kernels:  # attention's, whose instructions are those of one GPU
            continue
        before.append((operation, operation.backends, kernels, dict(kernels)))
        kernels |= {
            name: getattr(functions, f"{operation.kernels}_{name}")
            for name in ("forward", "backward")
            if name in kernels
        }
        unavailable = functools.partial(_unavailable, backend.unavailable.keywords["widest"])
        operation.backends = tuple(
            dataclasses.replace(b, unavailable=unavailable) if b is backend else b for b in operation.backends
        )
        operation.choices.clear()
    try:
        yield
    finally:
        for operation, backends, kernels, own in before:
            operation.backends = backends
            kernels.update(own)
            operation.choices.clear()
