"""Every operation in plain PyTorch, as a training program has it: norms in at least fp32, the rest in its
dtype.

Tests (through `torch.func.jvp` and autograd) and benchmarks compare derivatives with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from imf_kernels.testing.cases import Case


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _per_position(row: Tensor, x: Tensor) -> Tensor:
    """Returns [B, d] as one row for all positions of x [B, ..., d]; [d] unchanged."""
    return row if row.dim() == 1 else row[(slice(None), *(None,) * (x.dim() - 2))]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    y = _exact(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(dtype or x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalized_shape: tuple[int, ...] = (),
    eps: float = 1e-5,
) -> Tensor:
    y = _normalized(x, eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Normalises without F.layer_norm, whose torch.func.jvp PyTorch 2.13 cannot compile."""
    centered = _exact(x) - _exact(x).mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)


def group_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    num_groups: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    groups = _normalized(input.unflatten(1, (num_groups, -1)).flatten(2), eps)
    y, of_channels = groups.reshape(input.shape), (-1, *(1,) * (input.dim() - 2))
    y = y if weight is None else y * weight.view(of_channels)
    y = y if bias is None else y + bias.view(of_channels)
    return (y if activation is None else F.silu(y)).to(input.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return (_normalized(x, 1e-6) * (1 + _per_position(scale, x)) + _per_position(shift, x)).to(
        dtype or x.dtype
    )


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.reshape(-1, len(cos), qkv.shape[-1] // len(q_weight), len(q_weight)).transpose(1, 2)
    kv_heads = heads.shape[1] // 3 if kv_heads is None else kv_heads

    def one(x: Tensor, weight: Tensor) -> Tensor:
        n = rms_norm(_exact(x), weight, eps)
        even, odd = n[..., 0::2], n[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return turned.flatten(-2).to(x.dtype)

    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    return one(q, q_weight), one(k, k_weight), v


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: bool
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch.func.jvp supports
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + (branch * _per_position(gate, x)).to(x.dtype)


def gated_residual_rms_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    stream = gated_residual(x, branch, gate)
    return stream, rms_norm(stream, weight, eps, dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    f = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)).to(
        _exact(t).dtype
    )
    angle = _exact(t[:, None]) * f
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype)


def prepend_tokens(x: Tensor, *groups: Tensor) -> Tensor:
    pairs = zip(groups[0::2], groups[1::2], strict=True)
    return torch.cat([tokens + embedding[:, None] for tokens, embedding in pairs] + [x], dim=1)


def formula(case: Case, *, rounded: bool = True) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    """Returns a case's plain formula, as a function of its arguments; unless `rounded`, in their dtype."""
    call: Callable[..., Any] = globals()[case.operation]
    options = {**case.options, **(case.output_options if rounded else {})}

    def run(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        result = call(*arguments.values()) if call is prepend_tokens else call(**arguments, **options)
        return result if isinstance(result, tuple) else (result,)

    return run
