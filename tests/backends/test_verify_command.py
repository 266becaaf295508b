"""`python -m imf_kernels.verify` as a command: processes, options, the record, the timing of `cuda`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from imf_kernels import verify
from imf_kernels.backends import triton_launch, verified
from imf_kernels.testing import processes
from tests.helpers.broken_operations import CASES, break_result, only, results_in

RECORD_OF = verified.record_of  # before tests turn it off
FP16 = torch.float16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    return tmp_path / "imf_kernels"


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


def test_a_run_of_one_operation_keeps_the_results_of_the_others(monkeypatch, cache):
    monkeypatch.setattr(verified, "record_of", RECORD_OF.__wrapped__)
    only(monkeypatch, CASES["silu"], CASES["gelu"])
    for operation in ("silu", "gelu"):
        assert verify.main(["--device", "cpu", "--operation", operation], 0) == 0
    assert set(results_in(cache)) == {"silu", "gelu"}


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, capsys):
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
