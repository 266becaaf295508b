"""Threads: one OpenMP runtime, results that do not depend on their number, calls side by side, forks."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import imf_kernels as ik
from imf_kernels import _C, Dual
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import BF16, FP32
from tests.helpers.backends import dtypes_of, threads

# Large enough for 3 threads each: a thread takes at least 2^13 elements.
BIG = [
    cases.rms_norm("big", 7, 50, width=130),
    cases.layer_norm("big", 7, 50, width=130),
    cases.layer_norm_modulate("big", 7, 50, width=130),
    cases.layer_norm_modulate("big, many samples", 130, 2, width=130),
    cases.group_norm("big", 3, 8, 50, 41, groups=4, silu=True),
    cases.group_norm("big, one group", 1, 8, 50, 130, groups=1),
    cases.group_norm("big, channels last", 3, 40, 50, 13, groups=4, silu=True, x={"channels_last": True}),
    cases.qk_norm_rope("big", 3, 4, 50, 72),
    cases.attention("big", 3, 2, 110, 40, keys=90, value_width=24),
    cases.attention("one head, cut into stretches of queries", 1, 1, 500, 8, keys=276),
    cases.attention("causal, one head in stretches", 1, 1, 500, 8, keys=276, is_causal=True),
    cases.attention(
        "one head of keys, mask", 1, 6, 110, 8, keys=90, kv_heads=1, mask=cases.Input((110, 90), true=0.5)
    ),
    cases.swiglu("big", 7, 50, width=130),
    cases.gated_residual("big", 7, 50, width=130),
    cases.gated_residual_rms_norm("big", 7, 50, width=130),
    cases.gated_residual("big, a gate a sample", 7, 50, width=130, gate_a_sample=True),
    cases.gelu("big", 7, 50, 130),
    cases.silu("big", 7, 50, 130),
    cases.sinusoidal_embedding("big", 300, 256),
    cases.prepend_tokens("big", 9, 40, 130, (3, 2)),
]
on_big = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}, {str(dtype)[6:]}")
        for case in BIG
        for dtype in dtypes_of(case, "cpu")
    ],
)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run_python(script, *arguments, **environment):
    """A process of its own, whose idle threads sleep: spinning ones starve each other on a busy machine."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _built_by_clang():
    file = getattr(_C, "__file__", None)  # kernels on an emulated processor have none
    return file is not None and b"clang version" in Path(file).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.skipif(not _C.openmp, reason="built without OpenMP")
@pytest.mark.skipif(_built_by_clang(), reason="Clang's OpenMP runtime is not PyTorch's")
def test_one_openmp_runtime_is_mapped():
    result = run_python("""
        import imf_kernels, torch
        torch.set_num_threads(2)
        x = torch.randn(64, 1024)
        imf_kernels.silu(x, backend="cpu"), x @ x.mT, x.exp()
        names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print(*(name for name in names if any(omp in name for omp in ("libgomp", "libomp", "libiomp"))))
    """)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, result.stdout


@on_big
def test_the_number_of_threads_changes_nothing(case, dtype):
    """Bitwise equal on 1 to 3 threads, sums over rows too; and twice on the same number."""
    p = errors.problem(case, dtype)
    results = {}
    for count in (1, 2, 3):
        with threads(count):
            results[count] = p.evaluate("cpu")
            again = p.evaluate("cpu")
        assert all(torch.equal(x, again[name]) for name, x in results[count].items())
        p.check(results[count])
    for count in (2, 3):
        for name, x in results[count].items():
            assert torch.equal(x, results[1][name]), name


def test_tangents_of_some_rows_on_several_threads():
    """The shares of rows with and without a tangent: every row written, whatever the split."""
    case = cases.rms_norm("split", 300, width=130)
    for rows in (0, 1, 17, 299, 300):
        p = errors.Problem.draw(case.with_rows(rows), FP32, seed=0)
        with threads(3):
            results = p.evaluate("cpu")
        p.check(results)


def test_python_threads_side_by_side():
    """Each with data of its own, at the same time, forward and backward, on teams of two threads."""
    drawn = [errors.Problem.draw(case, dtypes_of(case, "cpu")[-1], seed) for seed in range(3) for case in BIG]
    with threads(2):
        expected = [p.evaluate("cpu") for p in drawn]
        with ThreadPoolExecutor(4) as pool:
            # A Python thread has its own number of OpenMP threads.
            for wanted, got in zip(expected, pool.map(_on_two_threads, drawn), strict=True):
                for name, x in got.items():
                    assert torch.equal(x, wanted[name]), name


def _on_two_threads(p):
    torch.set_num_threads(2)
    return p.evaluate("cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_on_one_thread():
    """As in a DataLoader's worker: after the parent used its threads."""
    result = run_python("""
        import os, torch, imf_kernels as ik
        torch.set_num_threads(2)
        x = torch.randn(64, 1024)
        y = ik.silu(x, backend="cpu")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(ik.silu(x, backend="cpu"), y) else 3)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert result.returncode == 0, result.stderr


def test_fresh_memory_of_the_kernels_is_not_read(tmp_path):
    """Working memory is malloc'ed: with glibc told to fill it with huge numbers the results stay the same."""
    script = """
        import sys, torch
        from imf_kernels.backends import cpu
        from imf_kernels.testing import errors
        from imf_kernels.testing.cases import select
        torch.set_num_threads(1)
        results = []
        for isa in cpu.instruction_sets():
            with cpu.use_instruction_set(isa):
                for case in select("scaled_dot_product_attention")[::3] + select("rms_norm")[::3]:
                    results.append(errors.Problem.draw(case, torch.float32, 0).evaluate("cpu"))
        torch.save(results, sys.argv[1])
    """
    results = []
    for value in ("0", "128"):  # filled with 0x7f bytes: 3.4e38
        path = tmp_path / value
        result = run_python(script, str(path), MALLOC_PERTURB_=value)
        assert result.returncode == 0, result.stderr
        results.append(torch.load(path))
    for a, b in zip(*results, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_dual_made_in_one_thread_is_used_in_another():
    x = Dual(torch.randn(64, 600, dtype=BF16), torch.randn(64, 600, dtype=BF16))
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(ik.silu, x, backend="cpu").result()
    assert torch.equal(y.tangent, ik.silu(x, backend="cpu").tangent)
