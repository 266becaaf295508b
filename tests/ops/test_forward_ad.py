"""In PyTorch's own forward mode, and in transforms of torch.func: exact or an error, never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import imf_kernels as ik
from imf.model.config import IMFConfig
from imf.networks import build
from imf_kernels import Dual
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, OPERATIONS, SMALL
from tests.helpers.backends import dtypes_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
each_mode = pytest.mark.parametrize("mode", ["forward_ad", "jvp"])
each_operation = pytest.mark.parametrize(
    "case", [next(c for c in SMALL if c.operation == name and c.batch > 1) for name in OPERATIONS], ids=str
)


def forward_mode(mode, function, primals, tangents):
    """Primals and tangents of the results of `function(*primals)`, by PyTorch's own forward mode."""
    if mode == "jvp":
        return torch.func.jvp(function, primals, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        return zip(*map(forward_ad.unpack_dual, function(*duals)), strict=True)


def along(case, leaves, names, backend):
    """The operation as a function of the arguments `names`, and their values."""

    def function(*x):
        arguments = leaves | dict(zip(names, x, strict=True))
        return case.run(arguments, backend, **case.output_options)

    return function, tuple(leaves[n] for n in names)


@each_mode
@each_operation
def test_dual_tensors_give_what_duals_give(case, mode, kernels):
    """Bitwise, as do the gradients of the primal; by the kernels, which are asked for by name."""
    p = errors.problem(case, dtypes_of(case, kernels)[0])
    leaves = {n: x.clone().requires_grad_(n in case.differentiable) for n, x in p.primals.items()}
    function, x = along(case, leaves, p.tangents, kernels)
    primals, tangents = forward_mode(mode, function, x, tuple(p.tangents.values()))
    wanted = p.evaluate(kernels)
    gradients = torch.autograd.grad(primals, [leaves[n] for n in case.differentiable], p.cotangents)
    for i, (y, y_dot) in enumerate(zip(primals, tangents, strict=True)):
        assert torch.equal(y, wanted[f"output {i}"]) and torch.equal(y_dot.detach(), wanted[f"tangent {i}"])
    for name, got in zip(case.differentiable, gradients, strict=True):
        assert torch.equal(got, wanted[f"gradient of {name}"])


@each_mode
@pytest.mark.parametrize("backend", [None, "reference"])
@each_operation
def test_a_weight_with_a_tangent_takes_the_reference(case, mode, backend):
    """As asked for by name: it differentiates along every argument."""
    p = errors.problem(case, FP32)
    names = case.differentiable
    directions = tuple(torch.randn_like(p.primals[n]) for n in names)
    leaves = {n: x.clone().requires_grad_(n in names) for n, x in p.primals.items()}
    _, got = forward_mode(mode, *along(case, leaves, names, backend), directions)
    doubles = {n: x.double() for n, x in p.primals.items()}
    function, x = along(case, doubles, names, "reference")
    _, wanted = torch.func.jvp(function, x, tuple(d.double() for d in directions))
    for y_dot, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(y_dot.double(), exact, rtol=1e-4, atol=1e-4)


@each_mode
def test_tangents_of_the_reference_can_be_differentiated(mode):
    x, x_dot = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)

    def gradient(silu):
        _, (y_dot,) = forward_mode(mode, lambda x: (silu(x),), (x,), (x_dot,))
        return torch.autograd.grad(y_dot.sum(), x)[0]

    wanted = gradient(torch.nn.functional.silu)
    torch.testing.assert_close(gradient(lambda x: ik.silu(x, backend="reference")), wanted)


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_what_a_transform_left_behind_is_no_kernels(transform):
    left = []

    def loss(x):
        left.append(x)
        return x.sum()

    x = torch.randn(4)
    torch.func.jvp(loss, (x,), (x,)) if transform == "jvp" else torch.func.grad(loss)(x)
    torch.testing.assert_close(ik.silu(left[0]), torch.nn.functional.silu(x))
    with pytest.raises(
        RuntimeError, match=r"cannot run: .* one that a transform of torch.func has left behind"
    ):
        ik.silu(left[0], backend="cpu")


@each_mode
def test_between_modules_of_pytorch(mode):
    """A chain of PyTorch's layers and operations, and what has no tangent beside it, against float64."""
    torch.manual_seed(0)
    first, last, norm = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), torch.rand(8) + 0.5

    def chain(x):
        scale = norm.to(x.dtype)
        return (last(ik.silu(ik.rms_norm(first(x), scale)) * ik.silu(scale)),)

    x, x_dot = torch.randn(5, 6), torch.randn(5, 6)
    (y,), (y_dot,) = forward_mode(mode, chain, (x,), (x_dot,))
    first, last = first.double(), last.double()
    (exact,), (exact_dot,) = torch.func.jvp(chain, (x.double(),), (x_dot.double(),))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y_dot.double(), exact_dot, rtol=1e-5, atol=1e-6)


@each_mode
def test_differentiating_such_a_tangent_is_loud(mode):
    """Also where only the incoming tangent requires grad; the primal's gradient still flows."""
    x, x_dot = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for primal, tangent in ((x, x_dot.detach()), (x.detach(), x_dot), (x, x_dot)):
        (y,), (y_dot,) = forward_mode(mode, lambda x: (ik.silu(x),), (primal,), (tangent,))
        with pytest.raises(RuntimeError, match=r"no gradient flows through tangents. Call \.detach\(\)"):
            (3 * y_dot).sum().backward()
        if primal.requires_grad:
            (got,) = torch.autograd.grad((y * y_dot.detach()).sum(), primal)
            (wanted,) = torch.autograd.grad((torch.nn.functional.silu(x) * y_dot.detach()).sum(), x)
            torch.testing.assert_close(got, wanted)


def test_kernels_refuse_a_weight_with_a_tangent_by_name():
    x, w = torch.randn(3, 4), torch.randn(4)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="rms_norm: weight carries no tangent"):
        ik.rms_norm(x, forward_ad.make_dual(w, w), backend="cpu")


def test_both_kinds_of_duals_at_once_are_refused():
    x = torch.randn(3, 4)
    with forward_ad.dual_level(), pytest.raises(TypeError, match=r"gated_residual: .* Duals or dual tensors"):
        ik.gated_residual(Dual(x, x), forward_ad.make_dual(x, x), torch.ones(4))
    # A tangent of a tangent: PyTorch's part of it would be lost.
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ik.silu(Dual(forward_ad.make_dual(x, x), x))


def test_what_carries_no_tangent_is_left_alone():
    x = torch.randn(3, 4)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(ik.silu(x)).tangent is None
        y = ik.silu(Dual(x, x))
    assert torch.equal(y.tangent, ik.silu(Dual(x, x)).tangent)


@each_operation
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp of vmap"])
def test_transforms_are_right(case, transform):
    """On the default backend in float32, against autograd, loops and torch.func.jvp in float64."""
    p = errors.problem(case, FP32)
    name = next(iter(p.tangents))
    x, x_dot = p.primals[name], p.tangents[name]

    def call(x):
        return case.run({n: t.to(x.dtype) for n, t in p.primals.items()} | {name: x}, None)[0]

    def loss(x):
        return call(x).square().sum()

    def jvp(function, x, x_dot):
        return torch.func.jvp(function, (x,), (x_dot,))[1]

    both, exact, exact_dot = torch.stack([x, x_dot]), x.double(), x_dot.double()
    if transform == "grad":
        leaf = exact.clone().requires_grad_()
        got, wanted = torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0]
    elif transform == "vmap":
        got, wanted = torch.func.vmap(call)(both), torch.stack([call(exact), call(exact_dot)])
    elif transform == "jacrev":
        got = torch.tensordot(torch.func.jacrev(call)(x), x_dot, x.dim())
        wanted = jvp(call, exact, exact_dot)
    else:
        got = jvp(torch.func.vmap(call), both, both.flip(0))
        wanted = torch.stack([jvp(call, exact, exact_dot), jvp(call, exact_dot, exact)])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["level in graph", "graph in level", "graph in jvp"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_and_compile_are_exact_or_loud(order, requires_grad):
    torch._dynamo.reset()
    x, x_dot = torch.randn(3, 8, requires_grad=requires_grad), torch.randn(3, 8)
    w = torch.rand(8)

    def chain(x):
        return ik.silu(ik.rms_norm(x, w)) * 2

    def at_level(function, x, x_dot):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x_dot))).tangent

    _, wanted = torch.func.jvp(chain, (x,), (x_dot,))
    try:
        if order == "level in graph":
            got = torch.compile(lambda x, x_dot: at_level(chain, x, x_dot), backend="aot_eager")(x, x_dot)
        elif order == "graph in level":
            got = at_level(torch.compile(chain, backend="aot_eager"), x, x_dot)
        else:
            _, got = torch.func.jvp(torch.compile(chain, backend="aot_eager"), (x,), (x_dot,))
    except (RuntimeError, NotImplementedError) as error:
        assert "jvp" in str(error) or "forward" in str(error), error
        return
    torch.testing.assert_close(got, wanted)


@each_mode
def test_the_whole_network(mode):
    """u, its tangent and the gradients of u, as from Duals, which are given to the same kernels."""
    torch.manual_seed(0)
    model = build(IMFConfig(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5))
    with torch.no_grad():
        for weight in model.parameters():  # scales and heads that are zero at the start
            weight.add_(torch.randn_like(weight) * 0.1)
    z, z_dot, y = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0, 3, 5])
    h, omega, t_min, t_max = torch.rand(4, 3).add(0.5).unbind()

    def u(z, h):
        return (model(z, torch.ones(3), h, omega, t_min, t_max, y, heads="u"),)

    (got,), (got_dot,) = forward_mode(mode, u, (z, h), (z_dot, torch.ones(3)))
    (wanted,) = u(Dual(z, z_dot), Dual(h, torch.ones(3)))
    assert torch.equal(got, wanted.primal) and torch.equal(got_dot.detach(), wanted.tangent.detach())
    weights = [w for n, w in model.named_parameters() if not n.startswith("v_")]
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), weights) for x in (got, wanted.primal)), strict=True
    ):
        assert torch.equal(a, b)


def two_operations(x):
    return ik.silu(ik.rms_norm(x, torch.linspace(0.5, 1.5, 8)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize_is_refused_and_its_reference_is_right():
    """It computes once what tangents do not reach; kernels that fill a tensor would be among it."""
    x, x_dot = torch.randn(2, 3, 8)
    _, wanted = torch.func.jvp(two_operations, (x,), (x_dot,))
    with pytest.raises(RuntimeError, match=r"rms_norm: torch.func.linearize cannot keep a kernel's results"):
        torch.func.linearize(two_operations, x)
    with ik.use_backend("reference"):
        _, linear = torch.func.linearize(two_operations, x)
        torch.testing.assert_close(linear(x_dot), wanted)


def test_a_traced_jvp_takes_other_primals():
    def with_tangent(x, x_dot):
        return torch.func.jvp(two_operations, (x,), (x_dot,))

    x, x_dot = torch.randn(2, 3, 8)
    traced = make_fx(with_tangent)(x, x_dot)
    for got, wanted in zip(traced(x + 1, -x_dot), with_tangent(x + 1, -x_dot), strict=True):
        assert torch.equal(got, wanted)


class _Transposing(torch.autograd.Function):
    """An identity whose rule leaves the tangent in another memory order than the primal."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.mT.contiguous().mT


@pytest.mark.parametrize("way", ["jvp", "dual level"])
def test_tangents_in_another_layout(way):
    x, x_dot, weight = torch.randn(4, 8), torch.randn(4, 8), torch.ones(8)

    def function(x):
        return ik.rms_norm(_Transposing.apply(x), weight)

    if way == "jvp":
        _, y_dot = ik.jvp(function, (x,), (x_dot,))
    else:
        with torch.autograd.forward_ad.dual_level():
            y = function(torch.autograd.forward_ad.make_dual(x, x_dot))
            y_dot = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.equal(y_dot, ik.rms_norm(Dual(x, x_dot), weight).tangent)
