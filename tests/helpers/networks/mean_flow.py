"""Networks written here, in the manner of public code of flow and MeanFlow models."""

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from tests.helpers.networks.case import Case, image, time


def _angles(t, width):
    """Of times: cosines and sines, as DiT writes them."""
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(0, width // 2, dtype=torch.float32) / (width // 2)
    )
    args = t[:, None].to(t.dtype) * frequencies.to(t.device, t.dtype)[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(_angles(t, 16))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """As timm writes it."""

    def __init__(self, width, heads, qk_norm=False, fused=True):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            attn = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)
            x = attn.softmax(dim=-1) @ v
        return self.drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class AdaBlock(nn.Module):
    def __init__(self, width, heads, ratio=2, **options):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, **options)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SiT(nn.Module):
    """One time, labels dropped by an embedding of their own, learned sigma thrown away."""

    def __init__(self, size=8, width=16, heads=2, depth=2, times=1, labels=True, **options):
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, size * size // 4, width), requires_grad=False)
        self.times = nn.ModuleList(Times(width) for _ in range(times))
        self.labels = nn.Embedding(11, width) if labels else None
        self.blocks = nn.ModuleList(AdaBlock(width, heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, 2 * 2 * 8)

    def unpatchify(self, x):
        side = int(x.shape[1] ** 0.5)
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], side, side, 2, 2, 8))
        return x.reshape(x.shape[0], 8, 2 * side, 2 * side)

    def forward(self, x, *times, y=None):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        c = sum(embed(t) for embed, t in zip(self.times, times, strict=True))
        if self.labels is not None:
            c = c + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.unpatchify(self.out(modulate(self.norm(x), shift, scale)))
        return x.chunk(2, dim=1)[0]


def sit():
    return Case(SiT(), lambda net, z, t, y: net(z, t, y=y), (image(), time()), (torch.tensor([3, 10]),))


def mf_dit():
    """Two times r and t, query and key norms, attention without a fused kernel."""
    module = SiT(times=2, labels=False, qk_norm=True, fused=False)
    return Case(module, lambda net, z, r, t: net(z, r, t), (image(), time(), time()))


class Residual(nn.Module):
    def __init__(self, inside, outside, width):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(4, inside), nn.SiLU(inplace=True), nn.Conv2d(inside, outside, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(width, outside))
        self.second = nn.Sequential(
            nn.GroupNorm(4, outside),
            nn.SiLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(outside, outside, 3, padding=1),
        )
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x, c):
        h = self.first(x)
        h += self.time(c)[:, :, None, None]
        return self.skip(x) + self.second(h)


class PixelAttention(nn.Module):
    """Over all pixels, with products of batches."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.GroupNorm(4, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3 * C, H * W).chunk(3, dim=1)
        w = torch.einsum("bci,bcj->bij", q, k).mul_(C**-0.5).softmax(dim=-1)
        return x + self.proj(torch.einsum("bij,bcj->bci", w, v).view(B, C, H, W))


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.time = nn.Sequential(
            nn.Linear(16, 2 * width), nn.SiLU(inplace=True), nn.Linear(2 * width, 2 * width)
        )
        self.into = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.ModuleList([Residual(width, width, 2 * width), Residual(width, 2 * width, 2 * width)])
        self.pool, self.attention = nn.AvgPool2d(2), PixelAttention(2 * width)
        self.middle = Residual(2 * width, 2 * width, 2 * width)
        self.up = nn.ModuleList(
            [Residual(4 * width, width, 2 * width), Residual(2 * width, width, 2 * width)]
        )
        self.out = nn.Sequential(
            nn.GroupNorm(4, width), nn.SiLU(inplace=True), nn.Conv2d(width, 4, 3, padding=1)
        )

    def forward(self, x, t):
        c, x, skips = self.time(_angles(t, 16)), self.into(x), []
        for block in self.down:
            x = block(x, c)
            skips.append(x)
            x = self.pool(x)
        x = self.attention(self.middle(x, c))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1), c)
        return self.out(x)


def unet():
    """In the manner of DDPM."""
    return Case(UNet(), lambda net, z, t: net(z, t), (image(), time()))


class SkipBlock(nn.Module):
    def __init__(self, width, heads, skip, checkpoint, ratio=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.checkpoint = checkpoint

    def forward(self, x, skip=None):
        if self.checkpoint:
            return torch.utils.checkpoint.checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Times are a token; skips between the halves are concatenated."""

    def __init__(self, size=8, width=16, heads=2, depth=3, checkpoint=False, ratio=2):
        super().__init__()
        self.patches, self.time = nn.Conv2d(4, width, 2, 2), Times(width)
        self.positions = nn.Parameter(torch.randn(1, 1 + size * size // 4, width))
        half = depth // 2
        self.in_blocks = nn.ModuleList(SkipBlock(width, heads, False, checkpoint, ratio) for _ in range(half))
        self.mid_block = SkipBlock(width, heads, False, checkpoint, ratio)
        self.out_blocks = nn.ModuleList(SkipBlock(width, heads, True, checkpoint, ratio) for _ in range(half))
        self.norm, self.decoder = nn.LayerNorm(width), nn.Linear(width, 16)
        self.final = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, t):
        side = x.shape[-1] // 2
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.time(t).unsqueeze(dim=1), x), dim=1) + self.positions
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder(self.norm(x))[:, 1:, :]
        x = x.reshape(x.shape[0], side, side, 2, 2, 4).permute(0, 5, 1, 3, 2, 4)
        return self.final(x.reshape(x.shape[0], 4, 2 * side, 2 * side))


def u_vit():
    return Case(UViT(), lambda net, z, t: net(z, t), (image(), time()))


def u_vit_checkpoint():
    """Its blocks call torch.utils.checkpoint."""
    return Case(UViT(checkpoint=True), lambda net, z, t: net(z, t), (image(), time()))


def _precise(x):
    return torch.promote_types(x.dtype, torch.float32)


def _normalized(x, dim=None, eps=1e-4):
    if dim is None:
        dim = list(range(1, x.ndim))
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=_precise(x))
    norm = torch.add(eps, norm, alpha=(norm.numel() / x.numel()) ** 0.5)
    return x / norm.to(x.dtype)


def _mp_silu(x):
    return F.silu(x) / 0.596


def _mp_sum(a, b, t=0.5):
    return a.lerp(b, t) / ((1 - t) ** 2 + t**2) ** 0.5


class MPConv(nn.Module):
    """The magnitude of weights is forced in training, and taken out in each forward."""

    def __init__(self, inside, outside, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, *kernel))

    def forward(self, x, gain=1.0):
        w = self.weight.to(_precise(self.weight))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(_normalized(w))
        w = _normalized(w)
        w = w * (gain / w[0].numel() ** 0.5)
        w = w.to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        return F.conv2d(x, w, padding=(w.shape[-1] // 2,))


class MPBlock(nn.Module):
    def __init__(self, inside, outside, width, heads, decoder=False):
        super().__init__()
        self.heads, self.decoder = heads, decoder
        self.first, self.second = (
            MPConv(inside if decoder else outside, outside, (3, 3)),
            MPConv(outside, outside, (3, 3)),
        )
        self.skip = MPConv(inside, outside, (1, 1)) if inside != outside else None
        self.emb_linear, self.emb_gain = MPConv(width, outside, ()), nn.Parameter(torch.zeros([]))
        self.qkv = MPConv(outside, 3 * outside, (1, 1)) if heads else None
        self.proj = MPConv(outside, outside, (1, 1)) if heads else None

    def forward(self, x, c):
        if not self.decoder:
            x = _normalized(x if self.skip is None else self.skip(x), dim=1)
        y = self.first(_mp_silu(x))
        c = self.emb_linear(c, gain=self.emb_gain) + 1
        y = _mp_silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype))
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        x = _mp_sum(x, self.second(y), t=0.3)
        if self.heads:
            y = self.qkv(x)
            y = y.reshape(y.shape[0], self.heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = _normalized(y, dim=2).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / q.shape[2] ** 0.5).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = _mp_sum(x, self.proj(y.reshape(*x.shape)), t=0.3)
        return x.clip_(-256, 256)


class EDM2(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(16))
        self.register_buffer("phases", 2 * math.pi * torch.rand(16))
        self.emb_noise = MPConv(16, 2 * width, ())
        self.into, self.out_conv = MPConv(5, width, (3, 3)), MPConv(width, 4, (3, 3))
        self.blocks = nn.ModuleList(
            [MPBlock(width, 2 * width, 2 * width, 2), MPBlock(2 * width, 2 * width, 2 * width, 0)]
        )
        self.last = MPBlock(2 * width + width, width, 2 * width, 0, decoder=True)
        self.out_gain = nn.Parameter(torch.ones([]))

    def forward(self, x, noise):
        angle = noise.flatten().to(_precise(noise))
        angle = angle.ger(self.frequencies.to(angle.dtype)) + self.phases.to(angle.dtype)
        c = _mp_silu(self.emb_noise((angle.cos() * 2**0.5).to(x.dtype)))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        first = x = self.into(x)
        x = F.avg_pool2d(x, 2)
        for block in self.blocks:
            x = block(x, c)
        x = F.interpolate(x, scale_factor=2)
        a, b = 0.7 / x.shape[1] ** 0.5, 0.3 / first.shape[1] ** 0.5
        x = torch.cat([a * x, b * first], dim=1)
        return self.out_conv(self.last(x, c), gain=self.out_gain)


def edm2():
    """Forced weight normalisation in forward, in evaluation mode."""
    return Case(EDM2(), lambda net, z, t: net(z, t), (image(), time()))


def edm2_training():
    """The same in training mode: forward overwrites its weights."""
    case = edm2()
    case.training = True
    return case


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.to(_precise(x))
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


def _rotated(x, cos, sin):
    x = x.unflatten(-1, (-1, 2))
    x1, x2 = x.unbind(-1)
    return x * cos.unsqueeze(-1) + torch.stack((-x2, x1), -1) * sin.unsqueeze(-1)


class PixelBlock(nn.Module):
    """RMSNorm, SwiGLU, rotary positions, modulation by all tokens' condition."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp, self.modulation = (
            SwiGLU(width, 2 * width),
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
        )

    def forward(self, x, c, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(norm(z), cos, sin).flatten(-2) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(-2))
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))


class PMF(nn.Module):
    """Pixels in large patches through a bottleneck, times r, t and guidance, a prediction of x."""

    def __init__(self, size=16, patch=4, width=16, heads=2, depth=2):
        super().__init__()
        self.patch, self.side = patch, size // patch
        self.bottleneck = nn.Sequential(nn.Conv2d(3, 8, patch, patch, bias=False), nn.Conv2d(8, width, 1))
        self.t, self.h, self.omega = Times(width), Times(width), Times(width)
        self.labels = nn.Embedding(11, width)
        self.tokens = nn.Parameter(torch.randn(1, 2, width))
        self.blocks = nn.ModuleList(PixelBlock(width, heads) for _ in range(depth))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, patch * patch * 3)
        angle = torch.arange(self.side**2 + 2)[:, None] / 10 ** torch.arange(0, 1, 2 / (width // heads))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, z, r, t, omega, y):
        c = self.t(t) + self.h(t - r) + self.omega(1 - 1 / omega) + self.labels(y)
        x = self.bottleneck(z).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        x = self.out(self.norm(x[:, 2:]))
        x = F.fold(x.transpose(1, 2), z.shape[-2:], self.patch, stride=self.patch)
        return (z - x) / t.clamp_min(0.05).view(-1, 1, 1, 1)


def pmf():
    inputs = image(3, 16), time() / 2, 0.5 + time() / 2
    return Case(PMF(), lambda net, *inputs: net(*inputs), inputs, (1 + time(), torch.tensor([3, 10])))


MEAN_FLOW = [sit, mf_dit, unet, u_vit, u_vit_checkpoint, edm2, edm2_training, pmf]
