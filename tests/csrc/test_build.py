"""The compiled module: its stub is true, a second build works, and edited sources are compiled again."""

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imf_kernels import _C
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.info import report
from tests.helpers import stub
from tests.helpers.backends import ON_GPU

ROOT = Path(__file__).parents[2]


def test_the_stub_is_what_the_module_prints():
    printed = (ROOT / "imf_kernels" / "_C.pyi").read_text()
    assert printed == stub.text(), "python -m tests.helpers.stub > imf_kernels/_C.pyi"
    names = {
        node.name
        for node in ast.parse(stub.text()).body
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.ClassDef) and not node.bases)
    }
    built = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")}
    assert names - {"cuda_unavailable"} <= built <= names


def test_launchers_have_the_parameters_of_the_schema():
    """Of Triton's, the names and their order; the compiled ones are the schema."""
    pytest.importorskip("triton")
    for operation in OPERATIONS.values():
        for backend in operation.backends:
            if backend.name != "triton":
                continue
            for name in ("forward", "backward"):
                schema = _C.schemas.get(f"{operation.kernels}_{name}")
                if schema is None:
                    continue
                launcher = getattr(backend.kernels, name)
                wanted = [parameter.split(":")[0] for parameter in stub.parameters(schema)]
                assert list(inspect.signature(launcher).parameters) == wanted, (operation.name, name)


def test_kernels_define_no_functions_of_the_standard_library():
    """The linker keeps one of several equal ones, which may be that of instructions that a processor lacks.

    Templates that are inlined, such as std::min, leave none; strings and their operators do.
    """
    for path in (ROOT / "csrc" / "cpu").iterdir():
        if path.stem != "isa":
            assert not re.search(r"std::(string|to_string|invalid_argument)", path.read_text()), path


def test_a_typed_file_of_a_user():
    file = ROOT / "tests" / "helpers" / "typed_use.py"
    pytest.importorskip("mypy")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--follow-imports=silent", file],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    expected = {
        number: line.partition("# expect: ")[2]
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "# expect: " in line
    }
    errors = re.findall(r"typed_use\.py:(\d+): error: (.*)", run.stdout)
    assert {int(number) for number, _ in errors} == set(expected), run.stdout
    assert all(expected[int(number)] in message for number, message in errors), run.stdout


def test_what_the_module_refuses():
    x, w, y, rstd = torch.ones(2, 8), torch.ones(8), torch.empty(2, 8), torch.empty(2)
    cases = {
        "rms_norm_forward: x must be contiguous rows at one distance, got .2, 8. with strides .16, 2.": (
            torch.ones(2, 16)[:, ::2], None, w, y, None, rstd, 1e-6,
        ),
        "rms_norm_forward: weight must be float32": (x, None, w.double(), y, None, rstd, 1e-6),
        "the kernels take tensors that lie in memory": (
            torch._efficientzerotensor((2, 8)), None, w, y, None, rstd, 1e-6,
        ),
        "the kernels of the CPU take float32 and bfloat16": (x.half(), None, w, y.half(), None, rstd, 1e-6),
    }  # fmt: skip
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            _C.rms_norm_forward(*arguments)
    with pytest.raises(TypeError, match="the kernels take tensors, got NoneType"):
        _C.rms_norm_forward(None, None, w, y, None, rstd, 1e-6)
    with pytest.raises(
        ValueError, match=r"mask must have the shape \[batch, heads, queries, keys\] .* got \[2, 2\]"
    ):
        heads = torch.ones(1, 1, 2, 8)
        _C.attention_forward(
            heads, heads, heads, None, None, None, torch.ones(2, 2), heads, None, rstd, 1.0, True
        )


def test_a_pytorch_without_the_exchange_api_is_refused():
    code = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import imf_kernels as ik;"
        "ik.silu(torch.ones(3))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "__dlpack_c_exchange_api__, which PyTorch has from 2.11 on, got PyTorch" in run.stderr, run.stderr


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
    lists = folder / "CMakeLists.txt"
    text = lists.read_text()
    assert "-O3 -DNDEBUG" in text
    lists.write_text(text.replace("-O3 -DNDEBUG", "-O0 -DNDEBUG"))  # sooner done
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
    monkeypatch.setattr(_C, "cuda", False)
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
