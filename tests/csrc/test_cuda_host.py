"""The emulator of CUDA sees what would hang a GPU or race on it. In it the kernels do neither, on any shape,
nor do they read or write beyond their tensors."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imf_kernels.backends import cuda
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import BF16, FP16, FP32
from tests.helpers import cuda_emulation
from tests.helpers.backends import running_on

pytestmark = [
    pytest.mark.slow,  # a minute to build
    pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())),
]

# Widths of rows that take a part of a warp, a warp, several warps and a whole block; whole packs or not.
WIDTHS = (1, 8, 24, 72, 101, 128, 256, 264, 515, 768, 1152, 2056, 4100, 8192)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("half_a_block_waits", "divergent threads: thread \\(31, 0\\) waits at .*module.cpp:.*has finished"),
        ("two_barriers", "divergent threads: .*waits at .*waits at"),
        ("half_a_warp_shuffles", "divergent threads"),
    ],
)
def test_divergent_threads_are_seen(kernel, says):
    with pytest.raises(RuntimeError, match=says):
        getattr(cuda_emulation.module(), kernel)()


def test_a_missing_barrier_is_seen():
    """Its result depends on the order in which threads run."""
    module = cuda_emulation.module()
    forwards = module.race()
    module.set_backwards(True)
    try:
        assert module.race() != forwards
    finally:
        module.set_backwards(False)


def any_case(seed):
    """A case of random shape, with tangents of some rows, and a dtype."""
    draw = random.Random(seed)
    b, n, h = draw.randint(1, 5), draw.randint(1, 40), draw.randint(1, 4)
    width = draw.choice(WIDTHS) if draw.random() < 0.7 else draw.randint(1, 2000)
    if width > 1000:
        b, n = draw.randint(1, 3), draw.randint(1, 4)
    stream = {"stream": FP32, "dtypes": (BF16, FP16)} if draw.random() < 0.3 else {}
    normed = {**stream, "output_dtype": draw.choice((BF16, FP16))} if stream else {}
    if stream:
        normed["dtypes"] = (normed["output_dtype"],)
    case = draw.choice(
        [
            lambda: cases.rms_norm("any", b, n, width=width, **normed),
            lambda: cases.layer_norm("any", b, n, width=width, **normed),
            lambda: cases.layer_norm_modulate("any", b, n, width=width, **normed),
            lambda: cases.qk_norm_rope("any", b, h, n, 2 * (width % 129 + 1)),
            lambda: cases.swiglu("any", b, n, width=width),
            lambda: cases.gated_residual("any", b, n, width=width, **stream),
            lambda: cases.gated_residual(
                *("any", b, n), width=width, gate_a_sample=True, tangents=("x", "branch", "gate"), **stream
            ),
            lambda: cases.gelu("any", b, n, width, approximate=draw.choice(("none", "tanh"))),
            lambda: cases.silu("any", b, n, width),
        ]
    )()
    return dataclasses.replace(case, tangent_rows=draw.randint(0, b)), draw.choice(case.dtypes)


@pytest.mark.parametrize("first", range(0, 150, 10))
def test_any_shape(first, monkeypatch, poisoned_memory):
    """The error rule, and bitwise the same results whatever the order of the threads."""
    module = cuda_emulation.module()
    with cuda_emulation.emulated():
        for seed in range(first, first + 10):
            # Sums over rows in few shares, and in many.
            monkeypatch.setattr(cuda, "_processors", lambda seed=seed: 1 + seed % 4)
            case, dtype = any_case(seed)
            p = errors.Problem.draw(case, dtype, seed)
            results = p.evaluate("cuda")
            p.check(results)
            module.set_backwards(True)
            try:
                again = p.evaluate("cuda")
            finally:
                module.set_backwards(False)
            for name, x in results.items():
                assert torch.equal(x, again[name]), f"{case}, {dtype}, {name}: threads race"


def _sanitizer():
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return None
    paths = [
        subprocess.check_output([compiler, f"-print-file-name={library}"], text=True).strip()
        for library in ("libasan.so", "libstdc++.so")  # whose exceptions it has to see
    ]
    return " ".join(paths) if "/" in paths[0] else None


@pytest.mark.skipif(_sanitizer() is None, reason="the compiler has no AddressSanitizer")
def test_nothing_beyond_the_tensors():
    """Cases and layouts of the other tests once more, in a process that stops at the first stray access."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "IMF_SANITIZE": "1", "LD_PRELOAD": _sanitizer(), "ASAN_OPTIONS": "detect_leaks=0",
    }  # fmt: skip
    stray = subprocess.run(
        [sys.executable, "-c", "from tests.helpers import cuda_emulation; cuda_emulation.module().stray()"],
        env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert stray.returncode and "heap-buffer-overflow" in stray.stderr, stray.stderr[-2000:]
    chosen = "cuda and (error_rule or memory_order or any_shape)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider",
         "tests/ops/test_operations.py", "tests/ops/test_edge_cases.py", "tests/csrc/test_cuda_host.py"],
        env=environment, capture_output=True, text=True, check=False, cwd=root,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]


def test_running_on_the_emulator_is_undone():
    operation = OPERATIONS["rms_norm"]
    (backend,) = (b for b in operation.backends if b.name == "cuda")
    own = backend.kernels.forward
    with running_on("cuda"):
        assert (backend.kernels.forward is own) == (cuda.missing() is None)
    assert backend.kernels.forward is own and backend in operation.backends
