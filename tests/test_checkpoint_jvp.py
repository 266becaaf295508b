"""`imf_kernels.checkpoint`: the same gradients, the tangents computed once, the primal recomputed alone."""

import pytest
import torch
import torch.nn.functional as F
from test_jvp import X_DOT, Block, X
from torch import nn

import imf_kernels as ik
from imf_kernels import Dual


class Checkpointed(nn.Module):
    def __init__(self, blocks, checkpoint=ik.checkpoint):
        super().__init__()
        self.blocks, self.checkpoint = nn.ModuleList(blocks), checkpoint

    def forward(self, x):
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return x


def plain(block, x):
    return block(x)


def loss(y, y_dot):
    return (y - y_dot.detach()).square().mean()


def grads(model, x, **options):
    loss(*ik.jvp(model, (x,), (X_DOT,), **options)).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [*found, x.grad]


@pytest.mark.parametrize("of_input", [False, True])
def test_gradients_are_those_without(of_input):
    torch.manual_seed(0)
    model = Checkpointed([Block(), Block()])
    x, again = X.clone().requires_grad_(of_input), X.clone().requires_grad_(of_input)
    got = grads(model, x)
    model.checkpoint = plain
    for a, b in zip(got, grads(model, again), strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # PyTorch's own calls recompute what ours computed
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_backward_recomputes_the_primal_alone():
    runs = []

    def block(x):
        runs.append(torch.autograd.forward_ad.unpack_dual(x).tangent is not None)
        return F.linear(x, weight).tanh()

    weight = torch.randn(16, 16, requires_grad=True)
    y, y_dot = ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    loss(y, y_dot).backward()
    assert runs == [True, False]


def test_nothing_inside_is_saved():
    saved = []
    weight = torch.randn(16, 16, requires_grad=True)

    def block(x):
        for _ in range(5):
            x = F.linear(x, weight).tanh()
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    assert saved == [X.shape]


def test_random_numbers_are_repeated():
    weight = torch.randn(16, requires_grad=True)

    def block(x):
        return F.dropout(x * weight, 0.5, training=True)

    torch.manual_seed(3)
    y, _ = ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    y.sum().backward()
    got, weight.grad = weight.grad, None
    torch.manual_seed(3)
    before = torch.get_rng_state()
    y, _ = ik.jvp(block, (X,), (X_DOT,))
    y.sum().backward()
    assert torch.equal(got, weight.grad)
    assert not torch.equal(before, torch.get_rng_state())


def test_autocast_is_repeated():
    block = Block()
    dtypes = []

    def looked_at(x):
        dtypes.append(F.linear(x, x[0]).dtype)
        return block(x)

    with torch.autocast("cpu", torch.bfloat16):
        y, y_dot = ik.jvp(lambda x: ik.checkpoint(looked_at, x), (X,), (X_DOT,))
    loss(y, y_dot).backward()
    assert dtypes == [torch.bfloat16] * 2
    got = [p.grad for p in block.parameters()]
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, y_dot = ik.jvp(block, (X,), (X_DOT,))
    loss(y, y_dot).backward()
    for a, p in zip(got, block.parameters(), strict=True):
        assert (a - p.grad).norm() < 0.02 * p.grad.norm()


def test_structures_and_other_arguments():
    weight = torch.randn(16, 16, requires_grad=True)

    def block(pair, scale, *, names):
        x, y = pair["x"], pair["y"]
        return {"sum": F.linear(x + y, weight) * scale, "names": names}, y

    def func(checkpoint):
        return lambda x: checkpoint(block, {"x": x, "y": x * 2}, 3.0, names=("a",))[0]["sum"]

    def run(f, *a, **k):
        return f(*a, **k)

    results = []
    for checkpoint in (ik.checkpoint, run):
        y, y_dot = ik.jvp(func(checkpoint), (X,), (X_DOT,))
        (grad,) = torch.autograd.grad(loss(y, y_dot), weight) if checkpoint is run else (None,)
        if grad is None:
            loss(y, y_dot).backward()
            grad, weight.grad = weight.grad, None
        results.append((y.detach(), y_dot.detach(), grad))
    torch.testing.assert_close(*results)


def test_with_duals():
    weight = torch.randn(16, 16, requires_grad=True)

    def block(x):
        return ik.silu(ik.linear(x, weight))

    results = []
    for run in (lambda f, x: ik.checkpoint(f, x), lambda f, x: f(x)):
        x = X.clone().requires_grad_()
        y = run(block, Dual(x, X_DOT[2:]))
        assert y.tangent_rows.shape[0] == 2
        loss(y.primal, y.tangent).backward()
        results.append((y.primal.detach(), y.tangent_rows, x.grad, weight.grad))
        weight.grad = None
    torch.testing.assert_close(*results)


def test_without_tangents_it_is_pytorchs():
    block = Block()
    y = ik.checkpoint(block, X)
    grads = torch.autograd.grad(y.sum(), list(block.parameters()))
    for a, b in zip(grads, torch.autograd.grad(block(X).sum(), list(block.parameters())), strict=True):
        assert torch.equal(a, b)
