"""Results that backward computes again: what is kept, and gradients equal to those of kept ones."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from imf_kernels.backends import recompute
from imf_kernels.testing import errors

B, L, D = 2, 160, 64
GENERATOR = torch.Generator().manual_seed(1)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, generator=GENERATOR) * shape[-1] ** -0.5)


UP, DOWN, NARROW, NORM = parameter(2 * D, D), parameter(D, 2 * D), parameter(D, D), parameter(D)
CONDITION = parameter(6 * D, D)


def condition(x, count=2):
    return F.linear(x.mean(1), CONDITION)[:, : count * D].chunk(count, dim=1)


def modulated(x):
    shift, scale = condition(x)
    return F.linear(ik.layer_norm_modulate(F.linear(x, NARROW), shift, scale), UP)


# The layer that takes the result, and the node that made it comes before it.
AGAIN = {
    "gelu": lambda x: F.linear(F.gelu(F.linear(x, UP)), DOWN),
    "gelu of tanh": lambda x: F.linear(F.gelu(F.linear(x, UP), approximate="tanh"), DOWN),
    "silu of a half": lambda x: F.linear(F.silu(F.linear(x, UP)[..., :D]), NARROW),
    "silu of silu": lambda x: F.linear(F.silu(F.silu(F.linear(x, UP))), DOWN),
    "a view": lambda x: F.linear(F.gelu(F.linear(x, UP)).view(-1, 2, 2 * D), DOWN),
    "no dropout": lambda x: F.linear(F.dropout(F.gelu(F.linear(x, UP)), 0.0), DOWN),
    "layer_norm": lambda x: F.linear(F.layer_norm(F.linear(x, NARROW), (D,)), UP),
    "layer_norm_modulate": modulated,
    "swiglu": lambda x: F.linear(ik.swiglu(F.linear(x, UP)), NARROW),
    "gated unit": lambda x: F.linear(F.silu(F.linear(x, UP)[..., :D]) * F.linear(x, NARROW), UP),
}
KEPT = {
    "norm with a weight": lambda x: F.linear(F.rms_norm(x, (D,), NORM), UP),
    "affine norm": lambda x: F.linear(F.layer_norm(x, (D,), NORM, NORM), UP),
    "written into": lambda x: F.linear(F.gelu(F.linear(x, UP)).mul_(2), DOWN),
    "written into without grad": lambda x: F.linear(_doubled(F.gelu(F.linear(x, UP))), DOWN),
    "a sum": lambda x: F.linear(F.gelu(F.linear(x, UP)) + 1, DOWN),
    "transposed": lambda x: F.linear(F.gelu(F.linear(x, UP)).view(2, -1, 2 * D).transpose(0, 1), DOWN),
    "small": lambda x: F.linear(F.gelu(F.linear(x[:, :8], UP)), DOWN),
}


@torch.no_grad()
def _doubled(x):
    return x.mul_(2)


@pytest.fixture(autouse=True)
def of_any_size():
    """The size as it is, in the place of the suite's."""


def parameters():
    return [p for p in (UP, DOWN, NARROW, NORM, CONDITION)]


def step(function, differentiable, keep_all=False):
    """Returns output, tangent, gradients and the memory that the last layer keeps."""
    x, x_dot = (torch.randn(B, L, D, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    x.requires_grad_()
    for p in parameters():
        p.grad = None
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    made = []

    def call(x):
        y = function(x)
        node = torch._unpack_dual(y, level=0)[0].grad_fn
        while not hasattr(node, "again" if differentiable else "products"):
            node = node.next_functions[0][0]
        made.append(node)
        return y

    with hooks if keep_all else contextlib.nullcontext():
        y, y_dot = ik.jvp(call, (x,), (x_dot,), differentiable=differentiable)
    again = made[0].again if differentiable else made[0].recompute_x
    loss = y.sin().sum() + (y_dot.sin().sum() if differentiable else 0.0)
    loss.backward()
    gradients = [p.grad for p in (*parameters(), x) if p.grad is not None]
    return [y.detach(), y_dot.detach(), *gradients], again


@pytest.mark.parametrize("name", [*AGAIN, *KEPT])
def test_gradients_are_the_same_bits(name):
    got, again = step((AGAIN | KEPT)[name], False)
    wanted, never = step((AGAIN | KEPT)[name], False, keep_all=True)
    assert (again is not None) == (name in AGAIN) and never is None
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not recompute._scratch.memory


@pytest.mark.parametrize("rows", [1, B])
def test_tangents_of_the_last_samples(rows):
    """Of a `Dual` whose tangent has fewer samples than its primal."""

    def gradients(hooks):
        x, x_dot = (torch.randn(n, L, D, generator=torch.Generator().manual_seed(n)) for n in (B, rows))
        x.requires_grad_(), x_dot.requires_grad_()
        with hooks:
            h = ik.gelu(ik.linear(ik.Dual(x, x_dot, differentiable=True), UP))
            y = ik.linear(h, DOWN)
        loss = y.primal.sin().sum() + y.tangent_rows.sin().sum()
        return torch.autograd.grad(loss, (x, x_dot, UP, DOWN))

    wanted = gradients(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
    assert all(map(torch.equal, gradients(contextlib.nullcontext()), wanted))


PAIRS = ["gelu", "a view", "layer_norm_modulate", "swiglu", "written into", "small"]


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_pairs(name):
    got, again = step((AGAIN | KEPT)[name], True)
    wanted, never = step((AGAIN | KEPT)[name], True, keep_all=True)
    assert (again is not None) == (name in AGAIN) and never is None
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_gradients_of_a_modulated_norm_and_its_tangent():
    """The layer takes a sum of a product of a norm: all are computed again, gradients of both in one pass."""
    inputs = [torch.randn(s, generator=GENERATOR) for s in ((B, L, D), (B, D), (B, D), (2 * D, D))]
    tangents = [torch.randn(x.shape, generator=GENERATOR) for x in inputs[:3]]
    made = []

    def plain_norm(x):  # PyTorch's tangent of layer_norm has a wrong gradient
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def call(x, shift, scale, weight, ours):
        norm = F.layer_norm(x, (D,)) if ours else plain_norm(x)
        y = shift[:, None] + norm * (1 + scale[:, None])
        if ours:
            made.append(torch._unpack_dual(y, level=0)[0])
            node = recompute._made_by(made[0])[0]
            made.append(recompute._saved_by(node, "recompute_pair"))
        return F.linear(y, weight)

    def results(jvp, dtype, **options):
        *leaves, weight = (x.detach().to(dtype).requires_grad_() for x in inputs)
        moving = tuple(t.to(dtype) for t in tangents)
        y, y_dot = jvp(lambda *xs: call(*xs, weight, bool(options)), tuple(leaves), moving, **options)
        (y.sin() + y_dot.sin()).sum().backward()
        return y.detach(), y_dot.detach(), *(x.grad for x in (*leaves, weight))

    got = results(ik.jvp, torch.float32, differentiable=True)
    assert made[1] is not None
    exact, plain = (results(torch.func.jvp, dtype) for dtype in (torch.float64, torch.float32))
    for i, (a, true, b) in enumerate(zip(got, exact, plain, strict=True)):
        errors.check(f"result {i}", a, true, errors.Yardstick.of(b, true))


def test_the_result_is_freed():
    """Memory that a graph holds: of a layer's input, where it is computed again, nothing."""
    seen = []

    def call(x):
        y = F.gelu(F.linear(x, UP))
        seen.append(torch._unpack_dual(y, level=0)[0].data_ptr())
        y = F.linear(y, DOWN)
        node = torch._unpack_dual(y, level=0)[0].grad_fn
        while not hasattr(node, "products"):
            node = node.next_functions[0][0]
        seen.extend(t.data_ptr() for t in node.saved_tensors if t is not None)
        return y

    ik.jvp(call, (torch.randn(B, L, D),), (torch.randn(B, L, D),))
    assert seen[0] not in seen[1:]


def test_what_is_written_after_it_was_taken_is_reported():
    def call(x):
        h = F.linear(x, UP)
        y = F.linear(F.gelu(h), DOWN)
        h.detach().zero_()
        return y

    y, _ = ik.jvp(call, (torch.randn(B, L, D),), (torch.randn(B, L, D),))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


FACTORS = {
    "norm and scale": lambda x, c: F.layer_norm(x, x.shape[-1:]) * (1 + c),
    "gate and branch": lambda x, c: c.tanh() * (x + 0.0),
    "branch and gate": lambda x, c: (x + 0.0) * c.tanh(),
    "transposed branch": lambda x, c: (x + 0.0).mT.contiguous().mT * c.tanh(),
    "one shape": lambda x, c: x.tanh() * (x + c),
    "itself": lambda x, c: (lambda y: y * y)(x + c),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(B, L, D), (B, 4, 40, D), (1, 300, D)], ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_products(name, shape, dtype):
    gates = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    inputs = [torch.randn(s, generator=GENERATOR).to(dtype) for s in (shape, gates)]
    tangents = [torch.randn(s, generator=GENERATOR).to(dtype) for s in (shape, gates)]
    cotangent = torch.randn(shape, generator=GENERATOR).to(dtype)

    def results(jvp, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y, y_dot = jvp(FACTORS[name], tuple(leaves), tuple(t.to(dtype) for t in tangents))
        y.backward(cotangent.to(dtype))
        return y.detach(), y_dot.detach(), *(x.grad for x in leaves)

    exact = results(torch.func.jvp, torch.float64)
    plain = results(torch.func.jvp, torch.float32)
    # In bfloat16 PyTorch rounds between the calls.
    yardsticks = plain if dtype == torch.float32 else results(torch.func.jvp, dtype)
    for what, got, true, other in zip(
        ("y", "tangent", "x", "c"), results(ik.jvp, dtype), exact, yardsticks, strict=True
    ):
        errors.check(f"{name}: {what}", got, true, errors.Yardstick.of(other.float(), true))


@pytest.mark.parametrize("name", ["gate and branch", "one shape"])
def test_second_derivatives_of_products(name):
    x, c = (torch.randn(s, generator=GENERATOR).requires_grad_() for s in ((B, L, D), (B, 1, D)))

    def second(jvp):
        y, _ = jvp(FACTORS[name], (x, c), (x.detach(), c.detach()))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), c)[0]

    torch.testing.assert_close(second(ik.jvp), second(torch.func.jvp))


def test_second_derivatives_of_a_recomputed_factor_are_refused():
    x, c = (torch.randn(s, generator=GENERATOR).requires_grad_() for s in ((B, L, D), (B, 1, D)))
    y, _ = ik.jvp(FACTORS["norm and scale"], (x, c), (x.detach(), c.detach()))
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives of a product"):
        torch.autograd.grad(y.square().sum(), c, create_graph=True)
