"""The network of original Mean Flows, a DiT with adaLN-zero, and its steps towards the network of iMF.

    c = emb(t) + emb(t − r) + emb(y);   shift, scale, gate, … = Linear(SiLU(c)), zero at the start
    x ← x + gate · attention(LN(x) (1 + scale) + shift);   x ← x + gate′ · mlp(LN(x) (1 + scale′) + shift′)

It predicts u alone. On the way to `imf.model.imf.IMF` each of these can be added (the paper's table of
ablations):

- a v-head beside u's: the last `aux_head_depth` blocks and the final layer twice;
- ω as an input, as 1 − 1/ω, then the guidance interval: embeddings that are added to c;
- the condition as tokens in front of the sequence in the place of c, as in `imf.model.imf.IMF`, with h the
  only time; the blocks then have a LayerNorm with weight and bias and a gate a channel, zero at the start.

z, t and h may each be a `Dual`: then so is u, and so are c and what is made of it.

Sources: "Mean Flows" (arXiv 2505.13447) and its official program; "Improved Mean Flows" (arXiv 2512.02012)
for the steps, of which there is no official program: what the paper leaves open is as in one of the two
networks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf.model.cast_weights import cast_weights
from imf.model.config import IMFConfig
from imf.model.layers import (
    ScalarEmbedder,
    VelocityNetwork,
    condition_tokens,
    patch_embedder,
    residual_scales,
    zero_linear,
)
from imf.model.pretrained import Pretrained
from imf_kernels import Dual

NORM_EPS = 1e-6


def _heads_of_qkv(qkv: Tensor, heads: int) -> list[Tensor]:
    """[B, L, 3 H D] → q, k, v, each [B, H, L, D]; backward, one copy that lays them side by side."""
    batch, length, width = qkv.shape
    return [x.transpose(1, 2) for x in qkv.view(batch, length, 3, heads, width // (3 * heads)).unbind(2)]


class Modulated(nn.Module):
    """LayerNorm(x) (1 + scale) + shift and gates from the condition (adaLN-zero)."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = zero_linear(width, vectors * width)

    def forward(self, c: Tensor | Dual) -> Any:
        """SiLU(c) [B, d] → `vectors` vectors, each [B, d]."""
        y = ik.linear(c, self.linear.weight, self.linear.bias)
        return ik.linear_map(lambda a: a.chunk(self.vectors, dim=-1), y)


class Block(nn.Module):
    """x ← x + gate · attention(norm(x));  x ← x + gate · mlp(norm(x)); norms and gates from the condition c.

    Without a condition (that is in the sequence then) the norms have weights and biases and the gates are
    weights.
    """

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.mlp_width
        self.heads = config.num_heads
        if config.conditioning == "adaln":
            self.modulation = Modulated(width, 6)
        else:
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
            self.attn_scale, self.mlp_scale = residual_scales(config)
        self.qkv = xavier_linear(width, 3 * width)
        self.out = xavier_linear(width, width)
        self.up = xavier_linear(width, hidden)
        self.down = xavier_linear(hidden, width)

    def forward(self, x: Tensor | Dual, c: Tensor | Dual | None, dtype: torch.dtype | None) -> Any:
        layers = self.qkv, self.out, self.up, self.down
        qkv, out, up, down = cast_weights(dtype, *(layer.weight for layer in layers))
        if c is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
            y = ik.layer_norm_modulate(x, shift1, scale1, NORM_EPS, dtype=dtype)
            x = ik.gated_residual(x, self._attention(y, qkv, out), gate1)
            y = ik.layer_norm_modulate(x, shift2, scale2, NORM_EPS, dtype=dtype)
            return ik.gated_residual(x, self._mlp(y, up, down), gate2)
        y = layer_norm(x, self.norm1, dtype=dtype)
        x = ik.gated_residual(x, self._attention(y, qkv, out), self.attn_scale)
        y = layer_norm(x, self.norm2, dtype=dtype)
        return ik.gated_residual(x, self._mlp(y, up, down), self.mlp_scale)

    def _attention(self, y: Tensor | Dual, qkv: Tensor, out: Tensor) -> Any:
        y = ik.linear(y, qkv, self.qkv.bias)
        q, k, v = ik.linear_map(lambda a: _heads_of_qkv(a, self.heads), y)
        y = ik.scaled_dot_product_attention(q, k, v)
        y = ik.linear_map(lambda a: a.transpose(1, 2).flatten(2), y)
        return ik.linear(y, out, self.out.bias)

    def _mlp(self, y: Tensor | Dual, up: Tensor, down: Tensor) -> Any:
        y = ik.linear(y, up, self.up.bias)
        y = ik.gelu(y, approximate="tanh")
        return ik.linear(y, down, self.down.bias)


class FinalLayer(nn.Module):
    """LayerNorm, shift and scale from c (or its own), then a Linear, zero at the start, to a patch; fp32."""

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        if config.conditioning == "adaln":
            self.modulation = Modulated(config.hidden_size, 2)
        else:
            self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.linear = zero_linear(config.hidden_size, config.patch_values)

    def forward(self, x: Tensor | Dual, c: Tensor | Dual | None) -> Any:
        if c is None:
            y = layer_norm(x, self.norm)
        else:
            shift, scale = self.modulation(c)
            y = ik.layer_norm_modulate(x, shift, scale, NORM_EPS)
        return ik.linear(y, self.linear.weight, self.linear.bias)


class DiT(Pretrained, VelocityNetwork):
    """The network of original Mean Flows, or one between it and `imf.model.imf.IMF`, as its `config` says.

    The condition c is fp32.
    """

    def __init__(self, config: IMFConfig) -> None:
        super().__init__(config)
        if config.block != "plain":
            raise ValueError(f"DiT: block must be 'plain', got {config.block!r}")
        width, adaln = config.hidden_size, config.conditioning == "adaln"

        self.x_embedder = patch_embedder(config)
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        nn.init.normal_(self.y_embedder.weight, std=0.02 if adaln else width**-0.5)
        scalars = [*("t",) * adaln, "h", *("omega",) * config.omega_input]
        scalars += ["t_min", "t_max"] if config.interval_input else []
        self.embedders = nn.ModuleDict({n: ScalarEmbedder(width, 0.02 if adaln else None) for n in scalars})
        if not adaln:
            tokens = {name: condition_tokens(k, width) for name, k in config.condition_tokens.items()}
            self.tokens = nn.ParameterDict(tokens)

        heads = config.aux_head_depth
        self.shared_blocks = nn.ModuleList(Block(config) for _ in range(config.depth - heads))
        self.u_blocks = nn.ModuleList(Block(config) for _ in range(heads))
        self.u_final = FinalLayer(config)
        if config.has_v_head:
            self.v_blocks = nn.ModuleList(Block(config) for _ in range(heads))
            self.v_final = FinalLayer(config)
        # No buffer: it would have no values after `to_empty`, and no checkpoint to get them from.
        self._positions = _positions(config, torch.device("cpu"))

    def embed(self, z: Any, t: Any, h: Any, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor) -> Any:
        x = self._patches(z)
        if self._positions.device != x.device:
            self._positions = _positions(self.config, x.device)
        x = _plus(x, self._positions.to(x.dtype))
        values = {"t": t, "h": h, "omega": 1 - 1 / omega, "t_min": t_min, "t_max": t_max}
        embedded = {name: embed(values[name]) for name, embed in self.embedders.items()}
        embedded["y"] = self.y_embedder(y)
        if self.config.conditioning == "adaln":
            return x, (ik.silu(self._sum(embedded)),)
        return ik.prepend_tokens(x, [(tokens, embedded[name]) for name, tokens in self.tokens.items()]), (
            None,
        )

    def _sum(self, embedded: dict[str, Any]) -> Any:
        """The embeddings' sum; those of t and h may carry tangents."""
        c = embedded["h"]
        # An operation, since it keeps tangents that are stored for the last rows as they are.
        one = torch.ones(self.config.hidden_size, device=c.device, dtype=c.dtype)
        c = ik.gated_residual(c, embedded["t"], one)
        for name, embedding in embedded.items():
            if name not in ("t", "h"):
                c = _plus(c, embedding)
        return c


def layer_norm(x: Tensor | Dual, norm: nn.LayerNorm, **options: Any) -> Any:
    return ik.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, **options)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _plus(x: Any, constant: Tensor) -> Any:
    """x + constant, which has no tangent."""
    if not isinstance(x, Dual):
        return x + constant
    return Dual(x.primal + constant, x.tangent_rows, differentiable=x.differentiable)


def _positions(config: IMFConfig, device: torch.device) -> Tensor:
    """[patches, d] fp32: of the column in the first half of the channels, of the row in the second; in each
    sines, then cosines, of frequencies 10000^(−i / (d / 4))."""
    side, quarter = config.input_size // config.patch_size, config.hidden_size // 4
    cpu: Any = {"dtype": torch.float64, "device": "cpu"}  # also where a network is made on another device
    with torch.inference_mode(False):  # fit for training whatever mode they are made in
        frequency = torch.exp(torch.arange(quarter, **cpu) * (-math.log(10000.0) / quarter))
        angle = torch.arange(side, **cpu)[:, None] * frequency
        one = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [side, d / 2]
        column, row = one.repeat(side, 1), one.repeat_interleave(side, dim=0)
        return torch.cat([column, row], dim=-1).float().to(device)
