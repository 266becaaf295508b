"""Convolutions, products, softmax and the like inside `jvp`: inputs move, weights do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik

GENERATOR = torch.Generator().manual_seed(0)


def _randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


W, WIDE, B = _randn(8, 8), _randn(4, 8, 8), _randn(8)
IMAGE, VOLUME = (2, 4, 6, 8), (2, 4, 3, 4, 8)


def _of(module):
    return lambda x: torch.func.functional_call(
        module, {name: p.detach().to(x.dtype) for name, p in module.named_parameters()}, (x,)
    )


def _w(x, weight=W):
    return weight.to(x.dtype)


# A function of one tensor, that tensor's shape.
CONVOLUTIONS = {
    "conv1d": (_of(nn.Conv1d(4, 6, 3, padding=1)), (2, 4, 8)),
    "conv2d": (_of(nn.Conv2d(4, 6, 3, padding=1)), IMAGE),
    "conv2d of one sample": (_of(nn.Conv2d(4, 6, 3, padding=1)), IMAGE[1:]),
    "conv2d with stride and dilation": (_of(nn.Conv2d(4, 6, 3, 2, 2, 2, bias=False)), IMAGE),
    "conv2d, same": (_of(nn.Conv2d(4, 6, (2, 3), padding="same")), IMAGE),
    "conv2d, circular": (_of(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), IMAGE),
    "conv2d, reflect": (_of(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE),
    "conv2d, grouped": (_of(nn.Conv2d(4, 6, 3, groups=2)), IMAGE),
    "conv2d, depthwise": (_of(nn.Conv2d(4, 4, 3, groups=4)), IMAGE),
    "conv2d, channels last": (
        lambda x: CONVOLUTIONS["conv2d"][0](x.to(memory_format=torch.channels_last)), IMAGE,
    ),
    "conv2d by names": (lambda x: F.conv2d(input=x, weight=_w(x)[:, :4, None, None], bias=_w(x, B)), IMAGE),
    "conv3d": (_of(nn.Conv3d(4, 6, 3, padding=1)), VOLUME),
    "transposed 1d": (_of(nn.ConvTranspose1d(4, 6, 4, 2, 1)), (2, 4, 8)),
    "transposed 2d, grouped": (_of(nn.ConvTranspose2d(4, 6, 4, 2, 1, 1, groups=2)), IMAGE),
    "transposed 3d": (_of(nn.ConvTranspose3d(4, 6, 3, dilation=2)), VOLUME),
}  # fmt: skip
PRODUCTS = {
    "@": (lambda x: x @ _w(x), (4, 5, 8)),
    "@ of the second": (lambda x: _w(x) @ x.mT, (4, 5, 8)),
    "@ of a vector": (lambda x: x @ _w(x, B), (4, 5, 8)),
    "matmul by names": (lambda x: torch.matmul(input=x, other=_w(x)), (4, 5, 8)),
    "mm": (lambda x: torch.mm(x, mat2=_w(x)), (5, 8)),
    "bmm": (lambda x: x.bmm(_w(x, WIDE)), (4, 5, 8)),
    "mv": (lambda x: torch.mv(x, _w(x, B)), (5, 8)),
    "inner": (lambda x: torch.inner(x, _w(x)), (4, 5, 8)),
    "outer": (lambda x: torch.outer(_w(x, B), x), (8,)),
    "tensordot": (lambda x: torch.tensordot(x, _w(x, WIDE), dims=([0, 2], [0, 1])), (4, 5, 8)),
    "einsum": (lambda x: torch.einsum("bld,de->bel", x, _w(x)), (4, 5, 8)),
    "einsum of three": (lambda x: torch.einsum("bld,de,e->bl", x, _w(x), _w(x, B)), (4, 5, 8)),
    "bilinear": (lambda x: F.bilinear(x, _w(x)[:5, :4], _w(x, WIDE)[:, :, :4], _w(x, B)[:4]), (5, 8)),
    "addmm": (lambda x: torch.addmm(_w(x, B), x, _w(x), beta=0.5, alpha=2), (5, 8)),
    "addmm by names": (lambda x: torch.addmm(input=_w(x, B), mat1=_w(x)[:5], mat2=x), (8, 8)),
    "addmm, input alone": (lambda x: torch.addmm(x, _w(x)[:5], _w(x), beta=3), (8,)),
    "addmm, input times 0": (lambda x: x.addmm(_w(x)[:5], _w(x), beta=0), (8,)),
    "baddbmm": (lambda x: torch.baddbmm(x[:, :1], x, _w(x, WIDE), alpha=2), (4, 5, 8)),
    "addbmm": (lambda x: torch.addbmm(_w(x, B), x, _w(x, WIDE), beta=2), (4, 5, 8)),
    "addmv": (lambda x: torch.addmv(x[:, 0], x, _w(x, B)), (5, 8)),
    "addr": (lambda x: torch.addr(_w(x), x, _w(x, B), beta=2, alpha=3), (8,)),
}
BOTH = {
    "@, both": (lambda x: x @ x.mT, (4, 5, 8)),
    "einsum, both": (lambda x: torch.einsum("bld,bmd->blm", x, x.sin()), (4, 5, 8)),
    "bilinear, both": (lambda x: F.bilinear(x, x.sin(), _w(x, WIDE)), (5, 8)),
    "baddbmm, all": (lambda x: torch.baddbmm(x.sum(2, keepdim=True), x, x.mT, beta=2, alpha=0.5), (4, 5, 8)),
    "addr, both": (lambda x: torch.addr(x.sum(), x, x.sin()), (8,)),
}
NORMALIZED = {
    "softmax": (lambda x: x.softmax(-1), (4, 5, 8)),
    "softmax along 1": (lambda x: F.softmax(x, dim=1), (4, 5, 8)),
    "softmax of a dtype": (lambda x: torch.softmax(x, -1, dtype=torch.float64), (4, 5, 8)),
    "softmax, masked": (lambda x: x.masked_fill(_w(x)[:5] > 0.5, -torch.inf).softmax(-1), (4, 5, 8)),
    "softmax, transposed": (lambda x: F.softmax(x.mT, -1), (4, 5, 8)),
    "log_softmax": (lambda x: F.log_softmax(x, dim=-1), (4, 5, 8)),
    "log_softmax along 1": (lambda x: x.log_softmax(1), (4, 5, 8)),
    "normalize": (F.normalize, (4, 5, 8)),
    "normalize along the last": (lambda x: F.normalize(x, dim=-1, eps=1e-6), (4, 5, 8)),
    "normalize, short": (lambda x: F.normalize(x, dim=-1, eps=3.0), (4, 5, 8)),
}
CASES = {**CONVOLUTIONS, **PRODUCTS, **BOTH, **NORMALIZED}
EVERY = pytest.mark.parametrize(("function", "shape"), CASES.values(), ids=CASES)


def _data(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


@EVERY
def test_as_pytorch_differentiates(function, shape):
    x, x_dot = _data(shape)
    x.requires_grad_()
    y, y_dot = ik.jvp(function, (x,), (x_dot,))
    assert torch.equal(y, function(x))
    if function is not PRODUCTS["addbmm"][0]:  # PyTorch has no rule
        torch.testing.assert_close(y_dot.detach(), torch.func.jvp(function, (x,), (x_dot,))[1].detach())
    back, wanted = (torch.autograd.grad((z * y_dot.detach()).sum(), x)[0] for z in (y, function(x)))
    assert torch.equal(back, wanted)
    # Gradient and tangent are one derivative.
    torch.testing.assert_close((back * x_dot).sum(), y_dot.detach().square().sum())


@pytest.mark.parametrize("cases", [CONVOLUTIONS, PRODUCTS, {**BOTH, **NORMALIZED}])
def test_in_a_graph(cases):
    torch._dynamo.reset()
    data = {name: _data(shape) for name, (_, shape) in cases.items()}

    def step(data):
        return {name: ik.jvp(cases[name][0], (x,), (x_dot,)) for name, (x, x_dot) in data.items()}

    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(data), step(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_autocast_leaves_the_primal(function, shape, dtype):
    x, x_dot = _data(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = function(x)
        y, y_dot = ik.jvp(function, (x,), (x_dot,))
    assert torch.equal(y, wanted)
    assert y_dot.dtype == wanted.dtype


class _Count(TorchDispatchMode):
    """Counter of products."""

    NAMES = ("convolution", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "_trilinear")

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def _products(call):
    with _Count() as count:
        call()
    return count.products


@pytest.mark.parametrize(
    ("function", "shape", "most"),
    [
        *((*case, 2) for name, case in {**CONVOLUTIONS, **PRODUCTS}.items() if "input" not in name),
        (*BOTH["baddbmm, all"], 3),
        (*BOTH["bilinear, both"], 3),
    ],
)
def test_no_needless_product(function, shape, most):
    x, x_dot = _data(shape)
    x.requires_grad_()
    assert _products(lambda: ik.jvp(function, (x,), (x_dot,))) <= most * max(
        1, _products(lambda: function(x))
    )


def test_multi_head_attention_in_a_graph_runs_on_the_operations():
    torch._dynamo.reset()
    module, targets = nn.MultiheadAttention(16, 4, batch_first=True), []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def step(x, x_dot):
        return ik.jvp(lambda x: module(x, x, x, need_weights=False)[0], (x,), (x_dot,))

    torch.compile(step, backend=backend, fullgraph=True)(*_data((2, 6, 16), torch.float32))
    for target, times in {"linear": 2, "scaled_dot_product_attention": 1}.items():
        assert targets.count(f"imf_kernels.{target}.default") == times


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_arguments_that_pytorch_does_not_know(name):
    operands = (W[0],) if name == "addmm" else ()
    with pytest.raises(TypeError, match="scale"):
        ik.jvp(lambda x: getattr(torch, name)(*operands, x, W, scale=2), (W,), (W,))


def test_weights_that_move():
    def function(x, weight, bias):
        return F.conv1d(x, weight, bias) + F.bilinear(x, x, weight.mT[:, :6].mT[:6], bias[:6]).sum()

    primals = _randn(2, 6, 6), _randn(6, 6, 6), _randn(6)
    tangents = _randn(2, 6, 6), _randn(6, 6, 6), _randn(6)
    torch.testing.assert_close(
        ik.jvp(function, primals, tangents), torch.func.jvp(function, primals, tangents)
    )


@pytest.mark.parametrize(
    "options",
    [{"need_weights": False}, {}, {"average_attn_weights": False}, {"attn_mask": "causal"}],
    ids=str,
)
@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ({}, "eager"),
        ({"kdim": 8, "vdim": 8, "add_bias_kv": True}, "eager"),
        pytest.param({}, "compiled", marks=pytest.mark.slow),
        pytest.param({"kdim": 8, "vdim": 8, "add_bias_kv": True}, "compiled", marks=pytest.mark.slow),
    ],
)
def test_multi_head_attention(arguments, options, how):
    """PyTorch's own program, whose products and attention are ours."""
    torch._dynamo.reset()
    module = nn.MultiheadAttention(16, 4, batch_first=True, **arguments)
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.full((6, 6), -torch.inf).triu(1)

    def function(x):
        memory = x[..., :8] if arguments else x
        return [y for y in module(x, memory, memory, **options) if isinstance(y, Tensor)]

    x, x_dot = _data((2, 6, 16), torch.float32)

    def step(x, x_dot):
        return ik.jvp(function, (x,), (x_dot,))

    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(function, (x,), (x_dot,))
    if how == "compiled":
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(x, x_dot), wanted, rtol=1e-4, atol=1e-5)
