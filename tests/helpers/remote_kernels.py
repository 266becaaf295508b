"""The compiled kernels in a process of their own, under an emulator of another processor.

    python -m tests.helpers.remote_kernels build/aarch64  builds the program, prints the command that runs it
    IMF_REMOTE_KERNELS="qemu-aarch64 build/aarch64/_C" python -m pytest tests/csrc/test_vec.py -k neon

Where the variable is set, conftest.py installs this instead of `imf_kernels._C`. The memory of every tensor
of a call is sent with it, and comes back with what the kernel wrote; functions and arguments are those of the
module: tests/remote_kernels/pybind11/pybind11.h compiles csrc/bindings.cpp.
A folder named aarch64 is built for that processor, any other one for this.
"""

import ctypes
import functools
import json
import os
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Of csrc/types.h; 4 is any other one.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


def build(folder):
    """Builds the program by the project's own CMakeLists.txt; returns the command that runs it."""
    stand_ins = ROOT / "tests" / "remote_kernels"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DIMF_CUDA=OFF", "-DIMF_WERROR=ON"]
    configure += [f"-D{name}={stand_ins}" for name in ("pybind11_DIR", "CMAKE_MODULE_PATH")]
    command = [folder / "_C"]
    if folder.name == "aarch64":
        system = ("SYSTEM_NAME=Linux", "SYSTEM_PROCESSOR=aarch64", f"CXX_COMPILER={COMPILER}")
        # Static: the emulator then needs no library of that system.
        configure += [f"-DCMAKE_{x}" for x in (*system, "EXE_LINKER_FLAGS=-static")]
        openmp = subprocess.check_output([COMPILER, "-print-file-name=libgomp.a"], text=True).strip()
        configure += [f"-DOpenMP_gomp_LIBRARY={openmp}"]
        command = [EMULATOR, *command]
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # cmake and ninja
    for step in (configure, ["cmake", "--build", folder]):
        subprocess.run(step, check=True, stdout=sys.stderr, env={**os.environ, "PATH": tools})
    return shlex.join(map(str, command))


class RemoteKernels(types.ModuleType):
    """The functions and attributes of the compiled module in the process that `command` starts."""

    def __init__(self, command):
        super().__init__("imf_kernels._C")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()
        for name, value in self._call("attributes").items():
            setattr(self, name, value)
        for name in self.functions:
            setattr(self, name, functools.partial(self._call, name))
        self.key = lambda arguments: None  # no choice of a kernel is remembered

    def _call(self, name, *arguments):
        with self._lock:
            storages = [x.untyped_storage() for x in _tensors(arguments) if x.data_ptr()]
            sizes = {x.data_ptr(): x.nbytes() for x in storages}
            blocks = (x for block in sizes.items() for x in block)
            words = [name, torch.get_num_threads(), len(sizes), *blocks, *_words(arguments)]
            pipe = self._process.stdin
            pipe.write(" ".join(map(str, words)).encode() + b"\n")
            for address, size in sizes.items():
                pipe.write(ctypes.string_at(address, size))
            pipe.flush()
            line = self._process.stdout.readline().decode()
            if not line:
                raise RuntimeError(f"{name} ended its process with {self._process.wait()}: {arguments}")
            for address, size in sizes.items():
                ctypes.memmove(address, self._process.stdout.read(size), size)
        kind, _, text = line.rstrip("\n").partition(" ")
        if kind != "ok":
            raise (ValueError if kind == "ValueError" else RuntimeError)(text)
        return json.loads(text)


def _tensors(values):
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _words(values):
    """The arguments of a call as pybind11.h reads them."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield from (x.dim(), DTYPES.get(x.dtype, 4), x.data_ptr(), *x.shape, *x.stride())
        elif isinstance(x, (list, tuple)):
            yield len(x)
            yield from _words(x)
        else:
            yield -1 if x is None else int(x) if isinstance(x, bool) else x


def install(command):
    """Makes `from imf_kernels import _C` give the remote kernels; before the first import of imf_kernels."""
    assert "imf_kernels" not in sys.modules
    sys.modules["imf_kernels._C"] = RemoteKernels(shlex.split(command))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
