"""Train with the derivative of a plain PyTorch network: `torch.func.jvp` compared with `imf_kernels.jvp`.

Prints the relative errors against float64, the time and the peak tensor memory of a training step on the CPU:
lower is better for every number. Run it by `python examples/quickstart.py`.
"""

import argparse
import copy
import functools
import itertools
import timeit

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import imf_kernels as ik


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, width, depth, heads=6):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, z, t):
        c = self.time(t[:, None])
        return functools.reduce(lambda x, block: block(x, c), self.blocks, z)


def training_step(jvp, network, z, t, v):
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that torch.func.jvp has a rule for
        u, du_dt = jvp(network, (z, t), (v, torch.ones_like(t)))  # the line that changes
    (u + t[:, None, None] * du_dt.detach() - v).square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.zero_grad()
    return u.detach(), du_dt.detach(), gradient


def peak_memory(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
for name, default in {"batch": 4, "tokens": 256, "width": 384, "depth": 4}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
a = parser.parse_args()

network = DiT(a.width, a.depth)
z, v = torch.randn(2, a.batch, a.tokens, a.width)
t = torch.rand(a.batch)
exact = training_step(torch.func.jvp, copy.deepcopy(network).double(), z.double(), t.double(), v.double())
print(f"{'':16}{'u':>9}{'du/dt':>9}{'gradient':>9}{'time':>9}{'memory':>10}")
for name, jvp in ("torch.func.jvp", torch.func.jvp), ("imf_kernels.jvp", ik.jvp):
    step = functools.partial(training_step, jvp, network, z, t, v)
    errors = [(got - true).norm() / true.norm() for got, true in zip(step(), exact, strict=True)]
    seconds, peak = min(timeit.repeat(step, number=1, repeat=5)), peak_memory(step)
    print(f"{name:16}{''.join(f'{e:9.1e}' for e in errors)}{seconds:7.2f} s{peak / 2**20:6.0f} MiB")
