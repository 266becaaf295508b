"""The gains that `imf_kernels.explain` says, compared with measured ones, on three networks of a usual size.

Times of a quiet machine: the estimate is within 30 % of what the changed network gains.
"""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from imf_kernels.advice.changes import changes
from imf_kernels.advice.record import fastest
from imf_kernels.testing.timer import side_by_side
from tests.helpers.networks import mean_flow

BATCH = 2


class TimmAttention(mean_flow.Attention):
    """With timm's flag."""

    fused_attn = False

    def forward(self, x):
        self.fused = self.fused_attn
        return super().forward(x)


class Block(mean_flow.AdaBlock):
    """With one layer more than those that `replace` knows."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn, self.drop_path = TimmAttention(width, heads), nn.Identity()


class ModulatedBlock(Block):
    def forward(self, x, c):
        modulate = ik.nn.Modulate(1e-6)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(x, shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(x, shift2, scale2))


class Norm(mean_flow.RMSNorm):
    """LLaMA's, whose name `replace` does not know here."""


Norm.__name__ = "Scale"


class FusedNorm(mean_flow.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FusedMPBlock(mean_flow.MPBlock):
    """Its products and softmax in one call."""

    def forward(self, x, c):
        heads, self.heads = self.heads, 0
        try:
            x = super().forward(x, c)
        finally:
            self.heads = heads
        if not heads:
            return x
        y = self.qkv(x).reshape(x.shape[0], heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = (t.transpose(2, 3) for t in mean_flow._normalized(y, dim=2).unbind(3))
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return mean_flow._mp_sum(x, self.proj(y.reshape(*x.shape)), t=0.3).clip_(-256, 256)


def sit():
    network = mean_flow.SiT(32, 384, 6, 4, labels=False)
    network.blocks = nn.ModuleList(Block(384, 6) for _ in range(4))
    return network, (torch.randn(BATCH, 4, 32, 32), torch.rand(BATCH))


class Unconditional(mean_flow.PMF):
    def forward(self, z, t):
        return super().forward(z, t, t, torch.full_like(t, 2), torch.zeros(len(t), dtype=torch.int64))


def lightning_dit():
    return Unconditional(64, 4, 384, 6, 4), (torch.randn(BATCH, 3, 64, 64), 0.5 + torch.rand(BATCH) / 2)


def other_names():
    network, inputs = lightning_dit()
    return becoming(mean_flow.RMSNorm, Norm)(network), inputs


def edm2(size=32):
    return mean_flow.EDM2(64), (torch.randn(BATCH, 4, size, size), torch.rand(BATCH))


def becoming(old, new):
    def change(network):
        for module in network.modules():
            if type(module) is old:
                module.__class__ = new
        return network

    return change


def fused(network):
    for module in network.modules():
        if isinstance(module, TimmAttention):
            module.fused_attn = True
    return network


def replaced(network):
    ik.nn.replace(network)
    return network


def twice(network):
    def func(z, t):
        u = network(z, t)
        with torch.no_grad():
            return u + network(z.detach(), t.detach())

    return func


CASES = {
    "SiT: replace": (sit, replaced, "imf_kernels.nn.replace"),
    "SiT: fused_attn": (sit, fused, "fused_attn = True"),
    "SiT: Modulate": (sit, becoming(Block, ModulatedBlock), "imf_kernels.nn.Modulate"),
    "LightningDiT: replace": (lightning_dit, replaced, "imf_kernels.nn.replace"),
    "LightningDiT: rms_norm": (other_names, becoming(Norm, FusedNorm), "torch.nn.functional.rms_norm"),
    "EDM2: attention": (
        lambda: edm2(64),
        becoming(mean_flow.MPBlock, FusedMPBlock),
        "torch.nn.functional.scaled_dot_product_attention",
    ),
    "EDM2: one call": (edm2, None, "call EDM2 once"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gains(case):
    make, change, advice = CASES[case]
    torch.manual_seed(0)
    network, primals = make()
    with torch.no_grad():  # zeros at the start would hide what follows them
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    network.eval()
    tangents = tuple(map(torch.randn_like, primals))
    func, other = (network, change(copy.deepcopy(network))) if change else (twice(network), network)
    if change:
        want, got = (ik.jvp(f, primals, tangents) for f in (func, other))
        for y, z in zip(got, want, strict=True):
            assert (y - z).norm() < 1e-4 * z.norm()
    run = fastest(3, func, primals, tangents)
    said = {c.what: c.gain for c in changes(func, primals, tangents, False, run)}
    (estimated,) = (gain for what, gain in said.items() if what.startswith(advice))
    forms = {name: lambda f=f: ik.jvp(f, primals, tangents) for name, f in (("was", func), ("now", other))}
    times = side_by_side(forms, rounds=7, seconds=0.01)
    rounds = zip(times["was"].rounds, times["now"].rounds, strict=True)
    measured = statistics.median(was / now for was, now in rounds)
    print(f"{case}: {estimated:.2f} times estimated, {measured:.2f} measured")
    assert measured / 1.3 < estimated < measured * 1.3
