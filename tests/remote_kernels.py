"""The compiled kernels in a process of their own, under an emulator of another processor.

    python tests/remote_kernels.py build/aarch64        builds the program, prints the command that runs it
    IMF_REMOTE_KERNELS="qemu-aarch64 build/aarch64/_C" python -m pytest tests/test_vec.py -k neon

Where the variable is set, conftest.py installs this instead of `imf_kernels._C`. The memory of every tensor
that a call points to is sent with it, and comes back with what the kernel wrote, byte by byte the same
functions and arguments as in the module: tests/remote_kernels/pybind11/pybind11.h compiles csrc/bindings.cpp.
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
from torch.multiprocessing.reductions import StorageWeakRef

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


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


class Storages:
    """The living storages that `data_ptr` of a tensor was asked for."""

    def __init__(self):
        self._by_address = {}
        data_ptr = torch.Tensor.data_ptr

        @functools.wraps(data_ptr)
        def recorded(x):
            address = data_ptr(x)
            if address:
                storage = x.untyped_storage()
                self._by_address[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
            return address

        torch.Tensor.data_ptr = recorded

    def of(self, pointers):
        """Addresses and sizes of those that one of these integers points into."""
        living = {a: size for a, (x, size) in self._by_address.copy().items() if not x.expired()}
        return {a: size for a, size in living.items() if any(a <= p <= a + size for p in pointers)}


class RemoteKernels(types.ModuleType):
    """The functions and attributes of the compiled module in the process that `command` starts."""

    def __init__(self, command):
        super().__init__("imf_kernels._C")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()
        self._storages = Storages()
        for name, value in self._call("attributes").items():
            setattr(self, name, value)
        for name in self.functions:
            setattr(self, name, functools.partial(self._call, name))

    def _call(self, name, *arguments):
        with self._lock:
            values = list(_flat(arguments))
            sizes = self._storages.of([x for x in values if isinstance(x, int)])
            words = [name, len(sizes), *(x for block in sizes.items() for x in block), *values]
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


def _flat(values):
    """The values, and of a sequence its length and its values."""
    for x in values:
        if isinstance(x, (list, tuple)):
            yield len(x)
            yield from _flat(x)
        else:
            yield int(x) if isinstance(x, bool) else x


def install(command):
    """Makes `from imf_kernels import _C` give the remote kernels; before the first import of imf_kernels."""
    assert "imf_kernels" not in sys.modules
    sys.modules["imf_kernels._C"] = RemoteKernels(shlex.split(command))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
