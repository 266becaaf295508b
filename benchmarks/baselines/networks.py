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


LIBRARIES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (dit, unet, sd3, flux, vit)}
NETWORKS = {**written.NETWORKS, **LIBRARIES}


def made(name: str, batch: int = 2, size: int = 8, **shape: int) -> Any:
    """The network in evaluation mode, its function, primals and tangents, all functions of the arguments."""
    torch.manual_seed(0)
    network, of = NETWORKS[name](batch=batch, size=size, **shape)
    with torch.no_grad():  # zeros at the start would hide what follows them
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network.eval()
    inputs = torch.randn(batch, 4, size, size), torch.rand(batch)
    return network, of, inputs, (torch.randn(batch, 4, size, size), torch.ones(batch))
