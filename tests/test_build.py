"""The compiled module: its stub is true, a second build works, and edited sources are compiled again."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ON_GPU

from imf_kernels import _C, info
from imf_kernels.info import OPERATIONS, report

ROOT = Path(__file__).parent.parent


def test_stub_names_what_the_module_has():
    stub = ast.parse((ROOT / "imf_kernels" / "_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    built = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")}
    on_request = {name for name in functions if "cuda" in name}
    assert set(functions) - on_request <= built <= set(functions)
    for name in built:
        # pybind11 writes one "argN: type" into the docstring for each argument.
        arguments = getattr(_C, name).__doc__.splitlines()[0].split("->")[0]
        count = 0 if "()" in arguments else sum(f"arg{i}:" in arguments for i in range(40))
        positional = len(functions[name].args.posonlyargs)
        assert count == positional or (count == 0 and positional == 1 and "arg0" in arguments), name


def test_info_lists_every_operation():
    text = report()
    files = {path.stem for path in (ROOT / "imf_kernels" / "ops").glob("*.py")} - {"__init__", "check"}
    assert files == set(OPERATIONS)
    for operation in OPERATIONS:
        assert operation in text
        assert [b.name for b in info.backends(operation)][-1] == "reference"


def copy_of_the_sources(folder: Path) -> Path:
    for name in ("csrc", "imf_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(folder: Path, tools: Path) -> str:
    """Builds as an isolated build does: its tools on PATH, in a folder that is gone the next time."""
    tools.mkdir()
    for name in ("ninja", "cmake"):
        source = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        (tools / name).symlink_to(source)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "IMF_CUDA": "OFF"}
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    shutil.rmtree(tools)
    return run.stdout


def doc_of(folder: Path) -> str:
    """The built module's docstring, read in a process of its own."""
    (module,) = (folder / "imf_kernels").glob("_C.*.so")
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.__doc__)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(module)], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed")
def test_second_build_and_edited_source(tmp_path):
    folder = copy_of_the_sources(tmp_path / "tree")
    build(folder, tmp_path / "tools-1")
    objects = {p: p.stat().st_mtime_ns for p in folder.rglob("*.o")}
    assert doc_of(folder) == "Compiled kernels of imf_kernels"

    build(folder, tmp_path / "tools-2")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.o")} == objects, "compiled again for nothing"

    bindings = folder / "csrc" / "bindings.cpp"
    bindings.write_text(bindings.read_text().replace("Compiled kernels of", "Edited kernels of"))
    output = build(folder, tmp_path / "tools-3")
    assert re.search(
        r"Linking CXX.*_C.*\n(.*\n)?imf_kernels: instruction sets plain.*, CUDA OFF$", output, re.M
    )
    assert doc_of(folder) == "Edited kernels of imf_kernels"
    rebuilt = {p.name for p, then in objects.items() if p.stat().st_mtime_ns != then}
    assert rebuilt == {"bindings.cpp.o"}


@pytest.fixture
def configure(tmp_path):
    """Configures with an nvcc that is none, and tells what CMake says."""

    def program(name):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)

    def call(*programs, options=(), **environment):
        for name in ("nvcc", *programs):
            program(name)
        pybind11 = pytest.importorskip("pybind11")
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.run(
            ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", "-DIMF_CUDA=auto",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", *options],
            env={**os.environ, "LD_LIBRARY_PATH": "", "PATH": path} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        return run.stdout

    return call


SIGNS = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
has_driver = ON_GPU or shutil.which("nvidia-smi") or any(path.exists() for path in SIGNS)


@pytest.mark.skipif(bool(has_driver), reason="there is a driver")
@pytest.mark.parametrize("stub", [None, "libcuda.so", "libcudart.so.1"])
def test_cuda_left_out_is_said_last(configure, tmp_path, stub):
    """The toolkit's stub of the driver, libcuda.so, is not a driver."""
    if stub:
        (tmp_path / stub).touch()
    said = [line for line in configure(LD_LIBRARY_PATH=str(tmp_path)).splitlines() if "imf_kernels:" in line]
    assert len(said) == 1 and said[0].endswith(
        f"the CUDA kernels are left out: nvcc is at {tmp_path}/bin/nvcc, but no NVIDIA driver was found; "
        "to build them, set IMF_CUDA=ON and install again"
    )


@pytest.mark.parametrize("where", ["LD_LIBRARY_PATH", "second in LD_LIBRARY_PATH", "nvidia-smi"])
def test_a_driver_is_found_where_the_loader_finds_it(configure, tmp_path, where):
    (tmp_path / "libcuda.so.1").touch()
    if where == "nvidia-smi":
        output = configure("nvidia-smi")
    else:
        output = configure(LD_LIBRARY_PATH=f"/nowhere:{tmp_path}" if "second" in where else str(tmp_path))
    # It goes on to the compiler, which does not work here.
    assert "(enable_language)" in output and "left out" not in output


def test_info_says_what_a_build_without_cuda_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(_C, "cuda_architectures", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert "not built: that needs nvcc, on PATH or in CUDA_HOME" in report()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert f"nvcc is at {tmp_path}/bin/nvcc: set IMF_CUDA=ON and install again" in report()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-DMSVC=ON",), "MSVC cannot build the kernels, which need GCC or Clang"),
        (("-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON",), "OpenMP was not found, the kernels are built without"),
    ],
)
def test_compilers_that_lack_something(configure, options, said):
    assert said in " ".join(configure(options=options).split())
