"""The triton backend: when it can run and why not, sums over many rows."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik
from imf_kernels import _C
from imf_kernels.backends import triton_launch
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import cases, errors
from tests.helpers.backends import ON_GPU, has_triton

pytestmark = pytest.mark.gpu

needs_triton = pytest.mark.skipif(triton_launch.missing() is not None, reason=str(triton_launch.missing()))
in_the_interpreter = pytest.mark.skipif(ON_GPU, reason="on a GPU nothing is interpreted")


def silu(x, backend="triton"):
    return ik.silu(x, backend=backend)


def test_triton_is_not_imported_before_it_is_needed():
    code = "import sys, torch, imf_kernels as ik; ik.silu(torch.ones(3)); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
def test_what_it_cannot_take_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: it takes float32, .* got float64"):
        silu(torch.ones(3, dtype=torch.float64, device="cuda" if ON_GPU else "cpu"))
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: it takes CUDA and ROCm tensors, .* meta"):
        silu(torch.ones(3, device="meta"))


@needs_triton
@in_the_interpreter
def test_bfloat16_is_refused_in_the_interpreter():
    reason = "'triton' cannot run: Triton's interpreter is wrong in bfloat16"
    with pytest.raises(RuntimeError, match=reason):
        silu(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=reason):
        ik.rms_norm(torch.ones(2, 3), torch.ones(3), dtype=torch.bfloat16, backend="triton")


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: it takes CUDA .* got one on cpu"):
        silu(torch.ones(3))


def test_a_failed_import_is_the_reason(monkeypatch):
    def fail(name):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert "cannot be imported: libcuda.so.1: cannot open" in triton_launch.missing.__wrapped__()


def test_float16_is_refused_by_the_cpu_and_taken_by_the_others():
    x, w = torch.ones(2, 4, dtype=torch.float16), torch.ones(4)
    with pytest.raises(RuntimeError, match="'cpu' cannot run: it takes float32 and bfloat16, got float16"):
        silu(x, "cpu")
    with pytest.raises(RuntimeError, match="'cpu' cannot run: it takes float32 and bfloat16, got float16"):
        ik.rms_norm(x.float(), w, dtype=torch.float16, backend="cpu")
    for backend in ("reference", None):
        assert silu(x, backend).dtype == torch.float16
        assert ik.rms_norm(x.float(), w, dtype=torch.float16, backend=backend).dtype == torch.float16


@needs_triton
def test_rows_too_long_for_a_program_are_refused():
    x, w = torch.ones(1, 16385), torch.ones(16385)
    with pytest.raises(RuntimeError, match=r"takes rows of at most 16384, got 16385|takes CUDA"):
        ik.rms_norm(x, w, backend="triton")
    assert ik.rms_norm(x, w).shape == x.shape


def test_gpus_without_the_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, reason in (
        ((7, 5), "it needs a GPU of compute capability 8.0 or newer, got Tesla T4 of 7.5"),
        ((8, 0), None),
        ((12, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert triton_launch._too_old.__wrapped__(0) == reason


SUMS = [
    cases.rms_norm("shares", 3, 67, width=24),
    cases.layer_norm("shares", 3, 67, width=24),
    cases.layer_norm_modulate("shares", 2, 200, width=24),
    cases.qk_norm_rope("shares", 2, 3, 21, 24),
    cases.gated_residual("shares", 3, 67, width=24),
    cases.gated_residual_rms_norm("shares", 3, 67, width=24),
    cases.gated_residual("shares, a gate a sample", 2, 200, width=24, gate_a_sample=True),
]


@needs_triton
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_over_shares_of_several_tiles(case, kernels, monkeypatch):
    """As on so many rows that a program takes one tile after another, the last one not whole."""
    from imf_kernels.backends.triton_kernels import rows

    monkeypatch.setattr(rows, "_SHARES", 2)
    check_twice(case, kernels)


class _NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} in a function that is replayed")


SMALLEST = list({c.operation: c for c in reversed(cases.SMALL) if has_triton(c.operation)}.values())


@needs_triton
@in_the_interpreter
@pytest.mark.parametrize("case", [*SUMS, *SMALLEST], ids=str)
def test_replayed_functions_only_launch(case, monkeypatch):
    """On a GPU whatever else they did would be left out from their second call on."""
    called = []

    def checked(function, name):
        def call(*arguments):
            called.append(name)
            with _NoOperators():
                function.__wrapped__(*arguments)

        return call

    kernels = next(b.kernels for b in OPERATIONS[case.operation].backends if b.name == "triton")
    module = importlib.import_module(f"imf_kernels.backends.triton_kernels.{kernels.module}")
    monkeypatch.setattr(triton_launch.Launcher, "__call__", lambda *arguments: None)
    for name, value in list(vars(module).items()):
        if isinstance(value, _C.Replayed):
            monkeypatch.setattr(module, name, checked(value, name))
            if hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, getattr(module, name))
    dtype = torch.float16 if case.operation == "scaled_dot_product_attention" else torch.float32
    p = errors.problem(case, dtype)
    p.evaluate("triton")
    p.evaluate("triton", tangents=False)
    assert called or case.operation in ("gelu", "silu", "group_norm")


def check_twice(case, kernels):
    """The backward of the primal, and that of the pair, which is deterministic."""
    p = errors.problem(case, torch.float32)
    p.check(p.evaluate(kernels))
    p = errors.problem(case, torch.float32, differentiable=True)
    first, second = p.evaluate(kernels), p.evaluate(kernels)
    p.check(first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@in_the_interpreter
def test_groups_of_more_chunks_than_are_read_at_a_time(kernels, monkeypatch):
    """As in groups of 2^20 values and more: moments merge in turns, and shares of positions add up."""
    from imf_kernels.backends.triton_kernels import group_norm

    sizes = {"_BLOCK": 64, "_TILE": 64, "_TILES": 2, "_MOST_PARTS": type(group_norm._MOST_PARTS)(2)}
    for name, size in sizes.items():
        monkeypatch.setattr(group_norm, name, size)
    x = {"channels_last": True, "offset": 4.0}
    check_twice(cases.group_norm("chunks", 1, 6, 7, 20, groups=2, silu=True, x=x), kernels)
