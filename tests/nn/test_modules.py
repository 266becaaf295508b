"""Modules of `imf_kernels.nn` compared with those that they replace: state dicts, values, derivatives."""

import itertools

import pytest
import torch
from torch import nn

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.testing import errors
from tests.helpers import attention_packages, handwritten

HW = handwritten


def rope_norm(dim):
    return HW.RMSNorm(dim)


def ik_norm(dim):
    return ik.nn.RMSNorm(dim, eps=1e-6)


X, HEADS = (2, 6, 16), (2, 3, 6, 8)
# The module that is replaced, ours, and the shapes of its inputs.
CASES = {
    "RMSNorm": (lambda: nn.RMSNorm(16), lambda: ik.nn.RMSNorm(16), [X]),
    "RMSNorm of 2 dims": (lambda: nn.RMSNorm((6, 16), 1e-5), lambda: ik.nn.RMSNorm((6, 16), 1e-5), [X]),
    "RMSNorm without weight": (
        lambda: nn.RMSNorm(16, 1e-5, elementwise_affine=False),
        lambda: ik.nn.RMSNorm(16, 1e-5, elementwise_affine=False),
        [X],
    ),
    "RMSNorm by hand": (lambda: HW.RMSNorm(16), lambda: ik_norm(16), [X]),
    "LayerNorm": (lambda: nn.LayerNorm(16), lambda: ik.nn.LayerNorm(16), [X]),
    "LayerNorm of 2 dims": (lambda: nn.LayerNorm((6, 16)), lambda: ik.nn.LayerNorm((6, 16)), [X]),
    "LayerNorm without bias": (
        lambda: nn.LayerNorm(16, bias=False),
        lambda: ik.nn.LayerNorm(16, bias=False),
        [X],
    ),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), lambda: ik.nn.GroupNorm(2, 6), [X]),
    "Modulate": (HW.Modulate, ik.nn.Modulate, [X, (2, 16), (2, 16)]),
    "SwiGLU": (lambda: HW.SwiGLU(16, 24), lambda: ik.nn.SwiGLU(16, 24), [X]),
    "SwiGLU with bias": (lambda: HW.SwiGLU(16, 24, True), lambda: ik.nn.SwiGLU(16, 24, bias=True), [X]),
    "SwiGLU of two layers": (
        lambda: HW.SwiGLUFFN(16, 24),
        lambda: ik.nn.SwiGLU(16, 24, bias=True, names=("w12", "w3")),
        [X],
    ),
    "rotary, interleaved": (
        lambda: HW.InterleavedRope(HW.angles(6, 8)),
        lambda: ik.nn.RotaryEmbedding(6, 8),
        [HEADS],
    ),
    "rotary of an image": (
        lambda: HW.InterleavedRope(HW.image_angles(2, 3, 8)),
        lambda: ik.nn.RotaryEmbedding((2, 3), 8),
        [HEADS],
    ),
    "rotary, half": (
        lambda: HW.HalfRope(HW.angles(6, 8)),
        lambda: ik.nn.RotaryEmbedding(6, 8, layout="half"),
        [HEADS],
    ),
    "rotary, complex": (
        lambda: HW.ComplexRotary(HW.angles(6, 8)),
        lambda: ik.nn.RotaryEmbedding(6, 8, layout="complex"),
        [HEADS],
    ),
    "Attention": (lambda: HW.Attention(16, 2), lambda: ik.nn.Attention(16, 2, qkv_bias=True), [X]),
    "Attention with norms": (
        lambda: HW.Attention(16, 2, nn.LayerNorm),
        lambda: ik.nn.Attention(16, 2, qkv_bias=True, qk_norm=True),
        [X],
    ),
    "CrossAttention": (lambda: HW.CrossAttention(16), lambda: ik.nn.CrossAttention(16, None, 2, 8), [X]),
    "CrossAttention to a context": (
        lambda: HW.CrossAttention(16, 12),
        lambda: ik.nn.CrossAttention(16, 12, 2, 8),
        [X, (2, 5, 12)],
    ),
    "AdaLNBlock": (
        lambda: HW.DiTBlock(16, 2, rope_norm),
        lambda: ik.nn.AdaLNBlock(
            ik.nn.Attention(16, 2, qkv_bias=True, qk_norm=True, norm_layer=ik_norm),
            nn.Sequential(nn.Linear(16, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 16)),
            16,
        ),
        [X, (2, 16)],
    ),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def cast(module, dtype):
    return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def pair(case):
    theirs, ours, shapes = CASES[case]
    torch.manual_seed(0)
    theirs, ours = theirs(), ours()
    for p in theirs.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, [[torch.randn(shape) for shape in shapes] for _ in range(2)]


def results(module, inputs, tangents, way):
    """Output, its tangent, gradients of the inputs and the parameters."""
    xs = tuple(x.clone().requires_grad_() for x in inputs)
    if way == "Dual":
        y = module(*map(Dual, xs, tangents))
        y, y_dot = y.primal, y.tangent
    else:
        y, y_dot = (ik.jvp if way == "jvp" else torch.func.jvp)(module, xs, tuple(tangents))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    found = {"primal": y, "tangent": y_dot, **{f"input {i}": x.grad for i, x in enumerate(xs)}}
    found |= {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_state_dicts_interchange(case):
    theirs, ours, _ = pair(case)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, value in CASES[case][1]().state_dict().items():
        if "freqs" in name:  # tables that ours computed itself
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["jvp", "Dual"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case, way, dtype):
    """No worse than the replaced module's, by the error rule, on the same rounded numbers."""
    theirs, ours, (inputs, tangents) = pair(case)
    theirs, ours = cast(theirs, dtype), cast(ours, dtype)
    inputs, tangents = ([x.to(dtype) for x in xs] for xs in (inputs, tangents))
    got = results(ours, inputs, tangents, way)
    near = results(theirs, inputs, tangents, "torch.func.jvp")
    doubled = ([x.double() for x in xs] for xs in (inputs, tangents))
    exact, unit = results(theirs.double(), *doubled, "torch.func.jvp"), 1.0
    if dtype == torch.float64:  # in which both round as float32 does, in smaller units
        singles = ([x.float() for x in xs] for xs in (inputs, tangents))
        near = results(theirs.float(), *singles, "torch.func.jvp")
        unit = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == dtype
        error = errors.Yardstick.of(near[name], exact[name])
        errors.check(name, value, exact[name], errors.Yardstick(unit * error.whole, unit * error.row))


@pytest.mark.parametrize("case", ["RMSNorm", "LayerNorm", "Modulate", "SwiGLU", "Attention", "AdaLNBlock"])
def test_autocast(case):
    """Dtypes are PyTorch's, values within rounding."""
    theirs, ours, (inputs, tangents) = pair(case)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (
            torch.func.jvp(theirs, tuple(inputs), tuple(tangents)),
            ik.jvp(ours, tuple(inputs), tuple(tangents)),
        )
    exact = torch.func.jvp(theirs.double(), *(tuple(x.double() for x in xs) for xs in (inputs, tangents)))
    for y, z, true in zip(got, want, exact, strict=True):
        assert y.dtype == z.dtype
        errors.check(case, y, true, errors.Yardstick.of(z, true), torch.bfloat16)


class Called(nn.Module):
    """A module of other people, which `AdaLNBlock` only calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


LAYERS = {
    "linear": lambda: nn.Linear(16, 16),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "dropout": lambda: nn.Dropout(0.0),
    "norm": lambda: nn.LayerNorm(16),
}


@pytest.mark.parametrize("names", [*itertools.product(LAYERS, repeat=3)], ids=" ".join)
def test_an_mlp_of_any_layers(names):
    """Values and gradients of a block are those of the same layers called by somebody else."""
    torch.manual_seed(0)
    mlp = nn.Sequential(*(LAYERS[name]() for name in names))
    block = ik.nn.AdaLNBlock(nn.Identity(), mlp, 16)
    inputs, tangents = ([torch.randn(X), torch.randn(2, 16)] for _ in range(2))
    got = results(block, inputs, tangents, "jvp")
    block.mlp = Called(mlp)
    want = results(block, inputs, tangents, "jvp")
    for found, wanted in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(found, wanted)


PARTS = [
    pytest.param(case, name, id=f"{case}: {name or 'itself'}")
    for case in ("SwiGLU", "SwiGLU of two layers", "Attention with norms", "CrossAttention", "AdaLNBlock")
    for name in dict(CASES[case][0]().named_modules())
]


@pytest.mark.parametrize(("case", "part"), PARTS)
def test_hooks_of_parts_run(case, part):
    theirs, ours, (inputs, tangents) = pair(case)
    seen = []

    def scale(module, arguments, y):
        seen.append(module)
        return 1.5 * y

    for module in (theirs, ours):
        module.get_submodule(part).register_forward_hook(scale)
    want = results(theirs, inputs, tangents, "torch.func.jvp")
    for way in ("jvp", "Dual"):
        got = results(ours, inputs, tangents, way)
        assert seen.pop() is ours.get_submodule(part) and len(seen) == 1
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["jvp", "Dual"])
def test_weights_that_a_hook_computes(way):
    """As of the layer's parameters when it is called, not when it last was."""
    torch.manual_seed(0)
    block = CASES["AdaLNBlock"][1]()
    block.mlp[0] = nn.utils.weight_norm(block.mlp[0])
    inputs, tangents = ([torch.randn(X), torch.randn(2, 16)] for _ in range(2))
    with torch.no_grad():
        block.mlp[0].weight_g.mul_(3)
    got = results(block, inputs, tangents, way)["primal"]
    torch.testing.assert_close(got, block(*inputs).detach())


def test_hooks_of_every_module_run():
    block, seen = CASES["AdaLNBlock"][1](), set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        block(torch.randn(X), torch.randn(2, 16))
    finally:
        hook.remove()
    assert seen == {*block.modules()}


class DoublingRope(ik.nn.RotaryEmbedding):
    def forward(self, x):
        return 2 * super().forward(x)


def test_rotary_that_is_not_fused():
    """A subclass, or one with a hook, is called."""
    attention = ik.nn.Attention(16, 2, qk_norm=True, norm_layer=ik_norm)
    x, rope = torch.randn(X), ik.nn.RotaryEmbedding(6, 8)
    want = attention(x, rope=lambda t: 2 * rope(t)).detach()
    torch.testing.assert_close(attention(x, rope=DoublingRope(6, 8)), want)
    rope.register_forward_hook(lambda module, arguments, y: 2 * y)
    torch.testing.assert_close(attention(x, rope=rope), want)


def test_rotary_after_norms_is_fused():
    theirs, ours, _ = pair("AdaLNBlock")
    rope, plain = ik.nn.RotaryEmbedding(6, 8), HW.InterleavedRope(HW.angles(6, 8))
    seen = []
    x, x_dot, c, c_dot = torch.randn(2, *X).unbind() + torch.randn(2, 2, 16).unbind()
    with pytest.MonkeyPatch.context() as patch:
        from imf_kernels.nn import attention

        fused = attention.qk_norm_rope
        patch.setattr(attention, "qk_norm_rope", lambda *args: seen.append(1) or fused(*args))
        got = ik.jvp(lambda x, c: ours(x, c, rope), (x, c), (x_dot, c_dot))
    want = torch.func.jvp(lambda x, c: theirs(x, c, plain), (x, c), (x_dot, c_dot))
    assert seen
    for y, z in zip(got, want, strict=True):
        torch.testing.assert_close(y.detach(), z.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flash_attn_func_of_duals(causal):
    torch.manual_seed(0)
    primals, tangents = ([torch.randn(2, n, h, 8) for n, h in ((3, 4), (5, 2), (5, 2))] for _ in range(2))

    def formula(q, k, v):
        return attention_packages.plain(
            q, k, v, attention_packages.causal_bias(3, 5, 2, q) if causal else None, 0.3
        )

    got = ik.nn.flash_attn_func(*map(Dual, primals, tangents), softmax_scale=0.3, causal=causal)
    fp32 = torch.func.jvp(formula, tuple(primals), tuple(tangents))
    exact = torch.func.jvp(formula, *(tuple(x.double() for x in xs) for xs in (primals, tangents)))
    for value, near, true in zip((got.primal, got.tangent), fp32, exact, strict=True):
        errors.check("attention", value, true, errors.Yardstick.of(near, true))
    with pytest.raises(NotImplementedError, match=r"flash_attn_func: dropout_p=0.1 is dropout"):
        ik.nn.flash_attn_func(*primals, dropout_p=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ik.nn.RotaryEmbedding(6, 8, layout="pairs"), "layout must be .* got 'pairs'"),
        (lambda: ik.nn.RotaryEmbedding(6, 8)(torch.ones(2, 3, 5, 8)), r"x must be \[B, H, 6, 8\], got"),
        (lambda: ik.nn.SwiGLU(4, 8, names=("w1",)), r"names must be three, .* got \('w1',\)"),
        (lambda: ik.nn.Attention(10, 3), "dim must be a multiple of num_heads, got 10 and 3"),
    ],
    ids=["layout", "length", "names", "heads"],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
