"""Each operation at the shapes of training runs: ours with the tangent in one pass, the primal alone, and
`torch.func.jvp` of the plain PyTorch formula. A group of the table is one operation, case and dtype; the
result is held to the error rule before it is timed.

    pytest benchmarks --benchmark-only                      the digits' shapes and iMF-B/2's attention
    pytest benchmarks --benchmark-only --every-case         all of them
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imf_kernels import Dual
from imf_kernels.testing import cases, errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every-case")
    selected = []
    for case in cases.select(large=True):
        default = case.name.startswith("digits") or case.operation == "scaled_dot_product_attention"
        if every or (default and not case.name.startswith("head dim")):
            for name, dtype in DTYPES.items():
                if dtype in case.dtypes:
                    selected.append(pytest.param(case, dtype, id=f"{case} {name}"))
    metafunc.parametrize(("case", "dtype"), selected)


def measure(benchmark: Any, case: cases.Case, dtype: torch.dtype, call: Any) -> None:
    name = next(n for n, d in DTYPES.items() if d == dtype)
    benchmark.group = f"{case} {name}"
    benchmark.extra_info["flops"] = case.count_flops(dual=True)
    benchmark.extra_info["bytes"] = case.count_bytes(dtype, dual=True)
    benchmark.pedantic(call, rounds=7, warmup_rounds=1, iterations=1)


def mixed(case: cases.Case) -> dict[str, Any]:
    return {"dtype": case.output_dtype} if case.output_dtype else {}


def test_dual(benchmark, case, dtype):
    problem = errors.Problem.draw(case, dtype, 0)
    exact = problem.evaluate(None)
    for name, value in exact.items():
        # Yardsticks of eight draws would take minutes at these sizes; one draw is the stricter rule.
        fp32 = problem.evaluate("reference", dtype=torch.float32)[name]
        argument = case.inputs.get(name.removeprefix("gradient of "))
        rounded = dtype if argument and argument.rounded else None
        yardstick = errors.Yardstick.of(fp32, problem.exact[name])
        errors.check(f"{case}, {name}", value, problem.exact[name], yardstick, rounded)
    arguments = {
        name: Dual(x, problem.tangents[name]) if name in problem.tangents else x
        for name, x in problem.primals.items()
    }
    measure(benchmark, case, dtype, lambda: case.run(arguments, None, **mixed(case)))


def test_primal(benchmark, case, dtype):
    primals, _ = case.draw(torch.Generator().manual_seed(0), dtype)
    measure(benchmark, case, dtype, lambda: case.run(primals, None, **mixed(case)))


def test_torch_func_jvp(benchmark, case, dtype):
    primals, tangents = case.draw(torch.Generator().manual_seed(0), dtype)

    def formula(*moving):
        arguments = {**primals, **dict(zip(tangents, moving, strict=True))}
        return case.run(arguments, "reference", **mixed(case))

    moving = tuple(primals[name] for name in tangents)
    measure(benchmark, case, dtype, lambda: torch.func.jvp(formula, moving, tuple(tangents.values())))
