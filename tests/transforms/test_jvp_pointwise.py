"""Arithmetic and activations inside `jvp`: what backward keeps, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import imf_kernels as ik

WEIGHT = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) + 0.5
BOTH = {
    "sum": lambda x, w: x + w,
    "difference": lambda x, w: x - w,
    "product": lambda x, w: x * w,
    "product with a row": lambda x, w: x * w[:1],
    "quotient": lambda x, w: x / w,
    "addcmul": lambda x, w: torch.addcmul(w, x, w, value=0.5),
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("ij,ik->jk", x, w),
}
ONE = {
    "square": torch.square,
    "** 2": lambda x: x**2,
    "pow": lambda x: x.pow(2),
    "exp": torch.exp,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.Tensor.tanh,
    "relu": F.relu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}
CALLS = {
    **{f"{name}, both move": lambda x, f=f: f(x, x.t() + 1) for name, f in BOTH.items()},
    **{f"{name}, first moves": lambda x, f=f: f(x, WEIGHT) for name, f in BOTH.items()},
    **{f"{name}, second moves": lambda x, f=f: f(WEIGHT, x) for name, f in BOTH.items()},
    **ONE,
}


def saved(y):
    """Tensors that the graph behind y keeps."""
    nodes = [y.grad_fn]
    for node in nodes:  # grows
        nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            yield from value if isinstance(value, tuple) else [value]


def tangents_kept(function, x, x_dot):
    kept = []

    def call(x):
        y = function(x)
        kept.extend(
            t
            for t in saved(y)
            if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None
        )
        return y

    ik.jvp(call, (x,), (x_dot,))
    return len(kept)


@pytest.fixture
def point():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 4, generator=generator) + 0.1, torch.randn(4, 4, generator=generator)


@pytest.mark.parametrize("name", CALLS)
def test_backward_keeps_no_tangent(name, point):
    x, x_dot = point
    assert tangents_kept(CALLS[name], x.requires_grad_(), x_dot) == 0


def test_calls_of_pytorch_keep_theirs(point):
    """What the test above would see."""
    x, x_dot = point
    assert tangents_kept(torch.sin, x.requires_grad_(), x_dot)


@pytest.mark.parametrize("name", CALLS)
def test_as_without_a_tangent_and_as_pytorch(name, point):
    """The primal and its gradient bit by bit, the tangent in float64."""
    x, x_dot = point
    x.requires_grad_()
    function = CALLS[name]
    alone, (y, _) = function(x), ik.jvp(function, (x,), (x_dot,))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(y, alone)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, alone)))
    double, double_dot = x.detach().double(), x_dot.double()
    _, exact = torch.func.jvp(lambda x: function_in_double(name, x), (double,), (double_dot,))
    _, got = ik.jvp(lambda x: function_in_double(name, x), (double,), (double_dot,))
    assert ((got - exact).norm() / exact.norm()).item() < 1e-14


def function_in_double(name, x):
    kind, _, moving = name.partition(", ")
    if moving == "first moves":
        return BOTH[kind](x, WEIGHT.double())
    return BOTH[kind](WEIGHT.double(), x) if moving == "second moves" else CALLS[name](x)


ONES = [(4,), (1, 4), (1,), (1, 1, 1), ()]
WRITTEN = {
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x * c": lambda x, c: x * c,
    "x / c": lambda x, c: x / c,
    "c / x": lambda x, c: c / x,
    "x + 1": lambda x, c: x + 1,
    "x + x": lambda x, c: x + x,
    "addcmul(x, c, c)": lambda x, c: torch.addcmul(x, c, c),
    "addcmul(c, x, c)": lambda x, c: torch.addcmul(c, x, c),
    "relu(x)": lambda x, c: torch.relu(x),
    "dropout(x) in evaluation": lambda x, c: torch.nn.functional.dropout(x, training=False) + c,
}


COMPILED = [(name, shape, True) for name in ("x + c", "c - x", "x + 1") for shape in ((4,), (1, 4))]


@pytest.mark.parametrize(
    ("name", "shape", "compiled"),
    [(name, shape, False) for name in WRITTEN for shape in ONES] + COMPILED,
)
def test_a_result_that_is_written_into(name, shape, compiled):
    """Its tangent is no view of the operand's, whatever the shape of the other operand adds in front."""

    def function(x):
        y = WRITTEN[name](x, torch.ones(shape, dtype=x.dtype))
        y.mul_(3)
        return x * y

    for own in ((4,), ()):
        x, x_dot = torch.full(own, 2.0), torch.full(own, 5.0)
        want = torch.func.jvp(function, (x,), (x_dot.clone(),))[1]
        call = ik.jvp
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(ik.jvp, backend="aot_eager", fullgraph=True)
        assert torch.equal(call(function, (x,), (x_dot,))[1], want)
        assert torch.equal(x_dot, torch.full(own, 5.0))


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(2, 3),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half": lambda t: t.repeat(1, 1, 1, 2).chunk(2, -1)[1],
    "samples inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda t: t[:1].expand_as(t),
}
SERVED = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
    "sum": lambda x: x + 2 * x,
    "product": lambda x: x * x.sigmoid(),
    "softmax": lambda x: x.softmax(-1),
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "conv2d": lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1)),
    "linear": lambda x: F.linear(x, torch.ones(3, x.shape[-1])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", SERVED)
def test_results_lie_in_memory_as_pytorchs(function, layout):
    """So that `view` and channels last go on as without `jvp`."""
    generator = torch.Generator().manual_seed(0)
    x, x_dot = (LAYOUTS[layout](torch.randn(2, 4, 6, 6, generator=generator)) for _ in range(2))
    y, y_dot = ik.jvp(SERVED[function], (x,), (x_dot,))
    assert y.stride() == SERVED[function](x).stride()
    want = torch.func.jvp(SERVED[function], (x.contiguous(),), (x_dot.contiguous(),))
    torch.testing.assert_close((y, y_dot), want)
