"""Modules as public networks write them, in several calls of PyTorch each."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """LLaMA's."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() if x.dtype != torch.float64 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


class Modulate(nn.Module):
    """DiT's norm and function."""

    def forward(self, x, shift, scale):
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SwiGLU(nn.Module):
    """LLaMA's feed-forward network."""

    def __init__(self, dim, hidden, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias), nn.Linear(dim, hidden, bias)
        self.w2 = nn.Linear(hidden, dim, bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SwiGLUFFN(nn.Module):
    """DINOv2's, with one layer for gate and up."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def angles(length, width, theta=10000.0):
    return torch.outer(torch.arange(length).double(), theta ** (-torch.arange(0, width, 2).double() / width))


def image_angles(rows, columns, width):
    """Half of the pairs by the row, half by the column."""
    r, c = angles(rows, width // 2), angles(columns, width // 2)
    return torch.cat([r[:, None].expand(-1, columns, -1), c[None].expand(rows, -1, -1)], -1).flatten(0, 1)


class InterleavedRope(nn.Module):
    """EVA's and LightningDiT's, pairs of neighbours."""

    def __init__(self, angles):
        super().__init__()
        angles = angles.repeat_interleave(2, -1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, t):
        first, second = t.unflatten(-1, (-1, 2)).unbind(-1)
        return t * self.freqs_cos + torch.stack((-second, first), -1).flatten(-2) * self.freqs_sin


class HalfRope(nn.Module):
    """LLaMA's in transformers, pairs of one half and the other."""

    def __init__(self, angles):
        super().__init__()
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, t):
        first, second = t.chunk(2, -1)
        return t * self.freqs_cos + torch.cat((-second, first), -1) * self.freqs_sin


class ComplexRotary(nn.Module):
    """LLaMA's own."""

    def __init__(self, angles):
        super().__init__()
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles).to(torch.complex64))

    def forward(self, t):
        pairs = torch.view_as_complex((t if t.dtype == torch.float64 else t.float()).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.freqs_cis).flatten(-2).type_as(t)


class Attention(nn.Module):
    """timm's, with weights made one by one; its rope as LightningDiT hands it over."""

    def __init__(self, dim, num_heads, norm=None, drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=True), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (norm(dim // num_heads) if norm else nn.Identity() for _ in range(2))
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x, rope=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class MaskedAttention(nn.Module):
    """timm 1.0.31's: heads of any width, a mask or a causal one, a norm before the last layer."""

    def __init__(self, dim, num_heads, head_dim=None, norm=None, scale_norm=None, fused=True):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim or dim // num_heads
        self.attn_dim, self.scale, self.fused_attn = num_heads * self.head_dim, self.head_dim**-0.5, fused
        self.qkv = nn.Linear(dim, 3 * self.attn_dim)
        self.q_norm, self.k_norm = (norm(self.head_dim) if norm else nn.Identity() for _ in range(2))
        self.attn_drop = nn.Dropout(0.0)
        self.norm = scale_norm(self.attn_dim) if scale_norm else nn.Identity()
        self.proj, self.proj_drop = nn.Linear(self.attn_dim, dim), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            seen = attn_mask
            if is_causal:
                seen = torch.ones(attn.shape[-2:], dtype=torch.bool, device=attn.device).tril()
            if seen is not None:
                attn = attn.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else attn + seen
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


class CrossAttention(nn.Module):
    """Stable Diffusion's, with weights made one by one."""

    def __init__(self, query_dim, context_dim=None, heads=2, dim_head=8):
        super().__init__()
        inner, self.heads, self.scale = heads * dim_head, heads, dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        if mask is not None:
            sim = sim.masked_fill(~mask.flatten(1)[:, None, None], -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """DiT's; its rope as LightningDiT hands it on."""

    def __init__(self, dim, num_heads, norm=None, drop=0.0):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(dim, num_heads, norm, drop)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, feat_rope=None):
        a, b, gate1, d, e, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + b) + a, rope=feat_rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + e) + d)
