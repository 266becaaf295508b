"""Each operation at the shapes of training runs.

A group of the table is one operation, case and dtype, and reads as ratios: ours with the tangent in one pass,
the primal alone, the `reference` backend, and in plain PyTorch `torch.func.jvp` eager and compiled and
central finite differences; and with the backward of the primal after it. What bounds a row operation is in
the table too, a copy of as many bytes; the bound of products, from FLOPs, is in the record
(`--benchmark-json`), where report.py finds it. Results are checked before they are timed.

    pytest benchmarks --benchmark-only                      the digits, attention of iMF-B/2, large rows
    pytest benchmarks --benchmark-only --every-case         all shapes, and the compiled peers
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ops import peers
from imf_kernels import Dual
from imf_kernels.testing import cases, errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = ("dual", "dual and backward", "primal", "dual reference")
EAGER = ("torch.func.jvp", "torch.func.jvp and backward", "finite differences")
COMPILED = ("compiled", "compiled and backward")


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_kept() -> Iterator[None]:
    """What was freed stays with the process, ready for the next result. Blocks of more than 32 MB otherwise
    come from the system anew each time, and zeroing their pages takes several times as long as a row
    operation: everyone's time would be that of the page faults. The benchmarks of the whole step, where what
    is allocated is a part of the price, run in memory as it is by default."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    if has_mallopt := hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
    yield
    if has_mallopt:  # where glibc's own thresholds, which follow what is freed, end up
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)
        libc.malloc_trim(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every-case")
    selected = []
    for case in cases.select(large=True):
        rows = case.operation not in peers.PRODUCTS
        default = case.name in ("digits", "digits qkv") or case.name == (
            "beyond the cache" if rows else "B/2"
        )
        for name, dtype in DTYPES.items():
            if not (every or default) or dtype not in case.dtypes:
                continue
            # Compiling every case takes minutes; differences of bf16 numbers are noise.
            for form in (*OURS, *EAGER, *(COMPILED if every else ()), *(["copy"] if rows else [])):
                if form != "finite differences" or dtype != torch.bfloat16:
                    selected.append(pytest.param(case, dtype, form, id=f"{case} {name}, {form}"))
    metafunc.parametrize(("case", "dtype", "form"), selected)


def ours(problem: errors.Problem, form: str) -> Callable[[], Any]:
    case, backend = problem.case, "reference" if form == "dual reference" else None
    leaves = _leaves(problem) if form.endswith("backward") else problem.primals
    arguments = {
        name: Dual(x, problem.tangents[name]) if form != "primal" and name in problem.tangents else x
        for name, x in leaves.items()
    }

    def call() -> Any:
        return case.run(arguments, backend, **case.output_options)

    if not form.endswith("backward"):
        return call
    return lambda: _gradients(problem, leaves, tuple(y.primal for y in call()))


def _leaves(problem: errors.Problem) -> dict[str, Tensor]:
    """The primals, those that are differentiated as leaves of a graph."""
    names = problem.case.differentiable
    return {n: x.clone().requires_grad_() if n in names else x for n, x in problem.primals.items()}


def _gradients(problem: errors.Problem, leaves: dict[str, Tensor], outputs: peers.Outputs) -> peers.Outputs:
    wanted = [leaves[name] for name in problem.case.differentiable]
    return torch.autograd.grad(outputs, wanted, problem.cotangents)


def peer(problem: errors.Problem, form: str) -> Callable[[], tuple[peers.Outputs, peers.Outputs]]:
    """A case's outputs and their tangents by other means, and with the backward of the primal after it."""
    if not form.endswith("and backward"):
        return peers.derivative(problem, form)
    leaves = _leaves(problem)
    both = peers.derivative(problem, form.removesuffix(" and backward"), leaves)

    def and_backward() -> tuple[peers.Outputs, peers.Outputs]:
        outputs, tangents = both()
        _gradients(problem, leaves, outputs)
        return outputs, tangents

    return and_backward


def test_operation(benchmark: Any, case: cases.Case, dtype: torch.dtype, form: str) -> None:
    problem = errors.problem(case, dtype)
    name = next(n for n, d in DTYPES.items() if d == dtype)
    size, flops = case.count_bytes(dtype, form != "primal"), case.count_flops(form != "primal")
    if form.endswith("backward"):
        size, flops = size + case.count_backward_bytes(dtype), flops + case.backward_flops
    benchmark.group = f"{case} {name}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "operation": case.operation,
        "case": case.name,
        "dtype": name,
        "form": form,
        "bytes": size,
    }
    if case.operation in peers.PRODUCTS:
        rate = peers.gemm_rate(dtype)
        benchmark.extra_info |= {"flops": flops, "GEMM rate": rate, "bound": flops / rate}
    if form == "copy":
        call = peers.copy(size)
    elif form in OURS:
        call = ours(problem, form)
        # Yardsticks of eight draws would take minutes at these sizes; one draw is the stricter rule.
        backend, tangents = "reference" if form == "dual reference" else None, form != "primal"
        problem.check(problem.evaluate(backend, tangents=tangents), tangents=tangents, draws=1)
    else:
        call = peer(problem, form)
        worst = max(
            peers.relative_error(t, problem.exact[f"tangent {i}"])
            for i, t in enumerate(call()[1])
            if t is not None
        )
        benchmark.extra_info["relative error of the tangent"] = worst
        assert worst < (0.1 if dtype == torch.bfloat16 or form == "finite differences" else 1e-4)
    benchmark.pedantic(call, rounds=9, warmup_rounds=2, iterations=1)
