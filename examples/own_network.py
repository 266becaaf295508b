"""Train a network of your own on the digits: `python examples/own_network.py u_vit` (or u_net, dit).

`imf.adapt` makes a module that predicts velocities fit the objective, `imf.fit` trains it.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import imf
from imf.data import load
from imf.sampling import class_grid

CLASSES, SHAPE = 10, (1, 8, 8)
LABELS = CLASSES + 1  # the last is the null label, of labels that are dropped


def u_net(width):
    """A U-Net of diffusers, with t − r as its only time."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=LABELS,
    )

    def call(network, z, t, r, labels):
        return network(z, t - r, class_labels=labels).sample

    return imf.adapt(network, num_classes=CLASSES, shape=SHAPE, call=call)


def dit(width):
    """A DiT of diffusers, with t − r as its only time."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,  # and it adds the null label
    )
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # the objective drops labels, the same in all of a step's calls

    def call(network, z, t, r, labels):
        return network(z, timestep=t - r, class_labels=labels).sample

    return imf.adapt(network, num_classes=CLASSES, shape=SHAPE, call=call)


class Block(nn.Module):
    """A transformer block; with `skip` it first takes in what an earlier block gave."""

    def __init__(self, width, heads, skip):
        super().__init__()
        self.heads, self.skip = heads, nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, earlier=None):
        if self.skip is not None:
            x = self.skip(torch.cat([x, earlier], dim=-1))
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """A U-ViT (Bao et al., arXiv 2209.12152) of (z, t, r, labels) that predicts (u, v).

    Time, interval and label are tokens; the second half of the blocks takes in the outputs of the first.
    """

    def __init__(self, width, heads=2, depth=5, patch=2, channels=1, size=8):
        super().__init__()
        half = depth // 2
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2 + 3, width))
        self.times = nn.ModuleDict({name: self._time(width) for name in ("t", "h")})
        self.labels = nn.Embedding(LABELS, width)
        self.blocks = nn.ModuleList(Block(width, heads, skip=i > depth - 1 - half) for i in range(depth))
        self.half, self.norm = half, nn.LayerNorm(width)
        self.velocities = nn.ConvTranspose2d(
            width, 2 * channels, patch, stride=patch
        )  # u's channels, then v's
        nn.init.zeros_(self.velocities.weight)

    def _time(self, width):
        return nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, z, t, r, labels):
        frequencies = torch.exp(-torch.linspace(0, 7, 32, device=z.device))
        angles = torch.stack([t, t - r])[:, :, None] * frequencies
        t_token, h_token = torch.cat([angles.sin(), angles.cos()], dim=-1)
        tokens = torch.stack([self.times["t"](t_token), self.times["h"](h_token), self.labels(labels)], dim=1)
        patches = self.patches(z)
        x = torch.cat([tokens, patches.flatten(2).transpose(1, 2)], dim=1) + self.positions
        earlier = []
        for i, block in enumerate(self.blocks):
            x = block(x, earlier.pop()) if block.skip is not None else block(x)
            if i < self.half:
                earlier.append(x)
        x = self.norm(x)[:, 3:].transpose(1, 2).unflatten(2, patches.shape[2:])
        return self.velocities(x).chunk(2, dim=1)


def u_vit(width):
    """The U-ViT above, which has both times and a head for v."""
    return imf.adapt(UViT(width), num_classes=CLASSES, shape=SHAPE, v_head=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", choices=("u_vit", "u_net", "dit"))
    for name, default in (("steps", 500), ("batch", 128), ("width", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()

    network = globals()[arguments.network](arguments.width)
    config = imf.TrainConfig(
        steps=arguments.steps, batch_size=arguments.batch, lr=1e-3, name=arguments.network
    )
    run = imf.fit(config, dataset=load("digits"), network=network)
    class_grid(run.network, steps=1).save("digits.png")


if __name__ == "__main__":
    main()
