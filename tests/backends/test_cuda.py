"""The CUDA kernels: what they are refused for, what the compiler says of them.

That they are right is tested with the other backends, under the name `cuda`.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import imf_kernels as ik
from imf_kernels import _C, info
from imf_kernels.backends import cuda
from tests.helpers.backends import CUDA_ON_GPU

ROOT = Path(__file__).parents[2]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKIT)
SOURCES = [path for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if "attention" not in path.name]
ARCHITECTURES = ("80", "90a", "100")
# How many there are in each source: combinations of types.
KERNELS = {
    "rms_norm": 10, "layer_norm": 10, "qk_norm_rope": 6, "swiglu": 6, "elementwise": 18, "gated_residual": 10,
    "rows": 1, "runtime": 0,
}  # fmt: skip
OPERATIONS = (
    "rms_norm", "layer_norm", "layer_norm_modulate", "qk_norm_rope", "swiglu", "gelu", "silu",
    "gated_residual",
)  # fmt: skip


def test_why_not_here():
    """Without a GPU the module loads, and says what is missing; tensors elsewhere are refused by device."""
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot run: it takes CUDA tensors, got one on cpu"
    ):
        ik.silu(torch.zeros(3), backend="cuda")
    if CUDA_ON_GPU:
        assert cuda.missing() is None
    elif _C.cuda_architectures:
        assert re.search("driver|no CUDA", cuda.missing()) and cuda.missing() in info.report()
    else:
        assert "IMF_CUDA=ON" in cuda.missing()


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("100-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("90-virtual", [(9, 0), (12, 0)], [(8, 9)]),
    ],
)
def test_which_gpus_a_build_is_for(built, runs, does_not):
    assert all(cuda.runs_on(built, *capability) for capability in runs)
    assert not any(cuda.runs_on(built, *capability) for capability in does_not)


def test_a_gpu_that_it_was_not_built_for_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(_C, "cuda_architectures", "80-real 90a-real")
    assert cuda._not_built_for.__wrapped__(0).startswith("it was built for 80-real 90a-real, not for sm_120")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda._not_built_for.__wrapped__(0) is None


def test_rows_wider_than_a_block_holds_are_refused(monkeypatch):
    x = SimpleNamespace(
        dtype=torch.float32,
        device=torch.device("cuda"),
        get_device=lambda: 0,
        shape=torch.Size((2, 8192)),
        dim=lambda: 2,
    )
    for name in ("unfit", "missing", "_not_built_for"):
        monkeypatch.setattr(cuda, name, lambda *asked: None)
    assert cuda.unavailable([x], widest=8192) is None
    assert cuda.unavailable([x], widest=8191) == "it takes rows of at most 8191, got 8192"
    x.shape, x.dim = torch.Size(()), lambda: 0
    assert cuda.unavailable([x], widest=8192) is None  # a scalar
    monkeypatch.undo()
    x.dtype = torch.float64
    assert "got float64" in cuda.unavailable([x], widest=8192)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    """The compiler's report: no kernel has a stack, and registers are left for two blocks of 256 threads."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [
        *(NVCC, "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", *targets, "--threads=0"),
        *("-Xptxas=-v", "-Werror=all-warnings", "-c", source, "-o", tmp_path / "out.o"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    reports = re.split(r"Compiling entry function '", run.stderr)[1:]
    assert len(reports) == 3 * KERNELS[source.stem]
    for report in reports:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        ).groups()
        assert (stack, stores, loads) == ("0", "0", "0"), report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 128, report
