"""`imf_kernels.jvp` against `torch.func.jvp`: results, gradients, and the semantics of PyTorch's calls."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import imf_kernels as ik

torch.manual_seed(0)
X, X_DOT = torch.randn(4, 6, 16), torch.randn(4, 6, 16)
W = torch.randn(16, 16) / 4


class Block(nn.Module):
    """Attention and MLP as people write them."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.register_buffer("scale", torch.full((width,), 0.5))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.scale * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def theirs(func, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):  # the only form of attention that it goes through
        return torch.func.jvp(func, primals, tangents)


def both(func, primals, tangents, parameters=()):
    """Outputs, tangents and gradients of the sum of squares of the outputs, ours and `torch.func.jvp`'s."""
    results = []
    for jvp in (ik.jvp, theirs):
        y, y_dot = jvp(func, primals, tangents)
        grads = torch.autograd.grad(y.square().sum(), parameters) if parameters else ()
        results.append((y, y_dot, *grads))
    return results


def assert_equal(func, primals, tangents, parameters=(), **tolerance):
    for got, wanted in zip(*both(func, primals, tangents, parameters), strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach(), **tolerance)


def test_a_block_of_a_transformer():
    torch.manual_seed(1)
    block = Block()
    assert_equal(block, (X,), (X_DOT,), tuple(block.parameters()), rtol=1e-4, atol=1e-5)


def test_no_matrix_of_attention_weights_is_made():
    names = {calls.name: calls.path for calls in ik.explain(Block(), (X,), (X_DOT,))}
    assert names["torch.nn.functional.scaled_dot_product_attention"] == "imf_kernels"
    assert not any("softmax" in name for name in names)


def inplace(x):
    y = x * 2
    y.mul_(x)
    y += 1
    y[1] = x[0]
    y[:, 2:4].sin_()
    return y


def into_a_plain_tensor(x):
    out = torch.zeros(4, 6, 16)
    out[:, 1:3] = x[:, 1:3] * 3
    out.select(1, 0).copy_(x[:, 5])
    return out


def views(x):
    y = x.clone()
    first, *_ = y.view(4, 96).split(48, dim=1)
    first.exp_()
    y.transpose(0, 1)[2].t().mul_(y[0, 0, 0])
    return y.reshape(-1, 4).unfold(0, 3, 2).flip(0)


def indexing(x):
    i = torch.tensor([2, 0, 2])
    picked = x[i, :, 3].mean() + x.gather(0, i.view(3, 1, 1)).sum() + x.index_select(1, i).amax()
    return torch.where(x > 0, x, picked).masked_fill(x > 1, 0.5)


def masks(x):
    mask = torch.arange(96).reshape(6, 16) % 3 == 0
    y = x * 2
    y[:, mask] = x[:, ~mask][:, :32]
    return y


def of_other_calls(x):
    y = torch.einsum("blc,cd->bld", x, W.to(x)) + torch.cat([x, x.flip(1)], 1)[:, ::2]
    y = torch.stack([y, F.pad(x, (0, 0, 1, 0))[:, :-1]]).softmax(-1).amax(0)
    y = y / y.norm(dim=-1, keepdim=True) + torch.addmm(x[0], x[1], W.to(x)).cumsum(0)
    return y * torch.sigmoid(x) ** 2 + torch.logsumexp(x, 1, keepdim=True) - x.std(1, keepdim=True)


def of_convolutions(x):
    image = x.reshape(4, 2, 6, 8)
    y = F.conv2d(image, torch.linspace(-1, 1, 54).view(3, 2, 3, 3), padding=1)
    y = F.group_norm(F.silu(y), 3, torch.linspace(0.5, 1, 3), torch.ones(3))
    y = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="nearest")
    return F.conv_transpose2d(y, torch.linspace(-1, 1, 54).view(3, 2, 3, 3), padding=1)


def of_normalisation(x):
    y = F.layer_norm(x, (16,), torch.linspace(0.5, 1, 16), torch.ones(16))
    return F.rms_norm(y.transpose(1, 2), (6,), None, 1e-5) + F.normalize(x, dim=-1).transpose(1, 2)


def of_attention(x):
    q = k = v = x.view(4, 6, 2, 8).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y + F.scaled_dot_product_attention(q, k, v, torch.linspace(-1, 1, 6).expand(6, 6), scale=0.3)
    return y + F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


FUNCTIONS = [
    *(inplace, into_a_plain_tensor, views, indexing, masks),
    *(of_other_calls, of_convolutions, of_normalisation, of_attention),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_calls_keep_their_meaning(function, dtype):
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    x, x_dot = X.to(dtype), X_DOT.to(dtype)
    torch.set_default_dtype(dtype)
    try:
        assert_equal(function, (x,), (x_dot,), **tolerance)
        step = 1e-6
        if dtype == torch.float64:  # and torch.func.jvp itself is right
            differences = (function(x + step * x_dot) - function(x - step * x_dot)) / (2 * step)
            torch.testing.assert_close(ik.jvp(function, (x,), (x_dot,))[1], differences, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_structure_of_arguments_and_results():
    def func(inputs, y):
        return {"sum": inputs["a"] + y, "pair": (inputs["a"] * inputs["b"], y.exp())}

    a, b, y = torch.randn(3), torch.randn(3), torch.randn(3)
    primals = {"a": a, "b": b}, y
    tangents = {"a": torch.randn(3), "b": torch.randn(3)}, torch.randn(3)
    torch.testing.assert_close(ik.jvp(func, primals, tangents), torch.func.jvp(func, primals, tangents))


def test_aux_is_handed_on_without_tangents():
    def func(x):
        return x.sin(), {"triple": x * 3, "name": "x"}

    _, y_dot, aux = ik.jvp(func, (X,), (X_DOT,), has_aux=True)
    torch.testing.assert_close(y_dot, X.cos() * X_DOT)
    assert aux["name"] == "x"
    torch.testing.assert_close(aux["triple"], X * 3)
    assert torch.autograd.forward_ad.unpack_dual(aux["triple"]).tangent is None


def test_none_stands_for_no_tangent():
    def func(x, t, labels):
        return x * t[:, None] + labels[:, None]

    primals = torch.full((2, 3), 3.0), torch.ones(2), torch.arange(2)
    _, y_dot = ik.jvp(func, primals, (None, torch.ones(2), None))
    assert torch.equal(y_dot, torch.full((2, 3), 3.0))


def test_an_output_that_does_not_move_has_a_tangent_of_zeros():
    (_, count), (_, count_dot) = ik.jvp(lambda x: (x, (x > 0).sum()), (X,), (X_DOT,))
    assert count_dot == 0 and count_dot.dtype == count.dtype
    _, y_dot = ik.jvp(lambda x: torch.ones(3), (X,), (X_DOT,))
    assert torch.equal(y_dot, torch.zeros(3))
    with pytest.raises(RuntimeError, match="strict=True every output must depend"):
        ik.jvp(lambda x: torch.ones(3), (X,), (X_DOT,), strict=True)


def test_detach_drops_a_tangent():
    _, y_dot = ik.jvp(lambda x: x.detach() * x, (X,), (X_DOT,))
    torch.testing.assert_close(y_dot, X * X_DOT)


def test_modules_that_insist_on_a_tensor_get_one():
    def func(x):
        assert torch.is_tensor(x) and type(x) is torch.Tensor
        return x * 2

    assert torch.equal(ik.jvp(func, (X,), (X_DOT,))[1], X_DOT * 2)


def test_gradients_reach_inputs_and_weights_and_no_tangent():
    block, x = Block(), X.clone().requires_grad_()
    y, y_dot = ik.jvp(block, (x,), (X_DOT,))
    (y * y_dot.detach()).sum().backward()
    wanted = torch.autograd.grad((block(x) * y_dot.detach()).sum(), [x, *block.parameters()])
    for got, grad in zip([x.grad, *(p.grad for p in block.parameters())], wanted, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)


def test_differentiating_a_tangent_is_loud():
    _, y_dot = ik.jvp(Block(), (X,), (X_DOT,))
    with pytest.raises(RuntimeError, match=r"backward reached a tangent.*Call .detach\(\)"):
        y_dot.sum().backward()


def test_no_graph_of_a_tangent_is_kept():
    """In the middle of the network: nothing that a tangent was computed from outlives the call."""
    tangents = []

    def func(x):
        y = F.conv1d(x, weight).tanh()
        tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
        return y.exp()

    weight = torch.randn(6, 6, 3, requires_grad=True)
    ik.jvp(func, (X,), (X_DOT,))
    assert not tangents[0].requires_grad and tangents[0].grad_fn is None


def test_the_arguments_are_left_as_they_are():
    x, x_dot = X.clone(), X_DOT.clone()
    ik.jvp(lambda x: x.clone().mul_(2), (x,), (x_dot,))
    assert torch.equal(x, X) and torch.equal(x_dot, X_DOT)
    assert torch.autograd.forward_ad.unpack_dual(x).tangent is None


def test_a_parameter_may_have_the_tangent():
    layer = nn.Linear(16, 5)
    w_dot = torch.randn(5, 16)

    def func(weight):
        return torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (X,))

    y, y_dot = ik.jvp(func, (layer.weight,), (w_dot,))
    torch.testing.assert_close(y_dot, X @ w_dot.T)
    torch.testing.assert_close(y, layer(X))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


@torch.library.custom_op("imf_kernels_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (Twice.apply, "jvp"),
        (twice, "imf_kernels_tests::twice has no forward-mode rule"),
        (torch.ops.imf_kernels_tests.twice, "imf_kernels_tests::twice has no forward-mode rule"),
        (lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[x[None]] * 3)[0], "flash"),
        (lambda x: torch.cdist(x, x, p=1.0), r"cdist has no forward-mode rule in PyTorch"),
        (lambda x: torch.special.bessel_j0(x), r"torch\.special\.bessel_j0 has no derivative in PyTorch"),
    ],
    ids=["autograd.Function", "custom_op", "torch.ops", "flash", "cdist", "bessel_j0"],
)
def test_what_has_no_forward_rule_says_so(func, says):
    with pytest.raises((NotImplementedError, RuntimeError), match=says):
        ik.jvp(func, (X,), (X_DOT,))


def _distances(mode):
    return lambda x: torch.cdist(x, 2 * x.flip(1)[:, :4] + 1, compute_mode=mode)


@pytest.mark.parametrize(
    "func",
    [
        *map(_distances, ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")),
        lambda x: torch.cdist(x.reshape(-1, 16), torch.ones(30, 16, dtype=x.dtype)),
        *(
            lambda x, layer=layer: copy.deepcopy(layer).to(x.dtype)(x)[0]
            for layer in (
                nn.LSTM(16, 5, 2, bidirectional=True),
                nn.LSTM(16, 5, batch_first=True),
                nn.GRU(16, 5),
            )
        ),
    ],
    ids=["cdist by mm", "cdist", "cdist of many", "lstm", "lstm, batch first", "gru"],
)
def test_distances_and_recurrent_layers(func):
    x, x_dot, step = X.double(), X_DOT.double(), 1e-6
    wanted = (func(x + step * x_dot) - func(x - step * x_dot)) / (2 * step)
    y, y_dot = ik.jvp(func, (X,), (X_DOT,))
    torch.testing.assert_close(y, func(X))
    torch.testing.assert_close(y_dot.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.backends.mkldnn.enabled


def test_distance_zero():
    assert not ik.jvp(lambda x: torch.cdist(x, x.detach()), (X,), (X_DOT,))[1].diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize(
    ("primals", "tangents", "error", "says"),
    [
        ([X], (X_DOT,), TypeError, "primals must be a tuple, as in jvp.*got list"),
        ((X,), X_DOT, TypeError, "tangents must be a tuple.*got Tensor"),
        ((X,), (X_DOT, X_DOT), ValueError, "tangents must have the structure of primals"),
        ((X,), (X_DOT[1:],), ValueError, r"tangent 0 must be a \[4, 6, 16\] .* got \[3, 6, 16\]"),
        ((X,), (X_DOT.long(),), ValueError, r"floating-point tensor on cpu like its primal, got .*int64"),
        (
            (torch.arange(3),),
            (torch.arange(3),),
            TypeError,
            "primal 0 must be a floating-point tensor.*int64",
        ),
        ((X,), (1.0,), TypeError, "tangent 0 must be a tensor or None, got float"),
        ((X,), (X_DOT.clone().requires_grad_(),), ValueError, "requires grad, but no gradient flows"),
    ],
)
def test_bad_arguments(primals, tangents, error, says):
    with pytest.raises(error, match=says):
        ik.jvp(torch.sin, primals, tangents)


def test_bad_results():
    with pytest.raises(TypeError, match=r"with has_aux func must return \(output, aux\), got Tensor"):
        ik.jvp(torch.sin, (X,), (X_DOT,), has_aux=True)
    with pytest.raises(TypeError, match=r"func must return tensors, got .*float"):
        ik.jvp(lambda x: 1.0, (X,), (X_DOT,))


def test_it_does_not_nest():
    def inner(x):
        return ik.jvp(torch.sin, (x,), (X_DOT,))[1]

    with pytest.raises(RuntimeError, match="called inside another forward-mode derivative"):
        ik.jvp(inner, (X,), (X_DOT,))


def test_an_error_in_func_leaves_nothing_behind():
    def func(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ik.jvp(func, (X,), (X_DOT,))
    assert torch.equal(ik.jvp(torch.neg, (X,), (X_DOT,))[1], -X_DOT)
    assert type(torch.ones(1)) is torch.Tensor and torch.autograd.forward_ad._current_level == -1


@pytest.mark.parametrize("kind", ["bf16 weights", "autocast"])
def test_low_precision(kind):
    torch.manual_seed(2)
    block = Block(64, 2)
    x, x_dot = torch.randn(2, 20, 64), torch.randn(2, 20, 64)
    exact_block = Block(64, 2).double()
    exact_block.load_state_dict({n: p.bfloat16().double() for n, p in block.state_dict().items()})
    if kind == "bf16 weights":
        block, x, x_dot = block.bfloat16(), x.bfloat16(), x_dot.bfloat16()
    exact = theirs(exact_block, (x.double(),), (x_dot.double(),))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        results = [jvp(block, (x,), (x_dot,)) for jvp in (ik.jvp, theirs)]

    def errors(result):
        return [((a - b).norm() / b.norm()).item() for a, b in zip(result, exact, strict=True)]

    ours, pytorchs = map(errors, results)
    assert [r.dtype for r in results[0]] == [r.dtype for r in results[1]]
    assert all(a <= 1.2 * b and math.isfinite(a) for a, b in zip(ours, pytorchs, strict=True)), (
        ours,
        pytorchs,
    )


def test_gradients_accumulate():
    block = Block()
    for x, x_dot in zip(X.split(2), X_DOT.split(2), strict=True):
        y, y_dot = ik.jvp(block, (x,), (x_dot,))
        (y * y_dot.detach()).sum().backward()
    y, y_dot = ik.jvp(block, (X,), (X_DOT,))
    wanted = torch.autograd.grad((y * y_dot.detach()).sum(), list(block.parameters()))
    for p, grad in zip(block.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_part_of_the_network_runs_eagerly(caplog):
    block = Block()
    wanted = ik.jvp(block, (X,), (X_DOT,))
    compiled = torch.compile(block, backend="eager")
    compiled(X)
    caplog.set_level("INFO", "imf_kernels")
    for got, want in zip(ik.jvp(compiled, (X,), (X_DOT,)), wanted, strict=True):
        assert torch.equal(got, want)
    ik.jvp(compiled, (X,), (X_DOT,))
    assert caplog.text.count("runs eagerly what torch.compile made") == 1


def test_explain(capsys):
    calls = ik.explain(Block(), (X,), (X_DOT,))
    printed = capsys.readouterr().out
    linear = [c for c in calls if c.name == "torch.nn.functional.linear"]
    assert {c.path for c in linear} == {"imf_kernels"} and sum(c.count for c in linear) == 4
    assert next(c for c in calls if c.name == "torch.Tensor.permute").path == "PyTorch's rule"
    assert "torch.nn.functional.linear" in printed and "%" in printed


def test_explain_says_what_memory_a_call_takes():
    network = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(256, 64))
    x, x_dot = torch.randn(2, 128, 256)
    rows = {c.name.rpartition(".")[2]: c.memory for c in ik.explain(network, (x,), (x_dot,))}
    assert 2 * x.nbytes <= rows["gelu"] <= 2.1 * x.nbytes
    assert (
        x.nbytes / 2 <= rows["linear"] <= 3 * x.nbytes
    )  # two outputs of a quarter of the width, and room to work


class _Attention(torch.nn.Module):
    """Attention and a norm written out, as in older networks."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm = torch.nn.Linear(16, 48), torch.nn.RMSNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return ik.silu(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_explain_says_where_and_why(capsys):
    network = torch.nn.Sequential(_Attention(), _Attention())
    calls = {c.name: c for c in ik.explain(network, (X,), (X_DOT,))}
    printed = capsys.readouterr().out
    assert (calls["imf_kernels.silu"].path, calls["imf_kernels.silu"].count) == ("imf_kernels", 2)
    assert calls["torch.nn.functional.linear"].where == "*.qkv"
    norm = next(c for name, c in calls.items() if "rms_norm" in name)
    assert (norm.path, norm.where) == ("imf_kernels", "*.norm")
    product = next(c for name, c in calls.items() if "matmul" in name)
    assert product.path == "imf_kernels"
    assert "2 times: matmul, softmax and matmul" in printed and "2 times: x · rsqrt(mean(x²))" in printed
    assert not torch.nn.modules.module._global_forward_hooks
