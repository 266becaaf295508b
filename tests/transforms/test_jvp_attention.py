"""Attention inside `ik.jvp`: every shape and option that PyTorch's own takes runs on ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik

NAME = "torch.nn.functional.scaled_dot_product_attention"
# Shapes of query, key and value; options.
CALLS = {
    "two dimensions": ((5, 8), (7, 8), (7, 6), {}),
    "two dimensions, causal": ((5, 8), (7, 8), (7, 6), {"is_causal": True}),
    "two dimensions, mask": ((5, 8), (7, 8), (7, 6), {"attn_mask": (5, 7)}),
    "three dimensions, mask": ((3, 5, 8), (3, 7, 8), (3, 7, 6), {"attn_mask": (3, 1, 7)}),
    "five dimensions": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6), {}),
    "five dimensions, mask": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6), {"attn_mask": (3, 1, 5, 7)}),
    "keys for all samples": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6), {}),
    "queries for all samples": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), {}),
    "one head of values": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 6), {}),
    "one head of keys and values": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6), {"is_causal": True}),
    "keys of two dimensions": ((2, 3, 5, 8), (7, 8), (7, 6), {"attn_mask": (2, 1, 1, 7)}),
    "queries of two dimensions": ((5, 8), (2, 3, 7, 8), (2, 3, 7, 6), {}),
    "groups in three dimensions": ((4, 5, 8), (2, 7, 8), (2, 7, 6), {"enable_gqa": True}),
    "groups in five dimensions": ((2, 2, 4, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 6), {"enable_gqa": True}),
    "groups, keys for all samples": ((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6), {"enable_gqa": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_that_pytorch_takes(name):
    *shapes, options = CALLS[name]
    torch.manual_seed(0)
    options = {n: torch.randn(x) if n == "attn_mask" else x for n, x in options.items()}
    primals, dots = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def call(*x):
        return F.scaled_dot_product_attention(*x, **options)

    def results(jvp):
        leaves = [x.clone().requires_grad_() for x in primals]
        y, y_dot = jvp(call, tuple(leaves), tuple(dots))
        return y, y_dot.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = results(torch.func.jvp)
    for ours, theirs in zip(results(ik.jvp), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [(c.name, c.path) for c in ik.explain(call, tuple(primals), tuple(dots))] == [
        (NAME, "imf_kernels")
    ]


@pytest.mark.parametrize(
    ("query", "mask"),
    [
        ((5, 8), (1, 5, 7)),
        ((5, 8), (4, 5, 7)),
        ((3, 5, 8), (1, 3, 5, 7)),
        ((3, 5, 8), (4, 1, 1, 7)),
        ((1, 3, 5, 8), (2, 3, 5, 7)),
        ((2, 3, 5, 8), (1, 2, 3, 5, 7)),
    ],
)
def test_masks_that_do_not_broadcast_to_the_logits_are_refused(query, mask):
    """With PyTorch's words."""
    x, kv, mask = torch.randn(query), torch.randn(7, 8), torch.randn(mask)

    def call(x):
        return F.scaled_dot_product_attention(x, kv, kv, attn_mask=mask)

    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, pytest.raises(RuntimeError) as wanted:
        call(x)
    with pytest.raises(RuntimeError) as got:
        ik.jvp(call, (x,), (x,))
    assert str(got.value) == str(wanted.value)


class Block(nn.Module):
    """A causal block in the manner of language models, with fewer heads of keys and values."""

    def __init__(self, width=32, heads=4, kv_heads=4):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_causal_block_runs_on_ours(kv_heads):
    torch.manual_seed(0)
    block, (x, x_dot) = Block(kv_heads=kv_heads), torch.randn(2, 3, 20, 32)
    results = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for jvp in (ik.jvp, torch.func.jvp):
            y, y_dot = jvp(block, (x,), (x_dot,))
            gradients = torch.autograd.grad(y.square().sum(), tuple(block.parameters()))
            results.append((y.detach(), y_dot.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert {c.name: c.path for c in ik.explain(block, (x,), (x_dot,))}[NAME] == "imf_kernels"
