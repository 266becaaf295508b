"""What a program around the operations may have set: default dtype and device, autocast, inference mode, fake
tensors, lazily negated ones, a cotangent that never comes. Results do not change, or there is an error."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, OPERATIONS, SMALL
from tests.helpers.backends import threads

each_operation = pytest.mark.parametrize(
    "case", [next(c for c in SMALL if c.operation == name) for name in OPERATIONS], ids=str
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast(torch.get_default_device().type, torch.bfloat16),
}


@each_operation
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(case, name, backend):
    p = errors.problem(case, FP32)
    if backend == "reference" and name == "autocast":  # whose backward is PyTorch's own
        p = errors.Problem(p.case, p.dtype, p.seed, p.primals, p.tangents, None, p.exact)
    with SURROUNDINGS[name]():
        got = p.evaluate(backend)
    for key, value in p.evaluate(backend).items():
        assert got[key].dtype == value.dtype and got[key].device == value.device
        torch.testing.assert_close(got[key], value)


@each_operation
def test_what_inference_mode_made_does_not_hinder_training(case):
    p = errors.Problem.draw(case, FP32, 0)
    with torch.inference_mode():
        case.run(p.primals, None)
    p.evaluate("reference")
    p.evaluate("cpu")


@pytest.mark.parametrize("call", [ik.silu, lambda x, **b: ik.rms_norm(x, torch.ones(64), **b)])
def test_fake_tensors_never_reach_a_kernel(call):
    with FakeTensorMode(), pytest.raises(RuntimeError, match="tensors that lie in memory"):
        call(torch.randn(4, 64), backend="cpu")
    with FakeTensorMode():
        assert call(torch.randn(4, 64)).shape == (4, 64)


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    x = torch._neg_view(torch.ones(4))
    assert x.is_neg()
    torch.testing.assert_close(ik.silu(x), torch.nn.functional.silu(-torch.ones(4)))
    for bad in (x, Dual(torch.ones(4), x)):
        with pytest.raises(RuntimeError, match=r"lazily negated tensor; call \.resolve_neg\(\)"):
            ik.silu(bad, backend="cpu")
    leaf = torch.randn(4, requires_grad=True)
    y = ik.silu(leaf)
    (wanted,) = torch.autograd.grad(y, leaf, -torch.ones(4), retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, leaf, x)[0], wanted)


@each_operation
def test_a_cotangent_that_never_comes(case, backend):
    """A function behind the operation may return no gradient at all: then there is none here either."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return None

    p = errors.problem(case, FP32)
    leaves = {n: x.clone().requires_grad_(n in case.differentiable) for n, x in p.primals.items()}
    duals = {n: Dual(x, p.tangents[n]) if n in p.tangents else x for n, x in leaves.items()}
    sum(Stop.apply(y.primal).sum() for y in case.run(duals, backend)).backward()
    assert all(x.grad is None or not x.grad.any() for x in leaves.values())


def test_memory_that_cannot_be_had():
    """An error of Python on any number of threads, not the end of the process."""
    q, k = torch.zeros(1, 2, 1, 64), torch.zeros(1, 1, 1, 64).expand(1, 2, 2**36, 64)
    for count in (1, 2):
        with threads(count), pytest.raises(MemoryError):
            ik.scaled_dot_product_attention(q, k, k, backend="cpu")


def test_only_wanted_gradients_of_attention_are_computed():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(ik.scaled_dot_product_attention(*whole, backend="cpu").sum(), whole)
    for i, gradient in enumerate(wanted):
        some = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        (got,) = torch.autograd.grad(ik.scaled_dot_product_attention(*some, backend="cpu").sum(), some[i])
        assert torch.equal(got, gradient)
