"""`python -m imf_kernels.verify` names each wrong output, tangent and gradient, in every dtype."""

import re

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual, verify
from imf_kernels.backends import cpu, triton_launch
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing.cases import SMALL
from tests.helpers.broken_operations import CASES, break_result, only, results_in, wrong

GELU_TANH = next(case for case in SMALL if str(case) == "gelu tanh")
OUTPUTS = {"qk_norm_rope": 3, "gated_residual_rms_norm": 2}
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
    for tried, dtypes in results_in(cache)[operation].items():
        for other, failure in dtypes.items():
            assert (failure is not None) == ((tried, other) == (backend, name))
            assert failure is None or f"{result}: " in failure


@pytest.mark.parametrize(
    ("operation", "name"),
    [(o, n) for o, c in CASES.items() for n in (*c.differentiable, *(f"tangent of {t}" for t in c.tangents))],
)
def test_a_wrong_gradient_through_tangents_is_named(
    operation, name, monkeypatch, capsys, cache, without_triton
):
    case, backend = CASES[operation], OPERATIONS[operation].backends[0].name
    only(monkeypatch, case)
    break_result(monkeypatch, case, f"gradient of {name}", torch.float32, backend, through_tangents=True)
    assert verify.main(["--device", "cpu", "--operation", operation], 0) == 1
    (failure,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: "))
    assert failure.startswith(f"FAILED: {backend}, float32: {case}, gradient of {name}: ")
    assert failure.endswith(" (through tangents)")
    assert f"gradient of {name}: " in results_in(cache)[operation][backend]["float32"]


def test_a_forward_without_tangents_is_checked_too(monkeypatch, capsys, without_triton):
    """It is another kernel."""
    silu = ik.silu
    only(monkeypatch, CASES["silu"])

    def broken(x, backend):
        y = silu(x, backend=backend)
        return wrong(y) if backend == "cpu" and not isinstance(y, Dual) else y

    monkeypatch.setattr(ik, "silu", broken)
    assert verify.main(["--device", "cpu"], 0) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    assert [line.endswith(" (without tangents)") for line in failures] == [True, True]


def test_all_operations_are_broken_above():
    assert set(CASES) == set(verify.OPERATIONS)


WRITTEN = [
    (kernel, function, i)
    for name, schema in ik._C.schemas.items()
    for kernel, function in re.findall(r"^(\w+?)_(forward|backward|pair_backward)$", name)
    for i, argument in enumerate(schema.partition("(")[2].split(", "))
    if "!" in argument and not argument.endswith(" partial")  # the kernel's own room
]


@pytest.mark.parametrize(("kernel", "function", "i"), WRITTEN)
def test_what_a_kernel_leaves_unwritten_is_seen(kernel, function, i, monkeypatch, capsys, without_triton):
    """One value of each tensor that a kernel writes: outputs, tangents, statistics, gradients."""
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
    found = {line.split(": ")[2].split()[0] for line in failures}
    # The kernels of layer_norm sum for weights without a tangent too.
    assert found == {o.public for o in served} or (kernel, function) == ("layer_norm", "pair_backward")
    assert all(" values are not finite" in line for line in failures), failures


@pytest.mark.skipif(triton_launch.missing() is not None, reason=str(triton_launch.missing()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is interpreted")
def test_triton_kernels_are_checked_where_they_run(monkeypatch, capsys, cache):
    case = CASES["silu"]
    only(monkeypatch, case)
    break_result(monkeypatch, case, "tangent 0", torch.float16, "triton")
    assert verify.main(["--device", "cpu"], 0) == 1
    assert f"FAILED: triton, float16: {case}, tangent 0: " in capsys.readouterr().out
    results = results_in(cache)["silu"]
    assert set(results["triton"]) == {"float32", "float16"}, "bfloat16 is refused in the interpreter"
    assert results["triton"]["float32"] is None and set(results["reference"]) == {"float16"}


def test_an_error_of_a_kernel_is_a_fault(monkeypatch, capsys, without_triton):
    def fail(*arguments):
        raise RuntimeError("no kernel image is available\nfor this device")

    only(monkeypatch, CASES["silu"])
    monkeypatch.setattr(OPERATIONS["silu"].backends[0].kernels, "backward", fail)
    assert verify.main(["--device", "cpu"], 0) == 1
    wanted = "FAILED: cpu, bfloat16: silu matrix: RuntimeError: no kernel image is available\n"
    assert wanted in capsys.readouterr().out


def test_memory_that_is_short_says_nothing_of_a_kernel(monkeypatch, without_triton):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verify.errors, "problem", fail)
    assert verify.Check(0, torch.float32, "cpu", "cpu").run() is None
