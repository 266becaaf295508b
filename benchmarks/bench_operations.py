"""Each operation at the shapes of training runs.

A group of the table is one operation, case and dtype, and reads as ratios: ours with the tangent in one pass,
the primal alone, the `reference` backend, and in plain PyTorch `torch.func.jvp` eager and compiled and
central finite differences. Results are checked before they are timed; the bound from bytes and FLOPs is in
the record (`--benchmark-json`), where report.py finds it.

    pytest benchmarks --benchmark-only                      the digits' shapes and iMF-B/2's attention
    pytest benchmarks --benchmark-only --every-case         all shapes, and the compiled peer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

from imf_kernels import Dual
from imf_kernels.testing import cases, errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = ("dual", "primal", "dual reference", "torch.func.jvp", "compiled", "finite differences")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every-case")
    selected = []
    for case in cases.select(large=True):
        attention = case.operation == "scaled_dot_product_attention"
        default = case.name.startswith("digits") or (attention and case.name == "B/2")
        for name, dtype in DTYPES.items():
            if not (every or default) or dtype not in case.dtypes:
                continue
            for form in FORMS:
                # Differences of bf16 numbers are noise; compiling every case takes minutes.
                left_out = form == "finite differences" and dtype == torch.bfloat16
                if not left_out and (every or form != "compiled"):
                    selected.append(pytest.param(case, dtype, form, id=f"{case} {name}, {form}"))
    metafunc.parametrize(("case", "dtype", "form"), selected)


def ours(problem: errors.Problem, backend: str | None, dual: bool) -> Callable[[], Any]:
    case = problem.case
    arguments = {
        name: Dual(x, problem.tangents[name]) if dual and name in problem.tangents else x
        for name, x in problem.primals.items()
    }
    return lambda: case.run(arguments, backend, **case.output_options)


Outputs = tuple[Tensor, ...]


def peer(problem: errors.Problem, form: str) -> Callable[[], tuple[Outputs, Outputs]]:
    """A case's outputs and their tangents by other means: both, as ours gives both."""
    case, names = problem.case, list(problem.tangents)
    x, x_dot = tuple(problem.primals[n] for n in names), tuple(problem.tangents.values())
    plain, rest = peers.formula(case), problem.primals

    def formula(*moving: Tensor) -> Outputs:
        return plain({**rest, **dict(zip(names, moving, strict=True))})

    def forward_mode(*both: Tensor) -> tuple[Outputs, Outputs]:
        return torch.func.jvp(formula, both[: len(x)], both[len(x) :])

    if form == "finite differences":
        step = 1e-2

        def differences() -> tuple[Outputs, Outputs]:
            above = formula(*(a + step * b for a, b in zip(x, x_dot, strict=True)))
            below = formula(*(a - step * b for a, b in zip(x, x_dot, strict=True)))
            slopes = tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))
            return formula(*x), slopes

        return differences
    if form == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(forward_mode, dynamic=False, fullgraph=True)  # or it falls back in silence
        return lambda: compiled(*x, *x_dot)
    return lambda: forward_mode(*x, *x_dot)


def test_operation(benchmark: Any, case: cases.Case, dtype: torch.dtype, form: str) -> None:
    problem = errors.problem(case, dtype)
    dual = form != "primal"
    name = next(n for n, d in DTYPES.items() if d == dtype)
    machine = peers.machine()
    benchmark.group = f"{case} {name}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "operation": case.operation,
        "case": case.name,
        "dtype": name,
        "form": form,
        "flops": case.count_flops(dual),
        "bytes": case.count_bytes(dtype, dual),
        "bound": machine.bound(case, dtype, dual),
        "copy bandwidth": machine.bandwidth,
        "GEMM rate": machine.flops[dtype],
    }
    if form in ("dual", "primal", "dual reference"):
        backend = "reference" if form == "dual reference" else None
        call = ours(problem, backend, dual)
        # Yardsticks of eight draws would take minutes at these sizes; one draw is the stricter rule.
        problem.check(problem.evaluate(backend, tangents=dual), tangents=dual, draws=1)
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
