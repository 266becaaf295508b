"""Networks written here in the manner of public code of diffusion and flow models, as in networks.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import handwritten
from tests.helpers.networks.mean_flow import SiT, Times, UViT

Network = tuple[nn.Module, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]]


def sit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    """Attention by `scaled_dot_product_attention`, `modulate(norm(x), shift, scale)`."""
    module = SiT(size=size, width=heads * head_dim, heads=heads, depth=layers, labels=False, ratio=4)
    return module, lambda net: lambda z, t: net(z, t)


def dit_plain(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    """The same as MeanFlow's public networks have it: norms of queries and keys, weights one by one."""
    module = SiT(size=size, width=heads * head_dim, heads=heads, depth=layers, labels=False, ratio=4,
                 qk_norm=True, fused=False)  # fmt: skip
    return module, lambda net: lambda z, t: net(z, t)


class LightningDiT(nn.Module):
    """RMSNorm, SwiGLU, rotary positions and norms of queries and keys, each in several calls."""

    def __init__(self, size: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches, self.times = nn.Conv2d(4, width, 2, 2), Times(width)
        self.blocks = nn.ModuleList(
            handwritten.DiTBlock(width, heads, handwritten.RMSNorm) for _ in range(depth)
        )
        for block in self.blocks:
            block.mlp = handwritten.SwiGLUFFN(width, 8 * width // 3)
        self.rope = handwritten.InterleavedRope(
            handwritten.image_angles(size // 2, size // 2, width // heads)
        )
        self.out = nn.Linear(width, 16)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        x, c = self.patches(z).flatten(2).transpose(1, 2), self.times(t)
        for block in self.blocks:
            x = block(x, c, self.rope)
        return F.fold(self.out(x).transpose(1, 2), z.shape[-2:], 2, stride=2)


def lightning_dit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    return LightningDiT(size, heads * head_dim, heads, layers), lambda net: net


def u_vit(batch=2, size=8, heads=2, head_dim=16, layers=2) -> Network:
    """Time as a token, skips between the halves; one block more where `layers` is even."""
    module = UViT(size=size, width=heads * head_dim, heads=heads, depth=layers | 1, ratio=4)
    return module, lambda net: net


def _embedded(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=t.dtype) / (width // 2))
    angles = t.ger(frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class EDMBlock(nn.Module):
    """EDM's `UNetBlock` with adaptive scale, and attention over all pixels."""

    def __init__(self, inside: int, outside: int, width: int, heads: int, resample: str = "") -> None:
        super().__init__()
        self.heads, self.resample = heads, resample
        self.norm0, self.conv0 = nn.GroupNorm(8, inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.affine = nn.Linear(width, 2 * outside)
        self.norm1, self.conv1 = nn.GroupNorm(8, outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside or resample else None
        self.register_buffer("filter", torch.full((1, 1, 2, 2), 0.25))
        if heads:
            self.norm2 = nn.GroupNorm(8, outside)
            self.qkv, self.proj = nn.Conv2d(outside, 3 * outside, 1), nn.Conv2d(outside, outside, 1)

    def resampled(self, x: Tensor) -> Tensor:
        f = self.filter.to(x.dtype).tile([x.shape[1], 1, 1, 1])
        if self.resample == "up":
            return F.conv_transpose2d(x, f.mul(4), groups=x.shape[1], stride=2)
        return F.conv2d(x, f, groups=x.shape[1], stride=2) if self.resample == "down" else x

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        orig = x
        x = self.conv0(self.resampled(F.silu(self.norm0(x))))
        scale, shift = self.affine(c).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
        x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        x = self.conv1(F.dropout(x, p=0.1, training=self.training))
        x = x.add_(self.skip(self.resampled(orig)) if self.skip is not None else orig)
        x = x * 0.5**0.5
        if self.heads:
            n, width, *_ = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n * self.heads, width // self.heads, 3, -1)
            q, k, v = qkv.unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", w, v)
            x = self.proj(a.reshape(*x.shape)).add_(x) * 0.5**0.5
        return x


class GroupNorm32(nn.GroupNorm):
    """Guided diffusion's, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)


class GuidedBlock(nn.Module):
    """Guided diffusion's `ResBlock` with scale and shift, its `AttentionBlock`; `dims` is 2 or 3."""

    def __init__(
        self, inside: int, outside: int, width: int, heads: int, resample: str = "", dims: int = 2
    ) -> None:
        super().__init__()
        self.heads, self.resample, conv = heads, resample, (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.in_layers = nn.Sequential(GroupNorm32(8, inside), nn.SiLU(), conv(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * outside))
        self.out_layers = nn.Sequential(
            GroupNorm32(8, outside), nn.SiLU(), nn.Dropout(p=0.1), conv(outside, outside, 3, padding=1)
        )
        self.skip_connection = conv(inside, outside, 1) if inside != outside else nn.Identity()
        self.op = (
            conv(outside, outside, 3, stride=2 if resample == "down" else 1, padding=1) if resample else None
        )
        if heads:
            self.norm, self.qkv = GroupNorm32(8, outside), nn.Conv1d(outside, 3 * outside, 1)
            self.proj_out = nn.Conv1d(outside, outside, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.op is not None:
            x = self.op(F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x)
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = out_rest(out_norm(h) * (1 + scale) + shift)
        x = self.skip_connection(x) + h
        if self.heads:
            b, c, *spatial = x.shape
            x = x.reshape(b, c, -1)
            qkv = self.qkv(self.norm(x))
            q, k, v = qkv.reshape(b * self.heads, 3 * c // self.heads, -1).split(c // self.heads, dim=1)
            scale = (c // self.heads) ** -0.25
            w = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
            a = torch.einsum("bts,bcs->bct", w, v).reshape(b, -1, x.shape[-1])
            x = (x + self.proj_out(a)).reshape(b, c, *spatial)
        return x


class UNet(nn.Module):
    """Two resolutions, `layers` blocks each on the way down and one more on the way up."""

    def __init__(
        self,
        block: Callable[..., nn.Module],
        channels: int,
        width: int,
        heads: int,
        layers: int,
        dims: int = 2,
    ) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.width, wide, emb = width, 2 * width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.into = conv(channels, width, 3, padding=1)
        self.enc, self.dec, has = nn.ModuleList(), nn.ModuleList(), [width]
        for inside, outside, number, resample in ((width, width, 0, ""), (width, wide, heads, "down")):
            if resample:
                self.enc.append(block(inside, inside, emb, 0, resample))
                has.append(inside)
            for _ in range(layers):
                self.enc.append(block(inside, outside, emb, number))
                inside = outside
                has.append(inside)
        self.middle = block(wide, wide, emb, heads)
        inside = wide
        for outside, number, resample in ((wide, heads, ""), (width, 0, "up")):
            if resample:
                self.dec.append(block(inside, inside, emb, 0, resample))
            for _ in range(layers + 1):
                self.dec.append(block(inside + has.pop(), outside, emb, number))
                inside = outside
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), conv(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_embed(_embedded(t, self.width))
        x = self.into(x)
        skips = [x]
        for block in self.enc:
            x = block(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        for block in self.dec:
            x = block(x if block.resample else torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def edm_unet(batch=2, size=8, heads=2, head_dim=8, layers=1) -> Network:
    return UNet(EDMBlock, 4, heads * head_dim, heads, layers), lambda net: net


def guided_unet(batch=2, size=8, heads=2, head_dim=8, layers=1) -> Network:
    return UNet(GuidedBlock, 4, heads * head_dim, heads, layers), lambda net: net


def unet_3d(batch=2, size=8, heads=2, head_dim=8, layers=1) -> Network:
    """The same over volumes: the four channels of z are four slices of one."""

    def block(*args: Any) -> nn.Module:
        return GuidedBlock(*args, dims=3)

    module = UNet(block, 1, heads * head_dim, heads, layers, dims=3)
    return module, lambda net: lambda z, t: net(z.unsqueeze(1), t).squeeze(1)


NETWORKS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (sit, dit_plain, lightning_dit, u_vit, edm_unet, guided_unet, unet_3d)
}
