"""`imf_kernels.jvp` inside torch.compile(fullgraph=True)."""

import pytest
import torch
from test_jvp import FUNCTIONS, X_DOT, Block, X, masks

import imf_kernels as ik


def step(func, x, x_dot):
    y, y_dot = ik.jvp(func, (x,), (x_dot,))
    return (y - y_dot.detach()).square().mean(), y_dot


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step(backend):
    block = Block()
    wanted, wanted_dot = step(block, X, X_DOT)
    grads = torch.autograd.grad(wanted, list(block.parameters()))
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    loss, y_dot = compiled(block, X, X_DOT)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(y_dot.detach(), wanted_dot.detach(), rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, list(block.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
# How many elements a mask picks depends on data, which one graph cannot follow.
@pytest.mark.parametrize("function", sorted({*FUNCTIONS} - {masks}, key=str), ids=lambda f: f.__name__)
def test_calls_keep_their_meaning(function):
    wanted, wanted_dot = ik.jvp(function, (X,), (X_DOT,))
    y, y_dot = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend="aot_eager", fullgraph=True
    )(X, X_DOT)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y_dot, wanted_dot, rtol=1e-4, atol=1e-5)
