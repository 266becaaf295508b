"""Networks of other people, unmodified, with random weights, at sizes of one's choice.

A factory returns the network and a function from it (or a copy of it in another dtype) to a function of z
[B, 4, size, size] and t [B].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from benchmarks.baselines import written

Network = tuple[nn.Module, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]]
TEXT = 7  # tokens of text


def dit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    """Class-conditional, adaLN-zero."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, num_layers=layers,
        sample_size=size, num_embeds_ada_norm=10,
    )  # fmt: skip
    labels = torch.arange(batch) % 10
    return network, lambda net: lambda z, t: net(z, timestep=t, class_labels=labels).sample


def unet(batch=2, size=8, heads=2, head_dim=8, layers=1) -> Network:
    """Convolutions, GroupNorm, attention blocks; asks torch.is_tensor(timestep)."""
    width = heads * head_dim
    network = diffusers.UNet2DModel(
        sample_size=size, in_channels=4, out_channels=4, block_out_channels=(width, 2 * width),
        layers_per_block=layers, norm_num_groups=8, attention_head_dim=head_dim,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return network, lambda net: lambda z, t: net(z, t).sample


def _texts(net: nn.Module, *texts: Tensor) -> tuple[Tensor, ...]:
    return tuple(text.to(next(net.parameters()).dtype) for text in texts)


def sd3(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    """Text to image: joint attention of two streams."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=size, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=24, caption_projection_dim=heads * head_dim,
        pooled_projection_dim=20, out_channels=4, pos_embed_max_size=size,
    )  # fmt: skip
    text, pooled = torch.randn(batch, TEXT, 24), torch.randn(batch, 20)

    def of(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        texts = _texts(net, text, pooled)
        return lambda z, t: net(z, *texts, t).sample

    return network, of


def flux(batch=2, size=8, heads=2, head_dim=16, layers=1) -> Network:
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(head_dim // 4, head_dim // 4, head_dim // 2),
    )  # fmt: skip
    text, pooled, text_ids = torch.randn(batch, TEXT, 24), torch.randn(batch, 20), torch.zeros(TEXT, 3)
    positions = torch.arange(float(size // 2))
    image_ids = torch.cartesian_prod(torch.zeros(1), positions, positions)

    def of(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        texts, ids = _texts(net, text, pooled), _texts(net, image_ids, text_ids)

        def call(z: Tensor, t: Tensor) -> Tensor:
            tokens = z.flatten(2).transpose(1, 2).reshape(batch, size * size // 4, 16)
            return net(tokens, *texts, t, *ids).sample

        return call

    return network, of


def vit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    width = heads * head_dim
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
        image_size=size, patch_size=2, num_channels=4,
    )  # fmt: skip
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
    def __init__(self, size: int, width: int, heads: int, depth: int):
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.register_buffer("positions", torch.randn(1, size * size // 4, width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, z, t):
        angle = t[:, None] * torch.exp(-torch.arange(8, dtype=t.dtype))
        c = self.time(torch.cat([angle.cos(), angle.sin()], dim=-1))
        x = self.patches(z).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        side = z.shape[-1] // 2
        return torch.einsum("nhwpqc->nchpwq", self.out(x).reshape(-1, side, side, 2, 2, 4)).reshape(z.shape)


def authors_dit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    return DiT(size, heads * head_dim, heads, layers), lambda net: net


NETWORKS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (dit, unet, sd3, flux, vit, authors_dit)}


def made(name: str, batch: int = 2, size: int = 8, **shape: int) -> Any:
    """The network in evaluation mode, its function, primals and tangents, all functions of the arguments."""
    torch.manual_seed(0)
    network, of = (NETWORKS | written.NETWORKS)[name](batch=batch, size=size, **shape)
    with torch.no_grad():  # zeros at the start would hide what follows them
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network.eval()
    inputs = torch.randn(batch, 4, size, size), torch.rand(batch)
    return network, of, inputs, (torch.randn(batch, 4, size, size), torch.ones(batch))
