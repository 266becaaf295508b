"""Devices, dtypes, interpreters and libraries: where a backend does not run, it says why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik
from imf import train
from imf_kernels import Dual
from imf_kernels.backends import operators
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP16, FP32, OPERATIONS, SMALL
from tests.helpers.backends import dtypes_of

ROOT = Path(__file__).parents[2]
# A fake tensor is on a device that need not exist.
ELSEWHERE = ("mps", "xpu", "meta")
CASES = [next(c for c in SMALL if c.operation == name and FP32 in c.dtypes) for name in OPERATIONS]
each_operation = pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation)


def run(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options
    )


def arguments_of(case, device, dtype=FP32):
    p = errors.problem(case, dtype)
    made = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            for name, x in p.primals.items()}  # fmt: skip
    return {name: Dual(x, torch.empty_like(x)) if name in p.tangents else x for name, x in made.items()}


def kernels_of(operation):
    return [
        backend.name for backend in operators.OPERATIONS[operation].backends if backend.kernels is not None
    ]


@pytest.mark.parametrize("device", ELSEWHERE)
@each_operation
def test_kernels_refuse_devices_they_are_not_written_for(case, device):
    with FakeTensorMode():
        given = arguments_of(case, device)
        for name in kernels_of(case.operation):
            reason = (
                rf"{case.operation}: backend '{name}' cannot run: it takes .* tensors, got one on {device}"
            )
            with pytest.raises(RuntimeError, match=reason):
                case.run(given, name)


@each_operation
def test_the_reference_runs_without_a_kernel_for_the_device(case):
    """And without float64, which not every device has; `sinusoidal_embedding`, which needs it, is refused."""
    made = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **kwargs or {})
            tensors = [y for y in pytree.tree_leaves(result) if isinstance(y, torch.Tensor)]
            made.update((str(operator), y.dtype) for y in tensors)
            return result

    given = arguments_of(case, "meta")
    with Record():
        results = case.run(given, None)
    for result in results:
        parts = (result.primal, result.tangent_rows) if isinstance(result, Dual) else (result,)
        assert {x.device.type for x in parts} == {"meta"}
    in_float64 = [operator for operator, dtype in made if dtype == torch.float64]
    assert made and bool(in_float64) == (case.operation == "sinusoidal_embedding"), in_float64


def test_what_needs_float64_is_refused_on_mps():
    with FakeTensorMode():
        t = torch.empty(3, device="mps")
    for backend in ("reference", None):
        with pytest.raises(RuntimeError, match=r"sinusoidal_embedding: .* float64, which MPS does not have"):
            ik.sinusoidal_embedding(t, 8, backend=backend)


@each_operation
def test_float16_on_a_cpu_is_left_to_the_reference(case):
    if FP16 not in case.dtypes:
        case = next((c for c in SMALL if c.operation == case.operation and FP16 in c.dtypes), case)
    if FP16 not in dtypes_of(case, "reference") or "cpu" not in kernels_of(case.operation):
        pytest.skip(f"{case.operation} has no float16 inputs, or no kernels")
    p = errors.problem(case, FP16)
    given = {n: Dual(x, p.tangents[n]) if n in p.tangents else x for n, x in p.primals.items()}
    with pytest.raises(RuntimeError, match=f"{case.operation}: backend 'cpu' cannot run: it takes float32"):
        case.run(given, "cpu", **case.output_options)
    assert all(ik.primal(y).isfinite().all() for y in case.run(given, None, **case.output_options))


@pytest.mark.parametrize("device", ["mps", "xpu:0", "meta"])
def test_training_refuses_devices_it_has_not_run_on(device, capsys):
    assert train.main(["--device", device]) == 1
    assert f"--device must be auto, cpu, cuda or cuda:<index>, got '{device}'" in capsys.readouterr().err


def test_rocm_is_left_to_triton():
    code = "import torch; torch.version.hip = '7.1'; from imf_kernels import info; print(info.report())"
    report = run(code, check=True).stdout
    assert (
        "CUDA kernels        cannot run: it takes NVIDIA's GPUs, and this PyTorch is built for ROCm" in report
    )


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.4.0", False),
        ("3.6.1", "2.10.1", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.0", "2.5.0", True),
    ],
)
def test_tritons_interpreter_and_numpy(triton, numpy, works):
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    code = """
import sys, numpy, torch, triton
triton.__version__, numpy.__version__ = sys.argv[1:]
import imf_kernels as ik
ik.silu(torch.ones(3), backend="triton")
"""
    error = run(code, triton, numpy, env={**os.environ, "TRITON_INTERPRET": "1"}).stderr
    assert works == (not error), error
    assert works or f"got Triton {triton} and NumPy {numpy}" in error


def test_free_threaded_python_is_refused_by_the_build():
    code = """
import runpy, sys, sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    result = run(code, cwd=ROOT)
    assert result.returncode == 1 and "free-threaded Python is not supported" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's wheels bring libgomp on Linux")
@pytest.mark.parametrize("runtime", ["gomp", "omp", "iomp5"])
def test_a_second_openmp_runtime_is_warned_of(runtime, tmp_path):
    """Configures only; CMake is told which runtime the compiler brings."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    told = ("-DOpenMP_CXX_FLAGS=-fopenmp", f"-DOpenMP_CXX_LIB_NAMES={runtime}")
    told += (f"-DOpenMP_{runtime}_LIBRARY={tmp_path / f'lib{runtime}.so'}", "-DIMF_CUDA=OFF")
    given = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    command = [cmake, "-S", ROOT, "-B", tmp_path / "build", *given, *told]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warned = " ".join(result.stderr.split())
    assert ("is not libgomp" in warned and "Build with g++ (CXX=g++)" in warned) == (runtime != "gomp")
