"""`python -m imf_kernels.verify` names what is wrong, in every operation, result and dtype, and survives crashes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual, verify
from imf_kernels.backends import cpu, triton_launch, verified
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import processes
from imf_kernels.testing.cases import SMALL

NAMES = "square, width 33, width 37, digits, other value width, a gate a sample, matrix, dim 256, one group"
CASES = {case.operation: case for case in SMALL if case.name in NAMES.split(", ")}
GELU_TANH = next(case for case in SMALL if str(case) == "gelu tanh")
OUTPUTS = {"qk_norm_rope": 2}
RESULTS = [
    pytest.param(operation, result, id=f"{operation}, {result}")
    for operation, case in CASES.items()
    for result in (
        *(f"{kind} {i}" for kind in ("output", "tangent") for i in range(OUTPUTS.get(operation, 1))),
        *(f"gradient of {name}" for name in case.differentiable),
    )
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "imf_kernels"


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)


def only(monkeypatch, *cases):
    monkeypatch.setattr(verify, "corners", lambda on_gpu: cases)


def record(cache):
    (file,) = cache.iterdir()
    return json.loads(file.read_text())["results"]


def wrong(x):
    """x with 10 % of its size added to the last row, differentiated as x is."""
    change = torch.zeros_like(x)
    change[-1] = 0.1 * x.detach().square().mean().sqrt()
    return x + change


def break_result(monkeypatch, case, result, dtype, backend):
    """Makes the operation give one wrong result, of one dtype on one backend."""
    call = getattr(ik, case.operation)
    kind, _, which = result.partition(" ")

    def hooked(name, x):
        if name != which.removeprefix("of "):
            return x
        primal = ik.primal(x)
        bent = primal.view_as(primal)
        if bent.requires_grad:
            bent.register_hook(wrong)
        return Dual(bent, x.tangent_rows) if isinstance(x, Dual) else bent

    def changed(y):
        if not isinstance(y, Dual):
            return wrong(y) if kind == "output" else y
        if kind == "output":
            return Dual(wrong(y.primal), y.tangent_rows)
        return Dual(y.primal, wrong(y.tangent_rows))

    def broken(*positional, **options):
        inputs = [x for x in (*positional, *options.values()) if isinstance(x, (torch.Tensor, Dual))]
        if options["backend"] != backend or inputs[0].dtype != dtype:
            return call(*positional, **options)
        if kind != "gradient":
            results = call(*positional, **options)
            if not isinstance(results, tuple):
                return changed(results)
            return tuple(changed(y) if str(i) == which else y for i, y in enumerate(results))
        options = {name: hooked(name, x) for name, x in options.items()}
        if case.operation == "prepend_tokens":
            x, groups = positional
            groups = [
                (hooked(f"tokens_{i}", tokens), hooked(f"embedding_{i}", embedding))
                for i, (tokens, embedding) in enumerate(groups)
            ]
            positional = hooked("x", x), groups
        return call(*positional, **options)

    monkeypatch.setattr(ik, case.operation, broken)


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "result"), RESULTS)
def test_a_wrong_result_is_named(operation, result, dtype, monkeypatch, capsys, cache, without_triton):
    case = CASES[operation]
    only(monkeypatch, case)
    kernels = dtype in cpu.DTYPES and OPERATIONS[operation].backends[0].name == "cpu"
    backend = "cpu" if kernels else "reference"
    break_result(monkeypatch, case, result, dtype, backend)
    assert verify.main(["--device", "cpu", "--operation", operation], 0) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    name = str(dtype).removeprefix("torch.")
    assert len(failures) == 1 and failures[0].startswith(f"FAILED: {backend}, {name}: {case}, {result}: ")
    for tried, dtypes in record(cache)[operation].items():
        for other, failure in dtypes.items():
            assert (failure is not None) == ((tried, other) == (backend, name))
            assert failure is None or f"{result}: " in failure


def test_all_operations_are_broken_above():
    assert set(CASES) == set(verify.OPERATIONS)


WRITTEN = [
    (kernel, function, i)
    for name, schema in ik._C.schemas.items()
    if (kernel := name.rpartition("_")[0]) and (function := name.rpartition("_")[2]) in ("forward", "backward")
    for i, argument in enumerate(schema.partition("(")[2].split(", "))
    if "!" in argument and not argument.endswith(" partial")  # the kernel's own room
]


@pytest.mark.parametrize(("kernel", "function", "i"), WRITTEN)
def test_what_a_kernel_leaves_unwritten_is_seen(kernel, function, i, monkeypatch, capsys, without_triton):
    """One value of each tensor that a kernel writes: outputs, tangents, statistics for backward, gradients."""
    served = [operation for operation in OPERATIONS.values() if operation.kernels == kernel]
    only(monkeypatch, *(GELU_TANH if o.name == "gelu_tanh" else CASES[o.public] for o in served))
    kernels = served[0].backends[0].kernels
    launch = getattr(kernels, function)

    def forgetful(*arguments):
        x = arguments[i]
        before = None if x is None else x.flatten()[-1].clone()
        launch(*arguments)
        if x is not None:
            x[(-1,) * x.dim()] = before

    monkeypatch.setattr(kernels, function, forgetful)
    assert verify.main(["--device", "cpu"], 0) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    assert {line.split(", ")[1].split(": ")[0] for line in failures} == {"float32", "bfloat16"}
    assert {line.split(": ")[2].split()[0] for line in failures} == {o.public for o in served}
    assert all(" values are not finite" in line for line in failures), failures
