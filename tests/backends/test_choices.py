"""What a call decides is remembered by what it depends on, and by no more; the way to a kernel is short."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.backends import cpu
from imf_kernels.backends.operators import MOST_CHOICES, OPERATIONS
from tests.helpers.backends import threads

RMS_NORM = OPERATIONS["rms_norm"]
ROOT = Path(ik.__file__).parent


@pytest.fixture(autouse=True)
def nothing_remembered():
    RMS_NORM.choices.clear()


def new_choices(call):
    """How many choices a call adds."""
    before = len(RMS_NORM.choices)
    call()
    return len(RMS_NORM.choices) - before


def dual(*shape, dtype=torch.float32, **options):
    return Dual(torch.randn(*shape, dtype=dtype, **options), torch.randn(*shape, dtype=dtype))


WEIGHT = torch.ones(16)


def test_a_second_call_of_a_kind_decides_nothing(monkeypatch):
    x = dual(2, 16)
    assert new_choices(lambda: ik.rms_norm(x, WEIGHT)) == 1
    monkeypatch.setattr(RMS_NORM, "_check", None)  # what decides
    assert new_choices(lambda: ik.rms_norm(dual(2, 16), WEIGHT.clone())) == 0
    assert new_choices(lambda: ik.rms_norm(dual(2, 16, requires_grad=True), torch.nn.Parameter(WEIGHT))) == 0


OTHERS = {
    "another length": lambda: ik.rms_norm(dual(3, 16), WEIGHT),
    "another dtype": lambda: ik.rms_norm(dual(2, 16, dtype=torch.bfloat16), WEIGHT),
    "no tangent": lambda: ik.rms_norm(torch.randn(2, 16), WEIGHT),
    "tangents of fewer rows": lambda: ik.rms_norm(Dual(torch.randn(2, 16), torch.randn(1, 16)), WEIGHT),
    "other strides": lambda: ik.rms_norm(Dual(torch.randn(2, 32)[:, :16], torch.randn(2, 16)), WEIGHT),
    "another place in memory": lambda: ik.rms_norm(dual(33)[1:].reshape(2, 16), WEIGHT),
    "another eps": lambda: ik.rms_norm(dual(2, 16), WEIGHT, 1e-5),
    "another result": lambda: ik.rms_norm(dual(2, 16), WEIGHT, dtype=torch.bfloat16),
    "a named backend": lambda: ik.rms_norm(dual(2, 16), WEIGHT, backend="cpu"),
    "another weight": lambda: ik.rms_norm(dual(2, 16), WEIGHT.double()),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_another_kind_is_decided_anew(call):
    ik.rms_norm(dual(2, 16), WEIGHT)
    assert new_choices(call) == 1


def test_every_setting_is_seen():
    """Each changes the result's kind or the way to it; none takes the choice of another."""
    x, w = dual(2, 16, requires_grad=True), WEIGHT.clone().requires_grad_()
    exact = ik.rms_norm(x, w)
    assert exact.primal.requires_grad
    with torch.no_grad():
        assert not ik.rms_norm(x, w).primal.requires_grad
    with torch.inference_mode():
        assert ik.rms_norm(x, w).primal.is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert ik.rms_norm(x, w).dtype == torch.float32
        with ik.use_backend("reference"):
            assert ik.rms_norm(x, w).dtype == torch.float32
    with ik.use_backend("reference"):
        assert "rms_norm" not in ik.rms_norm(x, w).primal.grad_fn.name()
    assert "rms_norm" in ik.rms_norm(x, w).primal.grad_fn.name()
    half = dual(2, 16, dtype=torch.bfloat16)
    ik.rms_norm(half, w)
    with ik.use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        ik.rms_norm(half, w)
    large = dual(64, 4096)
    alone, weight = ik.rms_norm(large, torch.ones(4096)), torch.ones(4096)
    with threads(2):
        assert torch.equal(ik.rms_norm(large, weight).primal, alone.primal)
    sets = cpu.instruction_sets()
    with cpu.use_instruction_set(sets[0]):
        torch.testing.assert_close(ik.rms_norm(x, w).primal, exact.primal)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ik.rms_norm(x, w).primal, exact.primal)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_a_mode_or_transform_sees_is_not_remembered():
    ik.rms_norm(torch.randn(2, 16), WEIGHT)
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        assert new_choices(lambda: ik.rms_norm(torch.randn(2, 16), WEIGHT)) == 0
    assert any(name.startswith("imf_kernels::") for name in seen)

    def f(x):
        return ik.rms_norm(x, WEIGHT)

    x = torch.randn(3, 2, 16)
    assert new_choices(lambda: torch.vmap(f)(x)) == 0
    torch.testing.assert_close(torch.vmap(f)(x), f(x))
    assert new_choices(lambda: torch.func.grad(lambda x: f(x).sum())(x)) == 0


class Subclass(torch.Tensor):
    pass


def test_tensors_of_other_types_are_checked_at_every_call():
    ik.rms_norm(torch.randn(2, 16), WEIGHT)
    assert new_choices(lambda: ik.rms_norm(torch.randn(2, 16).as_subclass(Subclass), WEIGHT)) == 0
    with pytest.raises(RuntimeError, match="a lazily negated tensor"):
        ik.rms_norm(torch._neg_view(torch.randn(2, 16)), WEIGHT, backend="cpu")
    with pytest.raises(ValueError, match="weight must be"):
        ik.rms_norm(torch.randn(2, 16), torch.ones(8))
    with pytest.raises(TypeError, match="x must be a tensor or a Dual, got list"):
        ik.rms_norm([1.0], WEIGHT)
    assert new_choices(lambda: None) == 0 and len(RMS_NORM.choices) == 1


def test_ten_thousand_lengths_do_not_fill_memory():
    x = torch.randn(10_000, 4)
    for length in range(1, 10_001):
        ik.silu(x[:length])
    assert 0 < len(OPERATIONS["silu"].choices) <= MOST_CHOICES


def python_calls(function, *arguments):
    """How many functions of the package a second call enters."""
    function(*arguments)
    calls = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            calls.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code)

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return calls


def test_the_way_to_a_kernel_is_short():
    calls = python_calls(ik.rms_norm, dual(2, 16, requires_grad=True), torch.nn.Parameter(WEIGHT))
    assert len(calls) <= 20, calls


def test_the_forward_decides_for_its_backward():
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    with ik.use_backend("reference"):
        y = ik.rms_norm(x, WEIGHT)
    with ik.use_backend("triton"):  # which could not run
        y.sum().backward()
    (reference,), x.grad = (x.grad.clone(),), None
    with ik.use_backend("cpu"):
        y = ik.rms_norm(x, WEIGHT)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, reference)


def test_threads_choose_for_themselves():
    found = []
    with ik.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: found.append(ik.rms_norm(torch.randn(2, 16, requires_grad=True), WEIGHT))
        )
        thread.start()
        thread.join()
    assert "rms_norm" in found[0].grad_fn.name()


def test_a_checkpoint_recomputes_on_the_backend_of_its_forward():
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    with ik.use_backend("reference"):
        y = ik.checkpoint(lambda x: ik.rms_norm(x, WEIGHT), x, use_reentrant=False)
    with ik.use_backend("triton"):  # which could not run
        y.sum().backward()
    assert x.grad is not None


def test_use_backend_in_a_graph():
    def f(x, w):
        with ik.use_backend("reference"):
            a = ik.rms_norm(x, w)
        return a, ik.rms_norm(x, w)

    x = torch.randn(2, 16)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for a, b in zip(compiled(x, WEIGHT), f(x, WEIGHT), strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_is_compiled_again_for_another_backend():
    """In a thread that has entered no block before, too."""
    names = []

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.append(any("imf_kernels" in target for target in targets))
        return graph.forward

    def run():
        torch._dynamo.reset()
        norm = torch.compile(lambda x: ik.rms_norm(x, WEIGHT), fullgraph=True, backend=backend)
        x = torch.randn(2, 16)
        for name in (None, "reference", "cpu", None, "reference"):
            if name is None:
                norm(x)
            else:
                with ik.use_backend(name):
                    norm(x)
        torch._dynamo.reset()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    assert names == [True, False, True]  # then those are found again


def test_use_backend_names_what_there_is():
    with pytest.raises(ValueError, match=r"use_backend: name must be one of 'reference', .* got 'gpu'"):
        ik.use_backend("gpu").__enter__()
    with ik.use_backend("reference"), ik.use_backend(None):
        y = ik.rms_norm(torch.randn(2, 16, requires_grad=True), WEIGHT)
    assert "rms_norm" in y.grad_fn.name()
    x = torch.randn(2, 16, requires_grad=True)
    with ik.use_backend("reference"):
        assert "rms_norm" in ik.rms_norm(x, WEIGHT, backend="cpu").grad_fn.name()


def test_inside_jvp():
    x, x_dot = torch.randn(2, 16), torch.randn(2, 16)
    wanted = torch.func.jvp(F.silu, (x,), (x_dot,))
    for name in ("reference", "cpu", None):
        with ik.use_backend(name):
            got = ik.jvp(F.silu, (x,), (x_dot,))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_scripts_made_by_tracing_hold_the_kernels():
    """Without a graph for gradients, too: what is not recorded would be memory that nobody fills."""
    x = torch.randn(2, 16)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            ik.rms_norm(x, WEIGHT)  # a choice that the trace must not take
            traced = torch.jit.trace(lambda x: ik.silu(ik.rms_norm(x, WEIGHT)), x, check_trace=False)
            other = torch.randn(2, 16)
            assert torch.equal(traced(other), ik.silu(ik.rms_norm(other, WEIGHT)))


def test_profiles_name_the_operations_without_a_graph():
    x = torch.randn(2, 16)
    with torch.no_grad():
        ik.rms_norm(x, WEIGHT)
        with torch.profiler.profile() as profile:
            ik.rms_norm(x, WEIGHT)
    assert any("_rms_norm" in entry.key for entry in profile.key_averages())


def test_a_mask_that_comes_to_require_grad():
    q, mask = torch.randn(1, 1, 3, 8), torch.zeros(3, 3)
    ik.scaled_dot_product_attention(q, q, q, mask)
    with pytest.raises(ValueError, match="attn_mask requires grad"):
        ik.scaled_dot_product_attention(q, q, q, mask.requires_grad_())


@pytest.mark.parametrize("name", ["", 0, False, "\ud800"])
def test_a_name_that_is_false_is_a_name(name):
    with pytest.raises(ValueError, match="rms_norm: backend must be one of"):
        ik.rms_norm(torch.randn(2, 16), WEIGHT, backend=name)


def test_the_tangent_of_another_dtype():
    x = dual(64, 16)
    ik.silu(x)
    x.tangent_rows.data = x.tangent_rows.data.bfloat16()
    with pytest.raises(ValueError, match="silu_forward: x_dot must have the dtype of x"):
        ik.silu(x)


def test_the_guard_inside_a_transform():
    x_dot = torch.ones(3)
    with pytest.raises(RuntimeError, match="no gradient flows through tangents"):
        torch.func.grad(lambda x: Dual(x, x_dot).tangent.sum())(torch.randn(3))


def test_frequencies_are_not_kept():
    """Those of a first call inside a transform would spoil the calls after it."""

    def f(t):
        return ik.sinusoidal_embedding(t, 6, 77.0).sum()

    t = torch.randn(2)
    torch.func.hessian(f)(t)
    assert torch.equal(torch.func.grad(f)(t), torch.func.grad(f)(t))


def test_nested_tensors_and_numbers_too_large():
    nested = torch.nested.nested_tensor([torch.randn(2, 16)])
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: .* a nested tensor"):
        ik.silu(nested, backend="cpu")
    with pytest.raises(ValueError, match="eps must be finite"):
        ik.rms_norm(torch.randn(2, 16), WEIGHT, 10**400)


def test_first_calls_of_several_threads():
    """One of them finds what the module needs of PyTorch, and lets go of the interpreter meanwhile."""
    code = """
import builtins, threading, time
import torch, imf_kernels as ik
real = builtins.__import__
def slow(*arguments, **options):
    time.sleep(0.01)
    return real(*arguments, **options)
builtins.__import__ = slow
threads = [threading.Thread(target=lambda: ik.silu(torch.ones(3))) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
