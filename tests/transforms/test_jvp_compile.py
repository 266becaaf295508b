"""`imf_kernels.jvp` inside torch.compile(fullgraph=True)."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import imf_kernels as ik
from tests.transforms.test_jvp import FUNCTIONS, X_DOT, Block, X, masks


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


def arithmetic(x):
    """One operand with a tangent beside one without: numbers, a row, a tensor of x's shape."""
    row = torch.linspace(-1, 1, x.shape[-1])
    y = 1 - x * row + 2 / (x * x + 1) + (row - x) / 3 - row / (x * x + 2)
    y = torch.maximum(y, row.expand_as(y)) + (1 + x) * 0.5
    return torch.cat([row.expand_as(y[:, :1]), y, torch.stack([y, row.expand_as(y)]).sum(0)], 1)


REFLECTED = {
    "1 - x": lambda x: 1 - x,
    "2 / x": lambda x: 2 / x,
    "x ** 2": lambda x: x**2,
    "2 ** x": lambda x: 2**x,
    "row - x": lambda x: torch.ones(16) - x,
    "x % 2": lambda x: x % 2,
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "norm": lambda x: x.norm(dim=1),
}


@pytest.mark.parametrize("hidden", [False, True], ids=["as named", "named by the decorator"])
@pytest.mark.parametrize("function", REFLECTED.values(), ids=REFLECTED)
def test_methods_that_pytorch_writes_in_python(function, hidden, monkeypatch):
    """Under the names that torch.compile gives them before PyTorch 2.15, and from it on."""
    wanted, wanted_dot = ik.jvp(function, (X,), (X_DOT,))
    if hidden:
        for method in vars(torch.Tensor).values():
            if hasattr(method, "__wrapped__"):
                monkeypatch.setattr(method, "__name__", "wrapped")
    y, y_dot = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend="aot_eager", fullgraph=True
    )(X, X_DOT)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(y_dot, wanted_dot)


NORM = nn.LayerNorm(16)


def norm_across(x):
    return NORM(x.unflatten(1, (-1, 1)).transpose(1, 2))


@pytest.mark.parametrize(
    "function", [Block(), arithmetic, norm_across], ids=["block", "arithmetic", "norm of what is transposed"]
)
def test_lengths_that_change_compile_twice_at_most(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend=counter, fullgraph=True
    )
    for length in (6, 7, 9, 12):
        generator = torch.Generator().manual_seed(length)
        x, x_dot = (torch.randn(4, length, 16, generator=generator) for _ in range(2))
        for got, wanted in zip(compiled(x, x_dot), ik.jvp(function, (x,), (x_dot,)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("function", [F.silu, NORM, nn.Linear(16, 8)], ids=["silu", "norm", "linear"])
def test_batches_that_change_compile_once(function):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend=counter, fullgraph=True, dynamic=True
    )
    for batch, length in ((3, 5), (3, 6), (4, 7), (5, 7), (6, 9)):
        x, x_dot = torch.randn(batch, length, 16), torch.randn(batch, length, 16)
        for got, wanted in zip(compiled(x, x_dot), ik.jvp(function, (x,), (x_dot,)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


WEIGHT = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))


def _checkpointed(x):
    return ik.checkpoint(lambda x: F.linear(F.layer_norm(x, (16,)), WEIGHT), x)


def _operations(x):
    y = ik.silu(ik.linear(x, WEIGHT)) + ik.layer_norm(x, [16])
    heads = y.view(*x.shape[:2], 2, 8).transpose(1, 2)
    return ik.rms_norm(ik.scaled_dot_product_attention(heads, heads, heads), torch.ones(8))


@pytest.mark.parametrize(
    "function",
    [
        _checkpointed,
        _operations,
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6) / 2),
        lambda x: x.softmax(-1),
    ],
    ids=["checkpoint", "operations", "layer_norm over two", "batch_norm", "running statistics", "softmax"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_calls_whose_rule_the_compiler_cannot_follow(function, autocast):
    def loss(x, x_dot):
        y, y_dot = ik.jvp(function, (x,), (x_dot,))
        return y.float().square().sum(), y_dot

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, wanted_x = (X.clone().requires_grad_() for _ in range(2))
        wanted, wanted_dot = loss(wanted_x, X_DOT)
        got, got_dot = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, X_DOT)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(got_dot.detach(), wanted_dot.detach(), **tolerance)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(x.grad, wanted_x.grad, **tolerance)


def test_gradients_in_another_layout_than_traced():
    """That of a convolution behind attention."""
    generator = torch.Generator().manual_seed(3)
    x, x_dot = (torch.randn(1, 8, 4, 4, generator=generator) for _ in range(2))
    into, out = torch.randn(24, 8, 1, 1, generator=generator), torch.randn(8, 8, 1, 1, generator=generator)
    into.requires_grad_()
    out.requires_grad_()

    def function(x):
        q, k, v = F.conv2d(x, into).reshape(1, 1, 24, -1).permute(0, 1, 3, 2).contiguous().chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).permute(0, 2, 1).reshape(1, 8, 4, 4)
        return F.conv2d(y, out)

    wanted = torch.autograd.grad(function(x).square().sum(), (into, out))
    step = torch.compile(lambda *x: ik.jvp(function, x, (x_dot,)), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(step(x)[0].square().sum(), (into, out))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_vmap_of_what_moves():
    def function(x):
        return torch.vmap(F.silu)(x) * torch.vmap(lambda i: (i > 1).float())(torch.arange(16))

    got = torch.compile(lambda *x: ik.jvp(function, x, (X_DOT,)), backend="aot_eager", fullgraph=True)(X)
    torch.testing.assert_close(got, ik.jvp(function, (X,), (X_DOT,)))


ONES, SQUARE = torch.ones(4, 6, 16), torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(2))
FACTORS = {
    "add": lambda x: torch.add(x, ONES, alpha=2),
    "add_": lambda x: ONES.clone().add_(x, alpha=2),
    "sub": lambda x: torch.sub(input=x, other=ONES, alpha=2),
    "sub_": lambda x: (x * 1).sub_(ONES, alpha=2),
    "addcmul": lambda x: torch.addcmul(ONES, x, 3 * ONES, value=2),
    "addcmul_": lambda x: (x * 1).addcmul_(ONES, 3 * ONES, value=2),
    "addmm": lambda x: torch.addmm(SQUARE[0], x[0], x[0].mT, beta=0),
    "baddbmm": lambda x: torch.baddbmm(SQUARE, x, x.mT, beta=0.5, alpha=2),
    "baddbmm_": lambda x: SQUARE.clone().baddbmm_(x, x.mT, beta=0),
    "addbmm": lambda x: torch.addbmm(SQUARE[0], batch2=x.mT, batch1=x, beta=2),
    "addmv": lambda x: torch.addmv(SQUARE[0, 0], x[0], x[0, 0], beta=2),
    "addr": lambda x: SQUARE[0].addr(x[0, :, 0], x[0, :, 1], beta=2),
}


@pytest.mark.parametrize("function", FACTORS.values(), ids=FACTORS)
def test_factors_of_what_has_no_tangent(function):
    """PyTorch's rules end the process."""
    wanted = ik.jvp(function, (X,), (X_DOT,))
    got = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend="aot_eager", fullgraph=True
    )(X, X_DOT)
    torch.testing.assert_close(got, wanted)


def _branches(x):
    return x.sin() if x.sum() < 1e9 else x


def _prints(x):
    y = F.silu(x)
    print(end="")
    return y * x


def _asks(x):
    return x * x.abs().max().item()


def _disabled(x):
    return torch._dynamo.disable(lambda x: F.gelu(x))(x) * 2


@pytest.mark.parametrize("function", [_branches, _prints, _asks, _disabled])
@pytest.mark.parametrize("inside", [False, True], ids=["", "in a module"])
def test_graph_breaks(function, inside):
    """The default of torch.compile: what follows the break runs eagerly, with its tangents."""

    class Module(nn.Module):
        def forward(self, x):
            return function(F.linear(x, WEIGHT))

    func = Module() if inside else function
    wanted, wanted_dot = ik.jvp(func, (X,), (X_DOT,))
    compiled = torch.compile(lambda x, x_dot: ik.jvp(func, (x,), (x_dot,)), backend="aot_eager")
    for _ in range(2):
        y, y_dot = compiled(X, X_DOT)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(y_dot, wanted_dot)


def _through(x, x_dot):
    y, y_dot = ik.jvp(lambda x: F.linear(x, WEIGHT).sin(), (x,), (x_dot,))
    return (y - y_dot).square().sum()


def _through_dual(x, x_dot):
    y = ik.silu(ik.Dual(x, x_dot))
    return (y.primal * y.tangent).sum()


@pytest.mark.parametrize("loss", [_through, _through_dual])
def test_a_loss_through_a_tangent(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in (loss, compiled):
        with pytest.raises(RuntimeError, match=r"no gradient flows through tangents. Call \.detach\(\)"):
            step(X.clone().requires_grad_(), X_DOT).backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, X_DOT), loss(X, X_DOT))


def test_a_tangent_that_is_handed_out():
    def step(x, x_dot):
        return ik.jvp(lambda x: F.linear(x, WEIGHT).sin(), (x,), (x_dot,))

    grads = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = X.clone().requires_grad_()
        y, y_dot = call(x, X_DOT)
        (y - y_dot.detach()).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def _traced(function, x, x_dot, **options):
    """Returns the calls of the forward and backward graphs, after comparing gradients with eager mode."""
    targets = []

    def keep(graph, inputs):
        targets.append({f"{node.target} {node.args[:1]}" for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    def loss(x, x_dot):
        y, y_dot = ik.jvp(function, (x,), (x_dot,), **options)
        return (y * (y_dot if options else y_dot.detach())).sum()

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    grads = []
    for step in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        step(leaf, x_dot).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    return targets


@pytest.mark.parametrize("options", [{}, {"differentiable": True}], ids=["", "differentiable"])
@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (F.silu, "silu_"),
        (F.gelu, "gelu_"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh_"),
        (lambda x: F.layer_norm(x, (16,), WEIGHT[0], WEIGHT[1]), "layer_norm_"),
        (lambda x: F.rms_norm(x, (16,), WEIGHT[0]), "rms_norm_"),
    ],
    ids=["silu", "gelu", "gelu_tanh", "layer_norm", "rms_norm"],
)
def test_calls_are_left_to_the_compiler_unless_a_backend_is_named(function, operator, options):
    def operators(targets):
        return [name for graph in targets for name in graph if f"imf_kernels.{operator}" in name]

    assert not operators(_traced(function, X, X_DOT, **options))
    torch._dynamo.reset()
    with ik.use_backend("cpu"):
        assert operators(_traced(lambda x: function(x) * 1, X, X_DOT, **options))


def test_results_written_in_place_are_no_views():
    """The backward of a call in place on a view copies gradients through strides."""

    def function(x):
        y = F.linear(x, WEIGHT)
        return y.clip_(-1, 1).add_(x)

    assert not [name for graph in _traced(function, X, X_DOT) for name in graph if "strided" in name]


@pytest.mark.parametrize("x", [torch.tensor(0.5).expand(4), torch.randn(20).unfold(0, 8, 2)[:4]])
def test_primals_that_overlap_themselves(x):
    x_dot = torch.randn(x.shape)
    wanted = ik.jvp(torch.sin, (x,), (x_dot,))
    compiled = torch.compile(lambda x, v: ik.jvp(torch.sin, (x,), (v,)), backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x, x_dot), wanted, strict=True):
        torch.testing.assert_close(got, want)


class _Straight(torch.autograd.Function):
    """Rounds, and hands its derivatives through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, dy):
        return dy


class _WithRule(_Straight):
    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.clone()


class _Module(torch.nn.Module):
    def forward(self, x):
        return 2 * _WithRule.apply(x)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("function", [_WithRule.apply, _Module()], ids=["function", "module"])
def test_the_rule_of_a_function(function, gradients):
    x = X.clone().requires_grad_(gradients)

    def step(x, x_dot):
        return ik.jvp(lambda x: function(3 * x).sin(), (x,), (x_dot,))

    y, y_dot = torch.compile(step, backend="aot_eager")(x, X_DOT)
    factor = 2 if isinstance(function, torch.nn.Module) else 1
    wanted = factor * (3 * X).round()
    torch.testing.assert_close(y.detach(), wanted.sin())
    torch.testing.assert_close(y_dot.detach(), wanted.cos() * 3 * factor * X_DOT)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"would not call jvp of the .* _WithRule"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(x, X_DOT)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_a_function_without_a_rule(gradients):
    x = X.clone().requires_grad_(gradients)
    step = torch.compile(lambda x, x_dot: ik.jvp(_Straight.apply, (x,), (x_dot,)), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="Function _Straight has no forward-mode rule"):
        step(x, X_DOT)


def test_a_function_of_what_does_not_move():
    def step(x, x_dot):
        return ik.jvp(lambda x: x * _Straight.apply(WEIGHT[0]), (x,), (x_dot,))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(X, X_DOT)
    torch.testing.assert_close(compiled, step(X, X_DOT))


@pytest.mark.parametrize(
    "function", [lambda x: 2 * x[0], lambda x: x.select(1, 1).sin(), lambda x: x[:, 1:].square()]
)
def test_inputs_that_are_views(function):
    """As parts of a batch are."""
    both = torch.randn(2, 4, 8)
    parts = {
        "unbind": (both[0], both[1]),
        "one of them": (both[0].clone(), both[1]),
        "rows": (both.flatten(0, 1)[2:6], both.flatten(0, 1)[1:5]),
        "chunks": both.reshape(4, 16).chunk(2, 1),
        "transposed": (both[0].mT.contiguous().mT, both[1]),
    }
    compiled = torch.compile(
        lambda x, x_dot: ik.jvp(function, (x,), (x_dot,)), backend="aot_eager", fullgraph=True
    )
    for name, (x, x_dot) in parts.items():
        torch._dynamo.reset()
        for got, want in zip(compiled(x, x_dot), ik.jvp(function, (x,), (x_dot,)), strict=True):
            torch.testing.assert_close(got, want, msg=lambda message, name=name: f"{name}: {message}")


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, x_dot):
        return ik.jvp(self.block, (x,), (x_dot,))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export():
    step = Step()
    program = torch.export.export(step, (X, X_DOT), strict=True)
    for got, wanted in zip(program.module()(X, X_DOT), step(X, X_DOT), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"torch.export follows it with strict=True alone"):
        torch.export.export(step, (X, X_DOT), strict=False)


def test_a_compiler_that_fails_leaves_forward_mode():
    def failing(module, inputs):
        torch._C._enter_dual_level()
        raise ValueError("this compiler fails")

    step = torch.compile(lambda x, x_dot: ik.jvp(torch.sin, (x,), (x_dot,)), backend=failing, fullgraph=True)
    with pytest.raises(Exception, match="this compiler fails"):
        step(X, X_DOT)
    assert torch.equal(ik.jvp(torch.sin, (X,), (X_DOT,))[1], X_DOT * X.cos())
