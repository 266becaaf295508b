"""`imf_kernels.explain`: the table of calls, and the changes that it advises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from imf_kernels import dual
from imf_kernels.advice import chains, changes
from imf_kernels.advice.record import Run, fastest, repeated
from imf_kernels.testing.timer import Times
from tests.helpers import handwritten as HW
from tests.transforms.test_jvp import Block

X, X_DOT = torch.randn(2, 4, 6, 16)
C, C_DOT = torch.randn(2, 4, 1, 16)


@pytest.fixture
def faster(monkeypatch):
    """Every change of modules halves the time, and every gain is worth a line."""

    def timed(functions, **options):
        for function in functions.values():
            function()
        return {name: Times((5e-10 if name else 1e-9,) * 5) for name in functions}

    monkeypatch.setattr(changes, "side_by_side", timed)
    monkeypatch.setattr(changes, "_LEAST", 0.0)


def advice(func, primals=(X,), tangents=(X_DOT,)):
    run = fastest(1, func, primals, tangents)
    return {change.what: change for change in changes.changes(func, primals, tangents, False, run)}


def test_calls_and_their_paths(capsys):
    calls = ik.explain(Block(), (X,), (X_DOT,))
    printed = capsys.readouterr().out
    linear = [c for c in calls if c.name == "torch.nn.functional.linear"]
    assert {c.path for c in linear} == {"imf_kernels"} and sum(c.count for c in linear) == 4
    assert next(c for c in calls if c.name == "torch.Tensor.permute").path == "PyTorch's rule"
    assert "torch.nn.functional.linear" in printed and "%" in printed
    assert not any("numel" in c.name or "size" in c.name for c in calls)  # its own


def test_memory_of_a_call():
    network = nn.Sequential(nn.GELU(), nn.Linear(256, 64))
    x, x_dot = torch.randn(2, 128, 256)
    rows = {c.name.rpartition(".")[2]: c.memory for c in ik.explain(network, (x,), (x_dot,))}
    assert 2 * x.nbytes <= rows["gelu"] <= 2.1 * x.nbytes
    # Two outputs of a quarter of the width, and room to work.
    assert x.nbytes / 2 <= rows["linear"] <= 3 * x.nbytes


class OldAttention(nn.Module):
    """Attention and a norm written out, as in older networks."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(16, 48), nn.RMSNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return ik.silu(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_where_why_and_what_to_change(capsys, faster):
    network, call = nn.Sequential(OldAttention(), OldAttention()), nn.Module.__call__
    for func in (network, lambda x: network(x)):
        calls = {c.name: c for c in ik.explain(func, (X,), (X_DOT,))}
        printed = " ".join(capsys.readouterr().out.split())
        assert (calls["imf_kernels.silu"].path, calls["imf_kernels.silu"].count) == ("imf_kernels", 2)
        assert calls["torch.nn.functional.linear"].where == "*.qkv"
        norm = next(c for name, c in calls.items() if "rms_norm" in name)
        assert (norm.path, norm.where) == ("imf_kernels", "*.norm")
        product = next(c for name, c in calls.items() if "matmul" in name)
        assert product.path == "imf_kernels"
        assert "scaled_dot_product_attention(q, k, v) for 2 × softmax(q · kᵀ) · v, in *. These" in printed
        assert "torch.nn.functional.rms_norm(x, …) for 2 × x · rsqrt(mean(x²)), in *. These" in printed
        assert nn.Module.__call__ is call


def test_a_line_of_advice():
    change = changes.Change("f(x) for g(x)", "These calls take", 0.42, 0.09)
    assert change.gain == pytest.approx(1 / 0.67)
    assert str(change) == "f(x) for g(x). These calls take 42% of the time, then about 9%."
    assert str(changes.Change("a", "It takes", 0.5, 0)) == "a. It takes 50% of the time."


def rms_by_pow(x, c):
    y = x.float()
    return y * (y**2).mean(-1, keepdim=True).add(1e-6).pow(-0.5)


def attention(x, c):
    mask = torch.ones(6, 6).tril().bool()
    w = torch.einsum("bid,bjd->bij", x, x) / 4
    return torch.bmm(F.dropout(w.masked_fill(~mask, -1e9).softmax(dim=-1), 0.1, training=False), x)


def biased_attention(x, c):
    return F.softmax(torch.randn(6, 6) + (x * 0.25) @ x.mT, -1) @ x


FOUND = {
    "rms_norm": lambda x, c: HW.RMSNorm(16)(x) + c,
    "rms_norm by pow": rms_by_pow,
    "rms_norm by sqrt": lambda x, c: x / torch.sqrt(torch.square(x).mean(-1, keepdim=True) + 1e-6),
    "rms_norm by mul": lambda x, c: x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True)),
    "silu": lambda x, c: x * torch.sigmoid(x),
    "silu, reversed": lambda x, c: x.sigmoid() * x,
    "Modulate": lambda x, c: F.layer_norm(x, (16,)) * (1 + c) + c,
    "Modulate of a row": lambda x, c: HW.Modulate()(x, c[:, 0], c[:, 0]),
    "Modulate by addcmul": lambda x, c: torch.addcmul(c, F.layer_norm(x, (16,)), c + 1),
    "scaled_dot_product_attention": attention,
    "scaled_dot_product_attention, added mask": biased_attention,
}
NOT_FOUND = {
    "another x": lambda x, c: c * torch.rsqrt((x * x).mean(-1, keepdim=True)),
    "mean over tokens": lambda x, c: x * torch.rsqrt((x * x).mean(1, keepdim=True)),
    "cubes": lambda x, c: x * torch.rsqrt((x**3).mean(-1, keepdim=True).abs()),
    "used elsewhere": lambda x, c: (s := (x * x).mean(-1, keepdim=True)) + x * torch.rsqrt(s),
    "modified in between": lambda x, c: (y := x * 1).sigmoid() * y.mul_(2),
    "sigmoid of another": lambda x, c: x * c.sigmoid(),
    "2 + scale": lambda x, c: F.layer_norm(x, (16,)) * (2 + c) + c,
    "scale per token": lambda x, c: F.layer_norm(x, (16,)) * (1 + x) + c,
    "with a weight": lambda x, c: F.layer_norm(x, (16,), c[0, 0].detach()) * (1 + c) + c,
    "alpha": lambda x, c: torch.add(F.layer_norm(x, (16,)) * (1 + c), c, alpha=2),
    "softmax over queries": lambda x, c: (x @ x.mT).softmax(1) @ x,
    "no values": lambda x, c: (x @ x.mT).softmax(-1),
    "dropout": lambda x, c: F.dropout((x @ x.mT).softmax(-1), 0.1) @ x,
    "less their maximum": lambda x, c: ((y := x @ x.mT) - y.amax(-1, keepdim=True)).softmax(-1) @ x,
    "no tangent": lambda x, c: (y := x.detach()) * y.sigmoid() + x,
}


@pytest.mark.parametrize("case", FOUND)
def test_chains_found(case):
    run = Run(FOUND[case], (X, C), (X_DOT, C_DOT))
    (chain,) = chains.find(run.calls)
    assert case.split(",")[0].split(" ")[0] in chain.advice
    assert chain.inputs[0].shape[-1] == 16 and changes._seconds(chain) > 0


@pytest.mark.parametrize("case", NOT_FOUND)
def test_chains_not_found(case):
    assert not chains.find(Run(NOT_FOUND[case], (X, C), (X_DOT, C_DOT)).calls)


def test_replacements_compute_what_chains_do():
    """The replacement on the chain's own inputs, in its order."""
    for case in ("rms_norm by mul", "silu", "Modulate"):
        (chain,) = chains.find(Run(FOUND[case], (X, C), (X_DOT, C_DOT)).calls)
        inputs = (X, C[:, 0], C[:, 0])[: len(chain.inputs)]
        torch.testing.assert_close(chain.replacement(*inputs), FOUND[case](X, C), rtol=1e-4, atol=1e-5)


class TimmAttention(HW.Attention):
    """timm's flag."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.fused_attn = False

    def forward(self, x, rope=None):
        if not self.fused_attn or rope is not None:
            return super().forward(x, rope)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_modules_to_replace_are_tried_on_copies(faster):
    network = nn.Sequential(HW.RMSNorm(16), HW.SwiGLU(16, 24), TimmAttention(16, 2), nn.LayerNorm(16))
    network.register_buffer("count", torch.zeros(1))
    before, state = copy.deepcopy(network), dict(network.state_dict(keep_vars=True))
    found = advice(network)
    replaced = found["imf_kernels.nn.replace(network) swaps 1 × RMSNorm, 1 × SwiGLU, 1 × TimmAttention"]
    assert replaced.gain == pytest.approx(2)
    fused = "fused_attn = True in *, or timm.layers.set_fused_attn() before the network is made"
    assert found.keys() == {replaced.what, fused}  # and no chains inside of what they change
    assert [*map(type, network.modules())] == [*map(type, before.modules())]
    assert network[2].fused_attn is False
    now = network.state_dict(keep_vars=True)
    assert now.keys() == state.keys() and all(now[name] is x for name, x in state.items())
    run = Run(network, (X,), (X_DOT,))
    variants = changes._replaced(run), changes._fused(run)
    kinds = {type(module).__module__.rpartition(".")[0] for module in variants[0].stand_ins[network]}
    assert kinds == {"imf_kernels.nn"} and variants[1].stand_ins[network][2].fused_attn
    for variant in variants:
        other = Run(network, (X,), (X_DOT,), stand_ins=variant.stand_ins)
        assert any("scaled_dot_product" in c.name for c in other.calls)
        for got, want in zip(other.result, run.result, strict=True):
            torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-5)


def test_a_gain_shows_in_every_round(faster, monkeypatch):
    network = nn.Sequential(HW.RMSNorm(16), nn.Linear(16, 16))
    rounds = {"": (1.0,) * 5, "imf_kernels.nn.replace(network) swaps 1 × RMSNorm": (0.5, 0.5, 0.5, 0.5, 1.1)}
    monkeypatch.setattr(changes, "side_by_side", lambda f, **_: {name: Times(rounds[name]) for name in f})
    (chain,) = advice(network)
    assert chain.startswith("torch.nn.functional.rms_norm")


def test_modules_that_cannot_be_copied_or_fail(faster, caplog):
    caplog.set_level("INFO", "imf_kernels")
    network = nn.Sequential(HW.RMSNorm(16))
    network.lines = (line for line in ())
    assert all("replace" not in what for what in advice(network))
    assert "cannot be copied" in caplog.text

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.me = HW.RMSNorm(16), [self]

        def forward(self, x):
            if self.norm.__class__ is not HW.RMSNorm:
                raise ValueError("another norm")
            return self.norm(x)

    assert all("replace" not in what for what in advice(Once()))
    assert "swaps 1 × RMSNorm: another norm" in caplog.text


class Twice(nn.Module):
    def __init__(self, network, second):
        super().__init__()
        self.network, self.second = network, second

    def forward(self, x):
        return self.network(x) + self.second(self.network, x)


def no_grad(network, x):
    with torch.no_grad():
        return network(x.detach().clone())


def weights_between(network, x):
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    return network(x)


def in_place(network, x):
    return network(x.mul_(2))


@pytest.mark.parametrize(
    ("second", "network", "certain"),
    [
        (no_grad, Block(), True),
        (lambda network, x: network(x), Block(), True),
        (lambda network, x: network(x.detach()), nn.Sequential(nn.Dropout(), Block()).eval(), True),
        (lambda network, x: network(x.detach()), nn.Sequential(nn.Dropout(), Block()), False),
        (lambda network, x: network(x + 1), Block(), False),
        (lambda network, x: copy.deepcopy(network)(x), Block(), False),
        (weights_between, Block(), False),
        (in_place, Block(), False),
    ],
    ids=["no_grad", "again", "evaluation", "dropout", "inputs", "teacher", "weights", "in place"],
)
def test_a_second_call_with_the_same_inputs(faster, second, network, certain):
    twice = Twice(network, second)
    for func in (twice, lambda x: twice(x)):
        run = Run(func, (X.clone(),), (X_DOT.clone(),))
        spare = repeated(run.visits)
        assert len(spare) == certain
        said = [what for what in advice(func, (X.clone(),), (X_DOT.clone(),)) if what.startswith("call ")]
        assert len(said) == certain
    if certain:
        assert said[0].startswith("call network once") and run.calls[spare[0].calls.start :]
        assert "no gradient flows through tangents" in said[0]
        assert "no gradient flows through tangents" in dual._LOST  # the guard, in the same words


def test_of_two_calls_the_one_without_tangents_is_spare():
    twice = Twice(Block(), lambda network, x: network(x))
    twice.forward = lambda x: twice.network(x.detach()) + twice.network(x)
    run = Run(twice, (X,), (X_DOT,))
    (spare,) = repeated(run.visits)
    assert not any(x.moves for call in run.calls[spare.calls.start : spare.calls.stop] for x in call.tensors)


def test_checkpointing_where_activations_dominate(monkeypatch, capsys):
    monkeypatch.setattr(changes, "_LEAST_BYTES", 0)
    network = nn.Sequential(*(Block() for _ in range(4)))
    x, x_dot = torch.randn(2, 256, 6, 16)
    ik.explain(network, (x,), (x_dot,))
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint_fn=imf_kernels.checkpoint around *: until backward the graph keeps" in printed
    few, few_dot = x[:1], x_dot[:1]
    for func, primals, tangents in (
        (network, (few,), (few_dot,)),  # weights take more
        (torch.no_grad()(network.forward), (x,), (x_dot,)),
        (lambda x: network(x.detach()).detach() + x, (x,), (x_dot,)),
    ):
        ik.explain(func, primals, tangents)
        assert "checkpoint_fn" not in capsys.readouterr().out


def test_random_numbers_are_left_alone(capsys):
    before = torch.get_rng_state()
    ik.explain(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), (X,), (X_DOT,))
    assert torch.equal(torch.get_rng_state(), before)
