"""Norms of channels inside `imf_kernels.jvp`: what PyTorch derives in float64, under the error rule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from imf_kernels.testing import errors
from imf_kernels.transforms import rules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def no_graphs_yet():
    torch._dynamo.reset()


W, B = torch.linspace(0.5, 1.5, 12), torch.linspace(-1, 1, 12)
MEAN, VAR = torch.linspace(-0.5, 0.5, 12), torch.linspace(0.5, 2, 12)


def _cast(x, *tensors):
    """Copies in x's dtype: running statistics change."""
    return [t.to(x.dtype, copy=True) for t in tensors]


NORMS = {
    "group_norm": lambda x: F.group_norm(x, 3, *_cast(x, W, B)),
    "group_norm without weights": lambda x: F.group_norm(x, 4),
    "group_norm, eps": lambda x: F.group_norm(x, 2, *_cast(x, W), None, 0.1),
    "instance_norm": lambda x: F.instance_norm(x, None, None, *_cast(x, W, B)),
    "instance_norm of running statistics": lambda x: F.instance_norm(
        x, *_cast(x, MEAN, VAR, W, B), use_input_stats=False
    ),
    "instance_norm, tracking": lambda x: F.instance_norm(x, *_cast(x, MEAN, VAR, W, B)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, *_cast(x, W, B), training=True),
    "batch_norm without weights": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm, tracking": lambda x: F.batch_norm(x, *_cast(x, MEAN, VAR, W, B), training=True),
    "batch_norm of running statistics": lambda x: F.batch_norm(x, *_cast(x, MEAN, VAR, W, B)),
    "batch_norm of running statistics, no weights": lambda x: F.batch_norm(x, *_cast(x, MEAN, VAR)),
    "layer_norm over two dimensions": lambda x: F.layer_norm(x, x.shape[-2:]),
    "layer_norm over all, weights": lambda x: F.layer_norm(x, x.shape[1:], _like_sample(x), -_like_sample(x)),
    "rms_norm of default eps": lambda x: F.rms_norm(x, x.shape[-1:]),
    "rms_norm over two dimensions": lambda x: F.rms_norm(x, x.shape[-2:], None, 1e-5),
    "rms_norm over all, weights": lambda x: F.rms_norm(x, x.shape[1:], _like_sample(x), 1e-5),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "half of the channels": lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
}
SHAPES = {"sequence": (3, 12, 10), "image": (3, 12, 5, 6), "volume": (2, 12, 2, 3, 4)}


def _like_sample(x):
    return torch.linspace(0.5, 1.5, x[0].numel(), dtype=x.dtype).view(x.shape[1:])


def draw(*shape, offset=0.0):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator) + offset, torch.randn(shape, generator=generator)


def _pytorchs_jvp(function, primals, tangents):
    """Of contiguous tensors: PyTorch's rule of group_norm fails on others."""
    contiguous = [[t.contiguous() for t in tensors] for tensors in (primals, tangents)]
    return torch.func.jvp(function, *map(tuple, contiguous))


def check(name, function, x, x_dot, exact_function=None, transform=lambda f: f):
    """Primal, tangent and gradient by `ik.jvp`, against torch.func.jvp and autograd in float64."""
    dy = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape)

    def results(jvp, function, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        y, y_dot = jvp(function, (leaf,), (x_dot.to(dtype),))
        (dx,) = torch.autograd.grad(y, leaf, dy.to(y.dtype).view(y.shape))
        return {"primal": y.detach(), "tangent": y_dot.detach(), "gradient": dx}

    exact = results(_pytorchs_jvp, exact_function or function, torch.float64)
    plain = results(_pytorchs_jvp, exact_function or function, torch.float32)
    got = results(transform(ik.jvp), function, x.dtype)
    for what, value in got.items():
        yardstick = errors.Yardstick.of(plain[what], exact[what])
        errors.check(f"{name}, {what}", value, exact[what], yardstick)
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, layout, shape):
    x, x_dot = (LAYOUTS[layout](t) for t in draw(*SHAPES[shape]))
    got = check(norm, NORMS[norm], x, x_dot)
    assert "rms_norm" in norm or got["primal"].stride() == NORMS[norm](x).stride()


@pytest.mark.parametrize(
    "norm", ["group_norm", "instance_norm", "batch_norm", "batch_norm of running statistics"]
)
def test_norms_of_values_with_an_offset(norm):
    check(norm, NORMS[norm], *draw(3, 12, 40, 41, offset=100.0))


def compiled(jvp):
    def run(function, primals, tangents):
        call = torch.compile(
            lambda x, x_dot: jvp(function, (x,), (x_dot,)), backend="aot_eager", fullgraph=True
        )
        return call(*primals, *tangents)

    return run


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(name, marks=() if name == "group_norm" else pytest.mark.slow)
        for name in NORMS
        if "tracking" not in name
    ],
)
def test_norms_compiled(norm):
    check(norm, NORMS[norm], *draw(*SHAPES["image"]), transform=compiled)


@pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(12, momentum=0.3), nn.InstanceNorm2d(12, track_running_stats=True)], ids=str
)
def test_running_statistics_are_updated_once(norm, compiling):
    wanted, got = copy.deepcopy(norm), copy.deepcopy(norm)
    x, x_dot = draw(*SHAPES["image"], offset=3.0)
    wanted(x)
    (compiled(ik.jvp) if compiling else ik.jvp)(got, (x,), (x_dot,))
    assert norm.state_dict().keys() == got.state_dict().keys()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value)


def _group_norm_of_bf16(x):
    return F.group_norm(x, 3, *(t.double() if x.dtype == torch.float64 else t for t in (W, B)))


def test_bf16_with_weights_in_fp32():
    x, x_dot = (t.bfloat16() for t in draw(*SHAPES["image"]))
    got = check("group_norm", _group_norm_of_bf16, x, x_dot)
    assert got["primal"].dtype == got["tangent"].dtype == torch.bfloat16


@pytest.mark.parametrize("widens", [False, True])
def test_group_norm_under_autocast(widens, monkeypatch):
    """Its dtype is that of PyTorch's: bf16 on CPUs, fp32 on GPUs."""
    if widens:
        monkeypatch.setattr(rules, "_autocast_widens_group_norm", lambda device: True)
    x, x_dot = draw(*SHAPES["image"])
    weight = torch.linspace(-1, 1, 144).view(12, 12, 1, 1)

    def function(x):
        return F.group_norm(F.conv2d(x, weight), 3, W, B)

    with torch.autocast("cpu", torch.bfloat16):
        y, y_dot = ik.jvp(function, (x,), (x_dot,))
        assert y.dtype == y_dot.dtype == (torch.float32 if widens else function(x).dtype)
    exact, exact_dot = torch.func.jvp(function, (x,), (x_dot,))
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05)
    torch.testing.assert_close(y_dot.float(), exact_dot, rtol=0, atol=0.1)


def test_calls_that_pytorch_refuses():
    """PyTorch's own errors, as without tangents."""
    x, one = torch.randn(2, 12, 3), torch.randn(1, 12, 1)
    for call, given in (
        (lambda x: F.group_norm(x, 5), x),
        (lambda x: F.group_norm(x, 3, W[:3]), x),
        (lambda x: F.group_norm(x, 12), one),
        (lambda x: F.instance_norm(x), one),
        (lambda x: F.instance_norm(x, use_input_stats=False), x),
        (lambda x: F.batch_norm(x, None, None, training=True), one),
        (lambda x: F.batch_norm(x, None, None, training=True, eps=0.0), x),
        (lambda x: F.batch_norm(x, MEAN[:3], VAR[:3]), x),
        (lambda x: F.rms_norm(x, (4,)), x),
        (lambda x: F.rms_norm(x, (12, 3), W), x),
    ):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            call(given)
        with pytest.raises(type(wanted.value)) as got:
            ik.jvp(call, (given,), (given,))
        assert str(got.value) == str(wanted.value)


class Block(nn.Module):
    """A residual block of a U-Net, with a time embedding."""

    def __init__(self, channels=24):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(n, channels) for n in (8, 4))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(1, 2 * channels)

    def forward(self, x, t):
        scale, shift = self.time(t[:, None])[..., None, None].chunk(2, 1)
        h = self.convolutions[0](F.silu(self.norms[0](x)))
        h = self.norms[1](h) * (1 + scale) + shift
        return x + self.convolutions[1](F.silu(h))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("how", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_of_a_unet(how, memory_format):
    torch.manual_seed(0)
    block = Block().to(memory_format=memory_format)
    x, x_dot = (t.contiguous(memory_format=memory_format) for t in torch.randn(2, 3, 24, 12, 12))
    t, t_dot, dy = torch.rand(3), torch.ones(3), torch.randn(3, 24, 12, 12)

    def results(jvp, block, dtype):
        block = copy.deepcopy(block).to(dtype)
        primals, tangents = ([t.to(dtype) for t in tensors] for tensors in ((x, t), (x_dot, t_dot)))
        y, y_dot = jvp(block, tuple(primals), tuple(tangents))
        y.backward(dy.to(dtype))
        gradients = {name: p.grad for name, p in block.named_parameters()}
        return {"primal": y.detach(), "tangent": y_dot.detach(), **gradients}

    def inductor(function, primals, tangents):
        return torch.compile(lambda p, d: ik.jvp(function, p, d), fullgraph=True)(primals, tangents)

    contiguous = copy.deepcopy(block).to(memory_format=torch.contiguous_format)
    exact = results(_pytorchs_jvp, contiguous, torch.float64)
    plain = results(_pytorchs_jvp, contiguous, torch.float32)
    got = results(ik.jvp if how == "eager" else inductor, block, torch.float32)
    for name, value in got.items():
        errors.check(name, value, exact[name], errors.Yardstick.of(plain[name], exact[name]))
