"""The iMF network: a transformer with in-context conditioning and two heads, u and v.

z, and the scalars that condition it, go in; the average velocity u over [r, t] and the instantaneous velocity
v come out. z and h, the length of the interval, may each be a `Dual`: then so is u, and its tangent is the
derivative along theirs. One network serves training, the evaluations without gradient and sampling, always
through its forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf.model.cast_weights import DOWN, GATE_UP, cast_weights
from imf.model.config import IMFConfig
from imf.model.layers import (
    SINUSOIDS,
    ScalarEmbedder,
    VelocityNetwork,
    condition_tokens,
    patch_embedder,
    residual_scales,
    zero_linear,
)
from imf.model.pretrained import Pretrained
from imf_kernels import Dual


class Block(nn.Module):
    """x ← x + attention(norm(x)) · attn_scale;  x ← x + mlp(norm(x)) · mlp_scale.

    x is [B · L, d], L the length of cos and sin: products take and give matrices, and every other shape costs
    a view forward and one backward.
    """

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        width, hidden, head_width = (
            config.hidden_size,
            config.mlp_width,
            config.hidden_size // config.num_heads,
        )
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(head_width)) for _ in range(2))
        self.attn_scale, self.mlp_scale = residual_scales(config)
        # One product for queries, keys and values, one for gate (w1) and up (w3) of the MLP.
        self.qkv = _block_weight(3 * width, width)
        self.out = _block_weight(width, width)
        self.gate_up = _block_weight(2 * hidden, width)
        self.down = _block_weight(width, hidden)

    def forward(self, x: Tensor | Dual, cos: Tensor, sin: Tensor, dtype: torch.dtype | None) -> Any:
        weights = self.qkv, self.out, self.gate_up, self.down
        qkv, out, gate_up, down = cast_weights(dtype, *weights, padding=(None, None, GATE_UP, DOWN))
        y = ik.rms_norm(x, self.norm1, dtype=dtype)
        y = ik.linear(y, qkv)
        q, k, v = ik.qk_norm_rope(y, self.q_norm, self.k_norm, cos, sin)
        y = ik.scaled_dot_product_attention(q, k, v)
        y = ik.linear_map(lambda a: a.transpose(1, 2).reshape(-1, x.shape[-1]), y)
        y = ik.linear(y, out)

        x, y = ik.gated_residual_rms_norm(x, y, self.attn_scale, self.norm2, dtype=dtype)
        y = ik.linear(y, gate_up)
        y = ik.linear(ik.swiglu(y), down)
        return ik.gated_residual(x, y, self.mlp_scale)


def _block_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_features, in_features) * (0.32 / math.sqrt(in_features)))


class FinalLayer(nn.Module):
    """RMSNorm, then a Linear, zero at the start, to the values of a patch; in fp32."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.linear = zero_linear(width, values)

    def forward(self, x: Tensor | Dual, *_: Tensor) -> Any:
        y = ik.rms_norm(x, self.norm)
        return ik.linear(y, self.linear.weight, self.linear.bias)


class IMF(Pretrained, VelocityNetwork):
    """The network of Improved Mean Flows."""

    def __init__(self, config: IMFConfig) -> None:
        super().__init__(config)
        if config.block != "modern":
            raise ValueError(f"IMF: block must be 'modern', got {config.block!r}")
        width, values = config.hidden_size, config.patch_values

        self.x_embedder = patch_embedder(config)
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        nn.init.normal_(self.y_embedder.weight, std=width**-0.5)
        self.omega_embedder = ScalarEmbedder(width)
        self.t_min_embedder = ScalarEmbedder(width)
        self.t_max_embedder = ScalarEmbedder(width)
        self.h_embedder = ScalarEmbedder(width)
        counts = config.condition_tokens
        self.class_tokens = condition_tokens(counts["y"], width)
        self.omega_tokens = condition_tokens(counts["omega"], width)
        self.t_min_tokens = condition_tokens(counts["t_min"], width)
        self.t_max_tokens = condition_tokens(counts["t_max"], width)
        self.time_tokens = condition_tokens(counts["h"], width)

        shared = config.depth - config.aux_head_depth
        self.shared_blocks = nn.ModuleList(Block(config) for _ in range(shared))
        self.u_blocks = nn.ModuleList(Block(config) for _ in range(config.aux_head_depth))
        self.v_blocks = nn.ModuleList(Block(config) for _ in range(config.aux_head_depth))
        self.u_final = FinalLayer(width, values)
        self.v_final = FinalLayer(width, values)

        # No buffers: those would have no values after `to_empty`, and no checkpoint to get them from.
        self._rope = _rope_tables(config, torch.device("cpu"))

    def embed(self, z: Any, t: Any, h: Any, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor) -> Any:
        x = self._patches(z)
        if self._rope[0].device != x.device:
            self._rope = _rope_tables(self.config, x.device)
        scalars = torch.stack([1 - 1 / omega, t_min, t_max])
        sinusoids = ik.sinusoidal_embedding(scalars.flatten(), SINUSOIDS)
        of_omega, of_t_min, of_t_max = sinusoids.view(*scalars.shape, SINUSOIDS).unbind()
        groups = [
            (self.class_tokens, self.y_embedder(y)),
            (self.omega_tokens, self.omega_embedder.of_sinusoids(of_omega)),
            (self.t_min_tokens, self.t_min_embedder.of_sinusoids(of_t_min)),
            (self.t_max_tokens, self.t_max_embedder.of_sinusoids(of_t_max)),
            (self.time_tokens, self.h_embedder(h)),
        ]
        x = ik.prepend_tokens(x, groups)
        return ik.linear_map(lambda a: a.flatten(0, 1), x), self._rope


def _rope_tables(config: IMFConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, fp32, fit for training whatever mode they are made in."""
    with torch.inference_mode(False):
        cos, sin = ik.rope_tables(config.tokens, config.hidden_size // config.num_heads)
        return cos.to(device), sin.to(device)
