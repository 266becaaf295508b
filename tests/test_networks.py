"""`imf_kernels.jvp` on networks of other people, unmodified, with random weights: against float64.

Exact is the same network in float64 under PyTorch's own forward mode, and central differences. The errors in
float32 are held against those of `torch.func.jvp` in float32, with attention in its plain form.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import imf_kernels as ik

diffusers = pytest.importorskip("diffusers", reason="networks of diffusers: pip install diffusers")
transformers = pytest.importorskip(
    "transformers", reason="networks of transformers: pip install transformers"
)

B = 2


def dit():
    """Class-conditional, adaLN-zero."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    labels = torch.tensor([1, 7])
    return network, lambda net: lambda z, t: net(z, timestep=t, class_labels=labels).sample


def unet():
    """Convolutions, GroupNorm, attention blocks; asks torch.is_tensor(timestep)."""
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return network, lambda net: lambda z, t: net(z, t).sample


def sd3():
    """Text to image: joint attention of two streams."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
        out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    text, pooled = torch.randn(B, 7, 24), torch.randn(B, 20)

    def of(net):
        dtype = next(net.parameters()).dtype
        return lambda z, t: net(z, text.to(dtype), pooled.to(dtype), t).sample

    return network, of


def flux():
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text, pooled = torch.randn(B, 7, 24), torch.randn(B, 20)
    text_ids, image_ids = (
        torch.zeros(7, 3),
        torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    )

    def of(net):
        dtype = next(net.parameters()).dtype

        def call(z, t):
            tokens = z.flatten(2).transpose(1, 2).reshape(B, 16, 16)
            return net(
                tokens, text.to(dtype), pooled.to(dtype), t, image_ids.to(dtype), text_ids.to(dtype)
            ).sample

        return call

    return network, of


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=4,
    )
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    return network, lambda net: lambda z, t: net(z * t[:, None, None, None]).last_hidden_state


class Block(nn.Module):
    """adaLN-zero as the authors of DiT write it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        batch, length, width = x.shape
        q, k, v = self.qkv(y).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gate1.unsqueeze(1) * self.proj(y.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


class DiT(nn.Module):
    def __init__(self, width=32, heads=2, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.register_buffer("positions", torch.randn(1, 16, width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, z, t):
        angle = t[:, None] * torch.exp(-torch.arange(8, dtype=t.dtype))
        c = self.time(torch.cat([angle.cos(), angle.sin()], dim=-1))
        x = self.patches(z).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        return torch.einsum("nhwpqc->nchpwq", self.out(x).reshape(-1, 4, 4, 2, 2, 4)).reshape(z.shape)


def authors_dit():
    return DiT(), lambda net: net


NETWORKS = {f.__name__: f for f in (dit, unet, sd3, flux, vit, authors_dit)}


def made(name):
    torch.manual_seed(0)
    network, of = NETWORKS[name]()
    with torch.no_grad():  # zeros at the start would hide what follows them
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network.eval()
    inputs = torch.randn(B, 4, 8, 8), torch.rand(B)
    return network, of, inputs, (torch.randn(B, 4, 8, 8), torch.ones(B))


def results(jvp, network, function, primals, tangents):
    y, y_dot = jvp(function, primals, tangents)
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    return y.detach(), y_dot.detach(), torch.cat([g.flatten() for g in grads if g is not None])


def plain(function, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


def relative(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


@pytest.fixture(params=NETWORKS)
def case(request):
    return made(request.param)


def test_tangents_and_gradients(case):
    network, of, primals, tangents = case
    double = copy.deepcopy(network).double()
    in_double = tuple(x.double() for x in primals), tuple(x.double() for x in tangents)
    exact = results(ik.jvp, double, of(double), *in_double)
    ours = results(ik.jvp, network, of(network), primals, tangents)
    try:
        wanted = results(plain, double, of(double), *in_double)
        theirs = results(plain, network, of(network), primals, tangents)
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)  # torch.func.jvp of GroupNorm beside attention
        assert all(relative(got, right) < 2e-6 for got, right in zip(ours, exact, strict=True))
        return
    for got, plains, right, same in zip(ours, theirs, exact, wanted, strict=True):
        assert relative(right, same) < 1e-12
        assert relative(got, right) < 2 * relative(plains, right) + 1e-7


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"flux"}))
def test_tangents_are_central_differences(name):
    """Along z alone: networks embed times in float32, whose steps such differences would see; flux rotates
    queries and keys in it."""
    network, of, (z, t), (z_dot, _) = made(name)
    double, step = of(network.double()), 1e-6
    z, t, z_dot = z.double(), t.double(), z_dot.double()
    with torch.no_grad():
        wanted = (double(z + step * z_dot, t) - double(z - step * z_dot, t)) / (2 * step)
        assert relative(ik.jvp(double, (z, t), (z_dot, None))[1], wanted) < 1e-7


def test_no_attention_matrix(case, capsys):
    network, of, primals, tangents = case
    calls = {c.name: c for c in ik.explain(of(network), primals, tangents)}
    assert calls["torch.nn.functional.scaled_dot_product_attention"].path == "imf_kernels"
    assert calls["torch.nn.functional.linear"].path in ("imf_kernels", "no tangent")


def test_with_their_own_checkpointing():
    """diffusers' networks take the function that checkpoints their blocks."""
    network, of, primals, tangents = made("sd3")
    network.train()
    wanted = results(ik.jvp, network, of(network), primals, tangents)
    network.enable_gradient_checkpointing(ik.checkpoint)
    y, y_dot = ik.jvp(of(network), primals, tangents)
    y.square().mean().backward()
    grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    for got, want in zip((y.detach(), y_dot.detach(), grads), wanted, strict=True):
        assert relative(got, want) < 1e-6
