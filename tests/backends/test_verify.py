"""`python -m imf_kernels.verify` names what is wrong: every operation, result and dtype, crashes too."""

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
RECORD_OF = verified.record_of  # before tests turn it off
FP16 = torch.float16
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
    if (kernel := name.rpartition("_")[0])
    and (function := name.rpartition("_")[2]) in ("forward", "backward")
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
    assert {line.split(": ")[2].split()[0] for line in failures} == {o.public for o in served}
    assert all(" values are not finite" in line for line in failures), failures


@pytest.mark.skipif(triton_launch.missing() is not None, reason=str(triton_launch.missing()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is interpreted")
def test_triton_kernels_are_checked_where_they_run(monkeypatch, capsys, cache):
    case = CASES["silu"]
    only(monkeypatch, case)
    break_result(monkeypatch, case, "tangent 0", torch.float16, "triton")
    assert verify.main(["--device", "cpu"], 0) == 1
    assert f"FAILED: triton, float16: {case}, tangent 0: " in capsys.readouterr().out
    results = record(cache)["silu"]
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


class Timed:
    """A case whose forward takes 2 ms by `cuda` and 4 ms by `triton`."""

    def draw(self, generator, dtype):
        return {"x": torch.ones(2, dtype=dtype)}, {"x": torch.ones(2, dtype=dtype)}

    def run(self, arguments, backend):
        time.sleep({"cuda": 0.002, "triton": 0.004}[backend])


@pytest.mark.parametrize("faults", [[], ["attention, output 0: wrong"]], ids=["right", "wrong"])
def test_cuda_is_timed_against_triton_where_both_passed(faults, monkeypatch, capsys, cache):
    operation = "scaled_dot_product_attention"
    only(monkeypatch, CASES[operation])
    done = {
        verify.Check(0, torch.bfloat16, "cuda", "cpu"): [],
        verify.Check(0, FP16, "triton", "cpu"): faults,
    }
    monkeypatch.setattr(verify, "run", lambda device, operations, count: done)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setitem(verify.TIMED, operation, Timed())
    assert verify.main(["--device", "cpu"]) == bool(faults)
    assert (f"{operation}: cuda takes 0." in capsys.readouterr().out) == (not faults)
    (file,) = cache.iterdir()
    ratios = json.loads(file.read_text())["ratios"]
    assert 0.3 < ratios[operation] < 0.9 if not faults else ratios == {}


def test_a_run_of_one_operation_keeps_the_results_of_the_others(monkeypatch, cache, without_triton):
    monkeypatch.setattr(verified, "record_of", RECORD_OF.__wrapped__)
    only(monkeypatch, CASES["silu"], CASES["gelu"])
    for operation in ("silu", "gelu"):
        assert verify.main(["--device", "cpu", "--operation", operation], 0) == 0
    assert set(record(cache)) == {"silu", "gelu"}


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, capsys, without_triton):
    (tmp_path / "imf_kernels").touch()  # a file instead of the folder
    only(monkeypatch, CASES["silu"])
    assert verify.main(["--device", "cpu"], 0) == 0
    printed = capsys.readouterr()
    assert "silu                          cpu        passed    passed    -" in printed.out
    assert "The record could not be written, so this run changes nothing: [Errno " in printed.err
    break_result(monkeypatch, CASES["silu"], "output 0", torch.float32, "cpu")
    assert verify.main(["--device", "cpu"], 0) == 1


@pytest.mark.parametrize("words", ["--device cuda:x", "--device mps", "--operation relu"])
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit):
        verify.main(words.split())
    assert words.split()[0] in capsys.readouterr().err


class Ends:
    """A check that passes, fails, crashes or hangs."""

    def __init__(self, how):
        self.how = how

    def run(self):
        if self.how == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "hangs":
            time.sleep(600)
        return [f"CUDA error in {os.getpid()}"] if self.how == "breaks its process" else [str(os.getpid())]


def test_a_check_that_crashes_or_breaks_its_process_fails_alone():
    checks = [Ends(how) for how in ("passes", "crashes", "breaks its process", "passes", "passes")]
    found = {check: faults for check, faults in processes.run(checks, 1)}
    assert list(found) == checks
    first, crash, broken, *last = (faults[0] for faults in found.values())
    assert crash == f"the process ended with exit code {-signal.SIGSEGV}"
    assert len({first, broken.rpartition(" ")[2], *last}) == 3 and last[0] == last[1]


def test_a_check_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 1.0)
    ((_, faults),) = processes.run([Ends("hangs")], 1)
    assert faults == ["no result after 1 s"]


def test_as_a_command(cache):
    """In processes of its own: a line of progress, the table, the path of the record."""
    command = [sys.executable, "-m", "imf_kernels.verify", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*command, "--operation", "silu", "--operation", "prepend_tokens"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    (file,) = cache.iterdir()
    assert run.stdout.startswith("device ") and run.stdout.endswith(f"record: {file}\n")
    assert "\nprepend_tokens                reference  passed    passed    passed\n" in run.stdout


@pytest.mark.slow
def test_all_of_it_takes_less_than_two_minutes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "2"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "imf_kernels.verify", "--device", "cpu"], env=environment, check=True
    )
    assert time.monotonic() - began < 120
