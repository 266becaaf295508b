"""LayerNorm and adaLN: what no test of every operation asks of them."""

import math

import pytest
import torch
import torch.nn.functional as F

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, SMALL


def test_half_a_block_of_a_dit(backend):
    """Shift, scale and gate, slices of one product, with tangents: as torch.func.jvp and autograd have it."""
    torch.manual_seed(0)
    x, c, weights, up, down = (
        torch.randn(shape) / shape[-1] ** 0.5 for shape in ((3, 5, 16), (3, 16), (48, 16), (64, 16), (16, 64))
    )
    x_dot, c_dot = torch.randn_like(x), torch.randn_like(c)

    def plain(x, c, weights):
        shift, scale, gate = F.linear(F.silu(c), weights)[:, None].chunk(3, dim=-1)
        h = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, up.double())
        return x + F.linear(F.gelu(h, approximate="tanh"), down.double()) * gate

    def ours(x, c, weights):
        on = {"backend": backend}
        shift, scale, gate = ik.linear_map(lambda r: r.chunk(3, dim=-1), ik.linear(ik.silu(c, **on), weights))
        h = ik.linear(ik.layer_norm_modulate(x, shift, scale, **on), up)
        return ik.gated_residual(x, ik.linear(ik.gelu(h, approximate="tanh", **on), down), gate, **on)

    leaf, leaf64 = weights.clone().requires_grad_(), weights.double().requires_grad_()
    y = ours(Dual(x, x_dot), Dual(c, c_dot), leaf)
    wanted, wanted_dot = torch.func.jvp(
        lambda x, c: plain(x, c, leaf64), (x.double(), c.double()), (x_dot.double(), c_dot.double())
    )
    (got_grad,) = torch.autograd.grad(y.primal.square().sum(), leaf)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), leaf64)
    pairs = (y.primal, wanted), (y.tangent_rows, wanted_dot), (got_grad, wanted_grad)
    for got, exact in pairs:
        torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def test_layer_norm_without_weight_or_bias_has_ones_and_zeros(backend):
    x, x_dot, dy = (torch.randn(3, 5, 24) for _ in range(3))
    ones, zeros = torch.ones(24), torch.zeros(24)

    def call(*affine):
        leaf = x.clone().requires_grad_()
        y = ik.layer_norm(Dual(leaf, x_dot), (24,), *affine, backend=backend)
        return y.primal, y.tangent.detach(), torch.autograd.grad(y.primal, leaf, dy)[0]

    wanted = call(ones, zeros)
    for affine in ((), (None, zeros), (ones,)):
        assert all(torch.equal(a, b) for a, b in zip(call(*affine), wanted, strict=True))


def test_layer_norm_of_rows_that_are_almost_constant(kernels):
    """Of equal values exactly zero; right where one differs in its last bit, though the mean, and by its
    square the variance, can be off by more than that."""
    x = torch.cat([torch.logspace(-3, 12, 20), -torch.logspace(3, 8, 6)])[:, None].repeat(1, 4096)
    y = ik.layer_norm(Dual(x, x), (4096,), eps=1e-6, backend=kernels)
    assert not y.primal.any() and not y.tangent.any()
    x[:, 7] = x[:, 7].nextafter(torch.tensor(math.inf))
    got, wanted = (
        ik.layer_norm(t, (4096,), eps=1e-6, backend=b) for t, b in ((x, kernels), (x.double(), None))
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_norm_modulate width 33", "gated_residual a gate a sample"])
def test_forward_mode_through_a_sample_row_alone_is_right(name):
    """A transform that only the scale or the gate is inside of is seen too: by default `reference` runs."""
    p = errors.problem(next(c for c in SMALL if str(c) == name), FP32)
    last = list(p.tangents)[-1]

    def call(row):
        return p.case.run(p.primals | {last: row}, None)[0]

    _, got = torch.func.jvp(call, (p.primals[last],), (p.tangents[last],))
    dual = p.case.run(p.primals | {last: Dual(p.primals[last], p.tangents[last])}, "reference")[0]
    torch.testing.assert_close(got, dual.tangent)
