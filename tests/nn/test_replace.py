"""`imf_kernels.nn.replace`: what it swaps, what it leaves alone and why, and what it keeps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import imf_kernels as ik
from imf_kernels.dual import Dual, unpack
from imf_kernels.testing import errors
from tests.helpers import handwritten as HW
from tests.helpers.networks import made

SWAPPED = {
    "sit": {"AdaLNBlock": 2, "Attention": 2, "LayerNorm": 5},
    "mf_dit": {"AdaLNBlock": 2, "Attention": 2, "LayerNorm": 9},
    "u_vit": {"Attention": 3, "LayerNorm": 7},
    "pmf": {"RMSNorm": 9, "SwiGLU": 2},
    "unet": {"GroupNorm": 12},
    "edm2": {},
}


def counts(swaps):
    now = [swap.now for swap in swaps if swap.now]
    return {name: now.count(name) for name in now}


@pytest.mark.parametrize("name", SWAPPED)
def test_networks_keep_outputs_tangents_and_gradients(name):
    def results(case, jvp, dtype):
        moving = tuple(x.to(dtype) for x in case.moving)
        generator = torch.Generator().manual_seed(1)
        tangents = tuple(torch.randn(x.shape, generator=generator).to(dtype) for x in moving)
        torch.manual_seed(2)  # of dropout
        y, y_dot = jvp(case.function(case.module, dtype), moving, tangents)
        y.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in case.module.parameters() if p.grad is not None])
        return y.detach(), y_dot.detach(), gradient

    case, plain, double = made(name), made(name), made(name)
    state = {key: value.clone() for key, value in case.module.state_dict().items()}
    assert counts(ik.nn.replace(case.module)) == SWAPPED[name]
    assert state.keys() == case.module.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in case.module.state_dict().items())
    double.module.double()
    exact = results(double, ik.jvp, torch.float64)
    near, got = (results(c, ik.jvp, torch.float32) for c in (plain, case))
    for what, y, z, true in zip(("primal", "tangent", "gradient"), got, near, exact, strict=True):
        errors.check(f"{name}: {what}", y, true, errors.Yardstick.of(z, true))


class WeightPlusOne(HW.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class OtherEpsRMSNorm(HW.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class GateLastSwiGLU(HW.SwiGLUFFN):
    def forward(self, x):
        up, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class DropoutSwiGLU(HW.SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class LayerNorm32(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class ScaleFirstBlock(HW.DiTBlock):
    """Of another order of the condition's parts, which layers of zeros hide."""

    def __init__(self, *args):
        super().__init__(*args)
        nn.init.zeros_(self.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.adaLN_modulation[-1].bias)

    def forward(self, x, c):
        b, a, gate1, e, d, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(HW.Modulate()(x, a, b))
        return x + gate2.unsqueeze(1) * self.mlp(HW.Modulate()(x, d, e))


class TwoResultsAttention(HW.Attention):
    def forward(self, x):
        return super().forward(x), None


class SinkAttention(HW.Attention):
    def forward(self, x, rope=None):
        return super().forward(x, rope) + x.mean()


class OnlyHerself(HW.RMSNorm):
    def forward(self, x):
        raise ValueError("call me with a mask")


def parametrized():
    norm = HW.RMSNorm(8)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


def set_forward():
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    return norm


ALONE = {
    "weight plus one": (
        lambda: type("GemmaRMSNorm", (WeightPlusOne,), {})(8),
        "the results differ: the output",
    ),
    "another eps": (lambda: OtherEpsRMSNorm(8), "the results differ"),
    "gate last": (lambda: GateLastSwiGLU(8, 16), "the results differ"),
    "dropout in training": (lambda: DropoutSwiGLU(8, 16), "the results differ"),
    "a subclass": (lambda: LayerNorm32(8), "a subclass of torch.nn.LayerNorm"),
    "order of the condition": (lambda: ScaleFirstBlock(16, 2), "the results differ"),
    "two results": (lambda: TwoResultsAttention(16, 2), "it returns tuple, not a tensor"),
    "another formula": (lambda: SinkAttention(16, 2), "the results differ"),
    "an error": (lambda: type("RMSNorm", (OnlyHerself,), {})(8), "it cannot be called by itself: ValueError"),
    "parametrizations": (parametrized, "it has parametrizations"),
    "a forward of the object": (set_forward, "its forward was set on the object"),
    "no values": (lambda: HW.RMSNorm(8).to("meta"), "it has no values yet, on the meta device"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_is_left_alone(case, capsys):
    make, why = ALONE[case]
    network = nn.ModuleList([make()])
    before = [(type(module), {**vars(module)}.keys()) for module in network.modules()]
    swaps = ik.nn.replace(network)
    (swap,) = [swap for swap in swaps if swap.name == "0"]
    assert swap.now == "" and why in swap.why
    assert f"left alone: {why}" in capsys.readouterr().out
    after = [(type(module), {**vars(module)}.keys()) for module in network.modules()]
    assert before[0] == after[0] and before[1] == after[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "now"),
    [
        (lambda: nn.RMSNorm(8), "RMSNorm"),
        (lambda: HW.RMSNorm(8), "RMSNorm"),
        (lambda: HW.SwiGLU(8, 16), "SwiGLU"),
        (lambda: HW.SwiGLUFFN(8, 16), "SwiGLU"),
        (lambda: HW.InterleavedRope(HW.angles(6, 8)), "RotaryEmbedding"),
        (lambda: HW.HalfRope(HW.angles(6, 8)), "RotaryEmbedding"),
        (lambda: HW.ComplexRotary(HW.angles(6, 8)), "RotaryEmbedding"),
        (lambda: HW.Attention(16, 2, drop=0.1), "RopeAttention"),
        (lambda: HW.Attention(16, 2, HW.RMSNorm), "RopeAttention"),
        (lambda: HW.MaskedAttention(16, 2, norm=nn.LayerNorm), "Attention"),
        (lambda: HW.MaskedAttention(16, 2, 4, scale_norm=HW.RMSNorm, fused=False), "Attention"),
        (lambda: HW.CrossAttention(16), "CrossAttention"),
        (lambda: HW.CrossAttention(16, 12), "CrossAttention"),
        (lambda: HW.DiTBlock(16, 2), "AdaLNBlock"),
    ],
    ids=[
        *("nn.RMSNorm", "RMSNorm", "SwiGLU", "packed", "interleaved", "half", "complex", "dropout", "norms"),
        *("mask", "width of a head", "cross", "context", "block"),
    ],
)
def test_what_is_swapped(make, now, dtype):
    module = make()
    module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    kept = {**module.state_dict(keep_vars=True)}
    swaps = ik.nn.replace(module)
    assert swaps[0].name == "" and swaps[0].now == now, swaps
    assert type(module).__name__ == now and type(module).__module__.startswith("imf_kernels.nn")
    assert all(kept[name] is value for name, value in module.state_dict(keep_vars=True).items())
    assert ik.nn.replace(module) == []  # nothing is left to do
    pickle.loads(pickle.dumps(module))
    copy.deepcopy(module)


def test_a_block_after_the_parts(capsys):
    network = nn.ModuleList([HW.DiTBlock(16, 2, HW.RMSNorm) for _ in range(3)])
    rope = HW.InterleavedRope(HW.angles(6, 8))
    network.append(rope)
    plain = copy.deepcopy(network)
    x, c = torch.randn(2, 6, 16), torch.randn(2, 16)

    def run(network):
        def function(x, c):
            for block in network[:3]:
                x = block(x, c, network[3])
            return x

        return ik.jvp(function, (x, c), (x.flip(1), c.flip(1)))

    assert counts(ik.nn.replace(network)) == {
        **{"AdaLNBlock": 3, "RopeAttention": 3, "LayerNorm": 6, "RMSNorm": 6, "RotaryEmbedding": 1}
    }
    assert "3 × tests.helpers.handwritten.DiTBlock → imf_kernels.nn.AdaLNBlock" in capsys.readouterr().out
    for got, want in zip(run(network), run(plain), strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-5)


class ScaledSwiGLU(HW.SwiGLU):
    def __init__(self, dim, hidden, scale):
        super().__init__(dim, hidden)
        self._scale = scale

    def forward(self, x):
        return self._scale * super().forward(x)


class PartScaledSwiGLU(HW.SwiGLU):
    """Computes by an attribute of a part, which no repr shows."""

    def __init__(self, dim, hidden, scale):
        super().__init__(dim, hidden)
        self.rest = nn.Identity()
        self.rest.scale = scale

    def forward(self, x):
        return self.rest.scale * super().forward(x)


@pytest.mark.parametrize("kind", [ScaledSwiGLU, PartScaledSwiGLU])
def test_modules_that_look_the_same(kind):
    """A module's verdict is not another's that differs in an attribute."""
    network = nn.ModuleList([kind(8, 16, scale) for scale in (2.0, 1.0, 3.0)])
    x = torch.randn(2, 8)
    wanted = [module(x) for module in network]
    assert [swap.now for swap in ik.nn.replace(network)] == ["", "SwiGLU", ""]
    for module, want in zip(network, wanted, strict=True):
        torch.testing.assert_close(module(x), want)


class DropoutAttention(HW.Attention):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        del self.proj_drop
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


def test_a_layer_named_dropout():
    attention = DropoutAttention(16, 2).eval()
    x = torch.randn(2, 6, 16)
    wanted = attention(x)
    assert [swap.now for swap in ik.nn.replace(attention)] == ["Attention"]
    torch.testing.assert_close(attention(x), wanted, rtol=1e-4, atol=1e-5)


class BothMasksAttention(HW.MaskedAttention):
    """Adds what it is handed, also to a causal mask."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, torch.ones(x.shape[1], x.shape[1]).tril().log() if is_causal else attn_mask)


class ReversedAttention(HW.MaskedAttention):
    """Takes True for the keys that take no part."""

    def forward(self, x, attn_mask=None, is_causal=False):
        hides = attn_mask is not None and attn_mask.dtype == torch.bool
        return super().forward(x, ~attn_mask if hides else attn_mask, is_causal)


class AcausalAttention(HW.MaskedAttention):
    """Takes the flag and does not heed it."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask)


@pytest.mark.parametrize(
    ("kind", "now"), [(BothMasksAttention, "Attention"), (ReversedAttention, ""), (AcausalAttention, "")]
)
def test_masks_of_attention(kind, now):
    attention = kind(16, 2, 4)
    x, mask = torch.randn(2, 6, 16), torch.randn(2, 2, 6, 6)
    wanted = [attention(x), attention(x, mask), attention(x, is_causal=True)]
    assert [swap.now for swap in ik.nn.replace(attention)] == [now]
    for got, want in zip(
        [attention(x), attention(x, mask), attention(x, is_causal=True)], wanted, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if now:
        with pytest.raises(ValueError, match="attn_mask or is_causal"):
            attention(x, mask, True)


def test_hooks_ties_and_flags_are_kept():
    network = nn.ModuleDict({name: HW.SwiGLU(8, 16) for name in "ab"})
    network["b"].w1.weight = network["a"].w1.weight
    network["b"].eval().w2.weight.requires_grad_(False)
    seen = []
    network["a"].register_forward_hook(lambda *args: seen.append("whole"))
    network["a"].w1.register_forward_pre_hook(lambda *args: seen.append("gate"))
    random = torch.random.get_rng_state()
    swaps = ik.nn.replace(network)
    assert counts(swaps) == {"SwiGLU": 2} and not seen
    assert torch.equal(torch.random.get_rng_state(), random)
    assert network["b"].w1.weight is network["a"].w1.weight
    assert network["a"].training and not network["b"].training
    assert not network["b"].w2.weight.requires_grad
    ik.jvp(network["a"], (torch.randn(2, 8),), (torch.randn(2, 8),))
    assert seen == ["gate", "whole"]


class SwiGLUOfParts(HW.SwiGLU):
    def __init__(self, dim, hidden):
        super().__init__(dim, hidden)
        self.norm, self.drop = nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.w2(self.norm(F.silu(self.w1(x)) * self.w3(x))))


@pytest.mark.parametrize("part", ["drop", "norm"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_parts_that_are_no_longer_called(part, hook, capsys):
    """A module with such a hook is left alone; one that is added later raises, as does dropout that drops."""
    network, seen = nn.ModuleList([SwiGLUOfParts(8, 16), SwiGLUOfParts(8, 16)]), []
    getattr(network[0].get_submodule(part), hook)(lambda *args: seen.append(part))
    swaps = {swap.name: swap for swap in ik.nn.replace(network)}
    assert type(network[0]) is SwiGLUOfParts and type(network[1]) is ik.nn.SwiGLU
    assert swaps["0"].why == f"hooks of {part}, which would no longer be called" and not seen
    assert f"left alone: {swaps['0'].why}" in capsys.readouterr().out
    network[0](torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == [part]
    x = torch.randn(2, 8)
    network[1](x)
    handle = getattr(network[1].get_submodule(part), hook)(lambda *args: None)
    with pytest.raises(RuntimeError, match=f"SwiGLU: {part} is not called"):
        network[1](x)
    handle.remove()
    network[1].drop.p = 0.5
    with pytest.raises(RuntimeError, match="SwiGLU: drop is not called"):
        network[1](x)
    network[1].eval()(x)


class Tap(nn.Identity):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def test_parts_of_other_classes_are_called():
    """An Identity of somebody else's that counts, before `replace` and after it; another MLP after it."""
    x, c = torch.randn(2, 6, 16), torch.randn(2, 16)
    swiglu = SwiGLUOfParts(16, 16)
    swiglu.norm = Tap()
    assert "it calls norm, which would no longer" in ik.nn.replace(swiglu)[0].why
    block = block_with(Mlp(16, 64))
    block.mlp.norm = before = Tap()
    ik.nn.replace(block)
    assert type(block) is ik.nn.AdaLNBlock
    before.calls = 0
    block(x, c)
    block.mlp.norm = after = Tap()
    block(Dual(x, x), Dual(c, c))
    assert before.calls == after.calls == 1
    block.mlp = nn.Identity()
    want = HW.DiTBlock.forward(block, x, c)
    torch.testing.assert_close(block(x, c), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["norm1", "attn.qkv", "attn.q_norm", "mlp", "mlp.1", "adaLN_modulation"])
def test_hooks_of_parts_of_a_block_run(part, when):
    torch.manual_seed(0)
    block, (x, c) = HW.DiTBlock(16, 2, HW.RMSNorm), (torch.randn(2, 6, 16), torch.randn(2, 16))
    plain = copy.deepcopy(block)

    def scale(module, arguments, y):
        return 1.5 * y

    plain.get_submodule(part).register_forward_hook(scale)
    if when == "before":
        block.get_submodule(part).register_forward_hook(scale)
    ik.nn.replace(block)
    if when == "after":
        block.get_submodule(part).register_forward_hook(scale)
    assert type(block) is ik.nn.AdaLNBlock
    rope, bare = ik.nn.RotaryEmbedding(6, 8), HW.InterleavedRope(HW.angles(6, 8))
    want = torch.func.jvp(lambda x, c: plain(x, c, bare), (x, c), (x, c))
    for got in (
        ik.jvp(lambda x, c: block(x, c, rope), (x, c), (x, c)),
        unpack(block(Dual(x, x), Dual(c, c), rope)),
    ):
        for y, z in zip(got, want, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [3, nn.Linear, None])
def test_what_is_not_a_module(network):
    with pytest.raises(
        TypeError, match=f"replace: network must be a torch.nn.Module, got {type(network).__name__}"
    ):
        ik.nn.replace(network)


@pytest.mark.slow
def test_compiled():
    block = HW.DiTBlock(16, 2, HW.RMSNorm)
    x, c = torch.randn(2, 6, 16), torch.randn(2, 16)
    want = ik.jvp(block, (x, c), (x, c))
    ik.nn.replace(block)
    step = torch.compile(lambda x, c: ik.jvp(block, (x, c), (x, c)), fullgraph=True, backend="aot_eager")
    for y, z in zip(step(x, c), want, strict=True):
        torch.testing.assert_close(y.detach(), z.detach(), rtol=1e-4, atol=1e-5)


class Mlp(nn.Module):
    """As timm writes it."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, width), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class MlpWithASkip(Mlp):
    def forward(self, x):
        return x + super().forward(x)


def block_with(mlp):
    block = HW.DiTBlock(16, 2)
    block.mlp = mlp
    return block


def kept_bytes(block, x, c):
    """Of what backward keeps, without parameters."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ik.jvp(block, (x, c), (torch.ones_like(x), torch.ones_like(c)))
    return sum(kept[p] for p in kept.keys() - {p.untyped_storage().data_ptr() for p in block.parameters()})


@pytest.mark.parametrize("mlp", [lambda: HW.DiTBlock(16, 2).mlp, lambda: Mlp(16, 64)], ids=["layers", "timm"])
def test_a_block_keeps_no_inputs_of_layers_after_norms_and_activations(mlp):
    block, x, c = block_with(mlp()), torch.randn(2, 6, 16), torch.randn(2, 16)
    before = kept_bytes(block, x, c)
    ik.nn.replace(block)
    hidden, norms = x.numel() * 4 * 4, 2 * x.numel() * 4
    assert kept_bytes(block, x, c) <= before - hidden - norms


def test_an_mlp_that_does_more_than_its_layers_is_called():
    block, x, c = block_with(MlpWithASkip(16, 64)), torch.randn(2, 6, 16), torch.randn(2, 16)
    want = block(x, c)
    assert ik.nn.replace(block)[0].now == "AdaLNBlock"
    torch.testing.assert_close(block(x, c), want)
    by_hand = ik.nn.AdaLNBlock(block.attn, block.mlp, 16)
    by_hand.load_state_dict(block.state_dict())
    torch.testing.assert_close(by_hand(x, c), want)


@pytest.mark.parametrize(
    "name", ["mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "attn", "attn.qkv"]
)
def test_hooks_that_come_later_are_called(name):
    block, x, c = block_with(Mlp(16, 64)), torch.randn(2, 6, 16), torch.randn(2, 16)
    ik.nn.replace(block)
    calls, part = [], block.get_submodule(name)
    part.register_forward_hook(lambda *_: calls.append(name))
    ik.jvp(block, (x, c), (x, c))
    assert calls == [name]
