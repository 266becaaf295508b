"""`imf_kernels.jvp` on networks of other people, unmodified, with random weights: against float64.

Exact is the same network in float64 under PyTorch's own forward mode, and central differences. The errors in
float32 are held against those of `torch.func.jvp` in float32, with attention in its plain form.
"""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import imf_kernels as ik

for library in ("diffusers", "transformers"):
    pytest.importorskip(library, reason=f"networks of other people: pip install {library}")

from benchmarks.baselines.networks import NETWORKS, made  # noqa: E402


def results(jvp, network, function, primals, tangents):
    y, y_dot = jvp(function, primals, tangents)
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    return y.detach(), y_dot.detach(), torch.cat([g.flatten() for g in grads if g is not None])


def plain(function, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


def relative(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


@pytest.fixture(params=NETWORKS)
def case(request):
    return made(request.param)


def test_tangents_and_gradients(case):
    network, of, primals, tangents = case
    double = copy.deepcopy(network).double()
    in_double = tuple(x.double() for x in primals), tuple(x.double() for x in tangents)
    exact = results(ik.jvp, double, of(double), *in_double)
    ours = results(ik.jvp, network, of(network), primals, tangents)
    try:
        wanted = results(plain, double, of(double), *in_double)
        theirs = results(plain, network, of(network), primals, tangents)
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)  # torch.func.jvp of GroupNorm beside attention
        assert all(relative(got, right) < 2e-6 for got, right in zip(ours, exact, strict=True))
        return
    for got, plains, right, same in zip(ours, theirs, exact, wanted, strict=True):
        assert relative(right, same) < 1e-12
        assert relative(got, right) < 2 * relative(plains, right) + 1e-7


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"flux"}))
def test_tangents_are_central_differences(name):
    """Along z alone: networks embed times in float32, whose steps such differences would see; flux rotates
    queries and keys in it."""
    network, of, (z, t), (z_dot, _) = made(name)
    double, step = of(network.double()), 1e-6
    z, t, z_dot = z.double(), t.double(), z_dot.double()
    with torch.no_grad():
        wanted = (double(z + step * z_dot, t) - double(z - step * z_dot, t)) / (2 * step)
        assert relative(ik.jvp(double, (z, t), (z_dot, None))[1], wanted) < 1e-7


def test_no_attention_matrix(case, capsys):
    network, of, primals, tangents = case
    calls = {c.name: c for c in ik.explain(of(network), primals, tangents)}
    assert calls["torch.nn.functional.scaled_dot_product_attention"].path == "imf_kernels"
    assert calls["torch.nn.functional.linear"].path in ("imf_kernels", "no tangent")


def test_with_their_own_checkpointing():
    """diffusers' networks take the function that checkpoints their blocks."""
    network, of, primals, tangents = made("sd3")
    network.train()
    wanted = results(ik.jvp, network, of(network), primals, tangents)
    network.enable_gradient_checkpointing(ik.checkpoint)
    y, y_dot = ik.jvp(of(network), primals, tangents)
    y.square().mean().backward()
    grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    for got, want in zip((y.detach(), y_dot.detach(), grads), wanted, strict=True):
        assert relative(got, want) < 1e-6
