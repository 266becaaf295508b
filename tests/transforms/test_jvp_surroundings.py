"""Where tangents would be lost around the calls of a function: inference mode, scripts, threads, what leaves
PyTorch, transforms, hooks, PyTorch's checkpoints. Right, or refused by a sentence."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import imf_kernels as ik
from tests.helpers.groups import group_of_one
from tests.transforms.test_jvp import Twice

X, X_DOT = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Tanh())


def _agrees(func, x=X, x_dot=X_DOT, by=None):
    wanted = torch.func.jvp(by or func, (x,), (x_dot,))
    for got, want in zip(ik.jvp(func, (x,), (x_dot,)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_inference_mode():
    network = _network()
    wanted = ik.jvp(network, (X,), (X_DOT,))
    with torch.inference_mode():
        got = ik.jvp(network, (X * 1, X)[:1], (X_DOT * 1,))  # tensors that the mode made
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w) and not g.requires_grad
    with torch.inference_mode():
        latents, network_of_it = X * 1, _network()
    with torch.no_grad():
        assert torch.equal(ik.jvp(network_of_it, (latents,), (X_DOT,))[1], wanted[1])


def test_inference_mode_inside():
    def inside(x):
        with torch.inference_mode():
            return torch.sin(x)

    def beside(x):
        with torch.inference_mode():
            features = torch.sin(X)  # of a frozen encoder
        return x * features

    with pytest.raises(NotImplementedError, match=r"torch.sin.* in torch.inference_mode.*torch.no_grad"):
        ik.jvp(inside, (X,), (X_DOT,))
    assert torch.equal(ik.jvp(beside, (X,), (X_DOT,))[1], X_DOT * X.sin())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts():
    scripted = torch.jit.script(_network())
    for _ in range(4):
        _agrees(scripted, by=_network())
    gelu = torch.jit.script(_tanh_gelu)
    for _ in range(3):
        _agrees(lambda x: gelu(x) + x, by=lambda x: _tanh_gelu(x) + x)
    assert torch._C._get_graph_executor_optimize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda network: torch.jit.trace(network, X)])
def test_scripts_that_were_trained(make):
    """Their plans, made without tangents, are not kept."""
    scripted = make(_network())
    for _ in range(3):
        for _ in range(3):
            scripted(X).sum().backward()
        _agrees(scripted, by=_network())
    gelu, weight = torch.jit.script(_tanh_gelu), torch.ones(8, requires_grad=True)
    for _ in range(3):
        gelu(X * weight).sum().backward()
    _agrees(lambda x: gelu(x * weight), by=lambda x: _tanh_gelu(x * weight))


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _overlapping():
    yield "expanded", torch.tensor(0.5).expand(4)
    yield "expanded rows", torch.randn(1, 5).expand(3, 5)
    yield "unfolded", torch.randn(20).unfold(0, 8, 2)[:4]
    yield "every second", torch.randn(6, 10)[:, ::2]
    yield "transposed", torch.randn(3, 4).t()
    yield "one stride of many", torch.as_strided(torch.randn(30), (4, 6), (3, 1))


@pytest.mark.parametrize(("name", "x"), list(_overlapping()))
def test_primals_in_any_memory(name, x):
    def func(x):
        return (x * 2).sin() + x.flip(0), x.reshape(-1)[1:] * x.reshape(-1)[:-1]

    for x_dot in (
        torch.randn(x.shape),
        torch.randn(x.shape).T.contiguous().T,
        torch.ones(()).expand(x.shape),
    ):
        wanted = torch.func.jvp(
            func, (x.contiguous(),), (x_dot,)
        )  # its own is wrong for some, raises for others
        torch.testing.assert_close(ik.jvp(func, (x,), (x_dot,)), wanted)


def _ways_out():
    yield "numpy", lambda x: torch.from_numpy(np.sin(x.numpy()))
    yield "__array__", lambda x: torch.from_numpy(np.asarray(x) * 2)
    yield "__dlpack__", lambda x: torch.from_dlpack(x) * 2
    yield "__deepcopy__", lambda x: copy.deepcopy(x) * 2
    yield "untyped_storage", lambda x: pickle.loads(pickle.dumps(x)) * 2
    yield "untyped_storage", lambda x: torch.empty(0).set_(x.untyped_storage())


@pytest.mark.parametrize(("name", "func"), list(_ways_out()))
def test_what_leaves_pytorch(name, func):
    with pytest.raises(NotImplementedError, match=rf"Tensor.{name} would leave the tangent.*x\.detach\(\)"):
        ik.jvp(func, (X,), (X_DOT,))
    ik.jvp(lambda x: func(X).sum() + x, (X,), (X_DOT,))  # of what has no tangent it may leave


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_a_tangent_of_another_dtype(dtype):
    _, y_dot = ik.jvp(torch.sin, (X,), (X_DOT.to(dtype),))
    assert y_dot.dtype == torch.float32 and torch.equal(y_dot, X_DOT.to(dtype).float() * X.cos())


@pytest.mark.parametrize(
    "block",
    [
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8)),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.GELU()),
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU()),
        lambda: nn.Sequential(
            nn.Linear(8, 8),
            nn.BatchNorm1d(8, track_running_stats=False),
            nn.ReLU(inplace=True),
            nn.Linear(8, 8),
        ),
    ],
)
def test_autocast(block):
    torch.manual_seed(0)
    block = block()
    exact = torch.func.jvp(copy.deepcopy(block).double(), (X.double(),), (X_DOT.double(),))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = ik.jvp(block, (X,), (X_DOT,)), block(X)
    assert got[0].dtype == got[1].dtype == plain.dtype
    for g, w in zip(got, exact, strict=True):
        assert (g - w).norm() <= 0.03 * w.norm()


def test_threads_take_turns():
    network, wanted, wrong = _network(), ik.jvp(_network(), (X,), (X_DOT,))[1], []

    def work():
        for _ in range(20):
            if not torch.equal(ik.jvp(network, (X,), (X_DOT,))[1], wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_a_thread(function):
    def func(x):
        found = []

        def work():
            try:
                found.append(function(x))
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    return func


def test_threads_inside():
    _agrees(_in_a_thread(_network()), by=_network())
    with pytest.raises(NotImplementedError, match="bessel_j0"):
        ik.jvp(_in_a_thread(torch.special.bessel_j0), (X,), (X_DOT,))
    with pytest.raises(RuntimeError, match="inside another forward-mode derivative"):
        ik.jvp(_in_a_thread(lambda x: ik.jvp(torch.sin, (x,), (x,))[1]), (X,), (X_DOT,))
    assert threading.Thread.start.__module__ == "threading"


def test_transforms_inside():
    weights = torch.randn(3, 8, 8)
    _agrees(lambda x: torch.func.vmap(lambda w: F.linear(x, w).sin())(weights))
    _agrees(lambda x: torch.func.vmap(F.silu, in_dims=1, out_dims=1)(x))
    _agrees(lambda x: torch.func.grad(lambda y: F.silu(y).sum())(x))


@pytest.mark.parametrize(
    "around",
    [
        lambda f: torch.func.grad(lambda x: f(x).sum())(X),
        lambda f: torch.func.vjp(f, X),
        lambda f: torch.func.vmap(f)(X),
        lambda f: torch.func.functionalize(f)(X),
        lambda f: torch.func.jacrev(f)(X[0]),
    ],
)
def test_transforms_around(around):
    with pytest.raises(NotImplementedError, match=r"inside a transform of torch.func.*torch.func.jvp"):
        around(lambda x: ik.jvp(torch.sin, (x,), (torch.ones_like(x),))[0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"v": (X_DOT,)}, "'v'; hand it as `tangents`"),
        ({"create_graph": True}, "'create_graph'; leave it out"),
    ],
)
def test_arguments_of_functional_jvp(arguments, says):
    with pytest.raises(TypeError, match=says):
        ik.jvp(torch.sin, (X,), **{"tangents": (X_DOT,), **arguments})


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks(hook):
    network, calls = _network(), []
    getattr(network[0], hook)(lambda *a: calls.append(1))
    getattr(network, hook)(lambda *a: calls.append(1))
    for x in (X, X.clone().requires_grad_()):
        y, y_dot = ik.jvp(network, (x,), (X_DOT,))
        torch.testing.assert_close(y_dot, torch.func.jvp(_network(), (X,), (X_DOT,))[1])
        y.sum().backward()
    assert len(calls) == 4


def test_a_function_without_a_rule_is_named():
    with pytest.raises(NotImplementedError, match=r"autograd.Function Twice has no forward-mode rule"):
        ik.jvp(lambda x: Twice.apply(x.sin()), (X,), (X_DOT,))


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": False},
        {"use_reentrant": True},
        {"use_reentrant": False, "determinism_check": "none"},
    ],
)
def test_pytorchs_checkpoint(options):
    network, plain = _network(), _network()
    y, y_dot = ik.jvp(lambda x: torch.utils.checkpoint.checkpoint(network, x, **options), (X,), (X_DOT,))
    want, want_dot = ik.jvp(plain, (X,), (X_DOT,))
    assert torch.equal(y, want) and torch.equal(y_dot, want_dot)
    y.square().sum().backward()
    want.square().sum().backward()
    for got, wanted in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)  # backward computes again by PyTorch's own
    # Afterwards it is PyTorch's again, also of what carries no tangent inside.
    x = X.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.any()


class _Several(nn.Module):
    """Returns what moves beside what does not."""

    def __init__(self):
        super().__init__()
        self.network = _network()

    def forward(self, x):
        return self.network(x), torch.ones(3), torch.arange(3)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_ddp(options, tmp_path):
    with group_of_one(tmp_path):
        network, plain = DistributedDataParallel(_network(), **options), _network()
        for _ in range(2):
            y, y_dot = ik.jvp(network, (X,), (X_DOT,))
            y.sum().backward()
        torch.testing.assert_close(y_dot, ik.jvp(plain, (X,), (X_DOT,))[1])
        several = DistributedDataParallel(_Several(), **options)
        (y, apart, places), (y_dot, apart_dot, _) = ik.jvp(several, (X,), (X_DOT,))
        assert torch.equal(y_dot, ik.jvp(_Several(), (X,), (X_DOT,))[1][0])
        assert torch.equal(apart, torch.ones(3)) and not apart_dot.any() and places.tolist() == [0, 1, 2]
        with pytest.raises(NotImplementedError, match="collective allreduce would leave each rank its own"):
            ik.jvp(_all_reduced, (X,), (X_DOT,))
        with pytest.raises(NotImplementedError, match="collective allgather would leave"):
            ik.jvp(_all_gathered, (X,), (X_DOT,))
        with pytest.raises(NotImplementedError, match="collective broadcast would leave"):
            ik.jvp(lambda x: torch.distributed.broadcast(x.sin(), 0), (X,), (X_DOT,))
        _all_reduced(X)
        import torch.distributed.nn.functional as differentiable

        y, y_dot = ik.jvp(lambda x: differentiable.all_reduce(2 * x), (X,), (X_DOT,))
        assert torch.equal(y_dot, 2 * X_DOT)
        y, y_dot = ik.jvp(lambda x: torch.cat(differentiable.all_gather(2 * x)), (X,), (X_DOT,))
        assert torch.equal(y_dot, 2 * X_DOT)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_checkpoints_inside_ddp(options, tmp_path):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.outside = _network(), nn.Linear(8, 8)

        def forward(self, x):
            c = self.outside(x).sin()
            return ik.checkpoint(lambda q: self.network(q) * c, x) + c

    with group_of_one(tmp_path):
        network, plain = DistributedDataParallel(Checkpointed(), **options), Checkpointed()
        plain.load_state_dict(network.module.state_dict())
        if "find_unused_parameters" in options:
            with pytest.raises(NotImplementedError, match=r"DistributedDataParallel.*static_graph=True"):
                ik.jvp(network, (X,), (X_DOT,))
            return
        for _ in range(2):
            network.zero_grad()
            ik.jvp(network, (X,), (X_DOT,))[0].sum().backward()
        plain(X).sum().backward()
        for got, want in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad)


def _all_reduced(x):
    y = x * 2
    torch.distributed.all_reduce(y)
    return y


def _all_gathered(x):
    out = [torch.empty_like(x)]
    torch.distributed.all_gather(out, x * 2)
    return torch.cat(out)
