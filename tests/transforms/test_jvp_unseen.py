"""Calls whose tangent PyTorch drops or gets wrong without a word: right, or refused, in graphs too."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import map as mapped
from torch._higher_order_ops import scan, while_loop

import imf_kernels as ik
from imf_kernels.dual import name_of
from imf_kernels.transforms import jvp as jvp_module
from tests.helpers.groups import group_of_one

X, X_DOT = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
HOW = ("eager", "compiled", "fullgraph")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def tangent(func, how="eager", x=X, x_dot=X_DOT):
    def step(x, x_dot):
        return ik.jvp(func, (x,), (x_dot,))[1]

    if how != "eager":
        step = torch.compile(step, backend="aot_eager", fullgraph=how == "fullgraph")
    return step(x, x_dot).detach()


def differences(func, x=X, x_dot=X_DOT):
    dtype, wide = x.dtype, torch.complex128 if x.is_complex() else torch.float64
    x, x_dot, step = x.to(wide), x_dot.to(wide), 1e-5
    return ((func(x + step * x_dot) - func(x - step * x_dot)) / (2 * step)).to(dtype)


@torch.library.custom_op("imf_kernels_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@torch.library.custom_op("imf_kernels_tests::order", mutates_args=())
def order(x: torch.Tensor) -> torch.Tensor:
    return x.argsort()


twice.register_fake(torch.empty_like)
order.register_fake(lambda x: torch.empty_like(x, dtype=torch.int64))


class Twice(nn.Module):
    def forward(self, x):
        return twice(x)


LOST = {
    "an operator": twice,
    "in a checkpoint": lambda x: ik.checkpoint(twice, x),
    "in a module": nn.Sequential(nn.Linear(8, 8), Twice()),
    "normal": lambda x: torch.normal(x, torch.ones_like(x)),
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "while_loop": lambda x: while_loop(lambda y: y.sum() < 0, lambda y: (y.cos(),), (x,))[0],
    "scan": lambda x: scan(lambda c, y: (c + y, c + y), x[0] * 0, x)[0],
    "map": lambda x: mapped(torch.sin, x),
}

# PyTorch 2.11 leaves out what an error inside control flow says.
REFUSAL = r"imf_kernels\.jvp: .*(rule|tangent)|twice|higher order operator doesn't work"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("func", LOST.values(), ids=LOST)
def test_lost_tangents(func, how):
    with pytest.raises(
        (NotImplementedError, RuntimeError), match=r"imf_kernels\.jvp: .*(rule|tangent)|twice"
    ):
        tangent(func, how)


@pytest.mark.parametrize("how", HOW)
def test_operators_of_integers(how):
    torch.testing.assert_close(
        tangent(lambda x: x.gather(1, order(x)), how), differences(lambda x: x.sort(1)[0])
    )


IN_PLACE = {
    "mul_": lambda x: (lambda y: y.mul_(y))(1 * x),
    "squared relu": lambda x: (lambda y: y.mul_(y))(F.relu(x)),
    "*=": lambda x: (lambda y: y.__imul__(y))(1 * x),
    "a view": lambda x: (lambda y: (y[0].mul_(y[0]), y)[1])(1 * x),
    "another view": lambda x: (lambda y: y.mul_(y.view(-1).view(4, 8)))(1 * x),
    "pow_": lambda x: (lambda y: y.pow_(y))(x.abs() + 1),
    "addcmul_": lambda x: (lambda y: y.addcmul_(y, y))(1 * x),
    "lerp_": lambda x: (lambda y: y.lerp_(x, weight=y))(2 * x),
    "hypot_": lambda x: (lambda y: y.hypot_(y))(x.abs() + 1),
    "atan2_": lambda x: (lambda y: y.atan2_(y))(x.abs() + 1),
    "xlogy_": lambda x: (lambda y: y.xlogy_(y))(x.abs() + 1),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("func", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_of_itself(func, how):
    if func is IN_PLACE["lerp_"] and how != "eager":
        pytest.skip("PyTorch cannot trace its rule")
    torch.testing.assert_close(tangent(func, how), differences(func), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_in_place_of_its_own_values(how):
    torch.testing.assert_close(tangent(lambda x: (lambda y: y.mul_(y.detach()))(1 * x), how), X_DOT * X)


def test_where_forward_mode_is_off():
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, x_dot):
            return ik.jvp(torch.sin, (x,), (x_dot,))[1].clone()

    assert torch.equal(Sine.apply(X, X_DOT), X_DOT * X.cos())
    with fwAD._set_fwd_grad_enabled(False):
        assert torch.equal(tangent(torch.sin), X_DOT * X.cos())
        assert not torch._C._is_fwd_grad_enabled()


def _energy(x):
    return F.layer_norm(x, (8,)).square().sum() / 3 + F.silu(x).sum()


def _gradient(x, by):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return by(_energy(x), x)


def _backward(y, x):
    y.backward()
    return x.grad


@pytest.mark.parametrize("by", [lambda y, x: torch.autograd.grad(y, x)[0], _backward])
def test_reverse_mode_inside(by):
    with pytest.raises(NotImplementedError, match=r"gives a gradient without one; torch.func.grad"):
        tangent(lambda x: _gradient(x, by))
    wanted = differences(torch.func.grad(_energy))
    torch.testing.assert_close(tangent(torch.func.grad(_energy)), wanted, rtol=1e-3, atol=1e-4)
    fixed = X.clone().requires_grad_()  # of what does not move it is a number like others
    slope = torch.func.grad(_energy)(X)
    got = tangent(lambda x: x * torch.autograd.grad(_energy(fixed), fixed)[0])
    torch.testing.assert_close(got, X_DOT * slope)


OTHER_NAMES = {
    "vmap": torch.vmap(torch.special.bessel_j0),
    "func.grad": torch.func.grad(lambda x: torch.special.bessel_j0(x).sum()),
    "an operator": torch.ops.aten.special_bessel_j0,
    "an overload": torch.ops.aten.special_bessel_j0.default,
}


@pytest.mark.parametrize("func", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_refused_by_whatever_name(func):
    with pytest.raises(NotImplementedError, match="bessel_j0 has no derivative in PyTorch"):
        tangent(func)


def test_corrected_by_whatever_name():
    def func(x):
        return torch.ops.aten.logcumsumexp(30 * x, 1)

    torch.testing.assert_close(tangent(func), differences(func), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"logcumsumexp inside a transform of torch.func"):
        tangent(torch.vmap(lambda x: torch.logcumsumexp(x, 0)))
    z, z_dot = torch.complex(X, X_DOT), torch.complex(X_DOT, X)
    wanted = differences(lambda z: z * torch.sigmoid(z), z, z_dot)
    for silu in (nn.SiLU(), nn.SiLU(inplace=True), torch._C._nn.silu, torch.ops.aten.silu):
        torch.testing.assert_close(tangent(lambda z, silu=silu: silu(1 * z), x=z, x_dot=z_dot), wanted)


def _with_data(x):
    y = 1 * x
    y.data = x.sin()
    return 2 * y


WAYS_OUT = {
    "to_dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
    "apply_": lambda x: (1 * x).apply_(lambda number: 2 * number),
    "map_": lambda x: (1 * x).map_(x, lambda a, b: a * b),
    "data_ptr": lambda x: x * x.data_ptr(),
    "data": _with_data,
}


@pytest.mark.parametrize("func", WAYS_OUT.values(), ids=WAYS_OUT)
def test_what_leaves_pytorch(func):
    with pytest.raises(NotImplementedError, match=r"would (leave the tangent behind|keep the tangent)"):
        tangent(func)
    tangent(lambda x: x + func(X).sum())


COLLECTIVES = {
    "all_gather_into_tensor": lambda x, out: torch.distributed.all_gather_into_tensor(out, x.sin()),
    "all_to_all_single": lambda x, out: torch.distributed.all_to_all_single(out, x * 1),
    "reduce_scatter_tensor": lambda x, out: torch.distributed.reduce_scatter_tensor(out, x * 1),
    "async": lambda x, out: torch.distributed.all_reduce(out.copy_(x), async_op=True).wait(),
    "broadcast": lambda x, out: torch.distributed.broadcast(out.copy_(x), 0),
    "of a backend": lambda x, out: (
        torch.distributed.group.WORLD._get_backend(torch.device("cpu")).allreduce([out.copy_(x)]).wait()
    ),
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without distributed")
@pytest.mark.filterwarnings("ignore")
def test_collectives(tmp_path):
    with group_of_one(tmp_path):
        for collective in COLLECTIVES.values():

            def func(x, collective=collective):
                out = torch.empty_like(x)
                collective(x, out)
                return out

            for how in HOW:
                torch._dynamo.reset()
                with pytest.raises(
                    Exception, match=r"imf_kernels\.jvp: torch.distributed|does( not|n't) |_get_backend"
                ):
                    tangent(func, how)
            func(X)


def test_a_tangent_that_is_written_to():
    network = nn.Linear(8, 8)
    wanted = X_DOT @ network.weight.detach().T

    def step(x, x_dot):
        y, y_dot = ik.jvp(network, (x,), (x_dot,))
        y_dot.clamp_(-0.1, 0.1)
        return (y - y_dot.detach()).square().mean(), y_dot

    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        loss, y_dot = call(X, X_DOT)
        torch.testing.assert_close(y_dot.detach(), wanted.clamp(-0.1, 0.1))
        loss.backward()
        expected = 2 * (network(X) - wanted.clamp(-0.1, 0.1)).sum(0) / wanted.numel()
        torch.testing.assert_close(network.bias.grad, expected.detach())


def test_threads_that_outlive_it():
    pools = []

    def func(x):
        pools.append(ThreadPoolExecutor(1))
        return pools[0].submit(torch.sin, x).result()

    assert torch.equal(tangent(func), X_DOT * X.cos())
    with pools[0]:
        later = pools[0].submit(tangent, torch.sin).result()
        assert torch.equal(later, X_DOT * X.cos())
        assert torch.equal(pools[0].submit(torch.special.bessel_j0, X).result(), torch.special.bessel_j0(X))


def test_a_thread_that_waits_for_another(monkeypatch):
    monkeypatch.setattr(jvp_module, "_TURN", 0.2)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match=r"another thread has been inside jvp for 0\.2 s"),
    ):
        pool.submit(int).result()
        tangent(lambda x: x * pool.submit(tangent, torch.sin).result())
    assert torch.equal(tangent(torch.sin), X_DOT * X.cos())
    assert threading.Thread.start.__module__ == "threading"


@pytest.mark.parametrize("where", ["around jvp", "in the network", "around all"])
def test_inference_mode_in_a_graph(where):
    def sine(x):
        if where != "in the network":
            return x.sin()
        with torch.inference_mode():
            return x.sin()

    def step(x, x_dot):
        if where != "around jvp":
            return ik.jvp(sine, (x,), (x_dot,))[1]
        with torch.inference_mode():
            return ik.jvp(sine, (x,), (x_dot,))[1]

    step = torch.compile(step, backend="aot_eager")
    with torch.inference_mode(where == "around all"), warnings.catch_warnings():
        if where == "in the network":
            with pytest.raises(NotImplementedError, match=r"in torch.inference_mode.*torch.no_grad"):
                step(X, X_DOT)
        else:
            torch.testing.assert_close(step(X, X_DOT), X_DOT * X.cos())
    assert torch.equal(tangent(torch.sin), X_DOT * X.cos())


INSIDE = [lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1], torch.func.jacfwd(torch.sin)]


@pytest.mark.parametrize("func", INSIDE, ids=["jvp", "jacfwd"])
def test_forward_mode_inside(func):
    with pytest.raises(NotImplementedError, match=r"torch.func.jvp, jacfwd, hessian.* does not nest"):
        tangent(func)
    assert torch.equal(tangent(torch.sin), X_DOT * X.cos())


@pytest.mark.parametrize("how", ["eager", "fullgraph"])
@pytest.mark.parametrize("shape", [(1,), (), (4, 3)], ids=str)
def test_biases_that_broadcast(shape, how):
    weight, bias = torch.randn(3, 8), torch.randn(shape)
    torch.testing.assert_close(tangent(lambda x: F.linear(x, weight, bias), how), X_DOT @ weight.T)


@pytest.mark.parametrize("how", ["eager", "fullgraph"])
def test_group_norm_of_no_rows(how):
    network = nn.GroupNorm(2, 8)
    assert tangent(network, how, X[:0], X_DOT[:0]).shape == (0, 8)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax, torch.logcumsumexp, torch.cumsum])
def test_results_that_are_given(function):
    """`out=` has no tangent in PyTorch, whichever rule serves the function; None means no result given."""
    x, x_dot = torch.randn(2, 3, 4)
    with pytest.raises(NotImplementedError, match=f"{function.__name__} has no forward-mode rule"):
        ik.jvp(lambda x: function(x, 1, out=torch.empty(3, 4)), (x,), (x_dot,))
    _, y_dot = ik.jvp(lambda x: function(x, 1, out=None), (x,), (x_dot,))
    _, wanted = torch.func.jvp(lambda x: function(x, 1), (x,), (x_dot,))
    torch.testing.assert_close(y_dot, wanted)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.mm, "torch.mm"),
        (torch.spmm, "torch.spmm"),
        (torch.saddmm, "torch.saddmm"),
        (torch.linalg.solve, "torch.linalg.solve"),
        (torch.Tensor.__pow__, "torch.Tensor.__pow__"),
        (torch.nn.functional.linear, "torch.nn.functional.linear"),
        (torch.ops.aten.mm.default, "aten.mm.default"),
    ],
)
def test_names_in_messages(function, name):
    """Also of functions that are equal, as builtins of one implementation are."""
    assert name_of(function) == name
