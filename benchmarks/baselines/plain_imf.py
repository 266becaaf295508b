"""Improved Mean Flows in plain PyTorch: the network and the official training step, written to be read.

The network predicts the average velocity u(z, t, r) over [r, t] from z and h = t - r alone, conditioned on a
guidance scale omega, a guidance interval [t_min, t_max] and a class label. A second head of the same trunk
predicts the instantaneous velocity v(z, t). Every operation is an ordinary differentiable one, so
`torch.func.jvp` works, in float64 too: a reference for faster implementations. Parameter names are those of
the official checkpoints.

Source: "Improved Mean Flows", arXiv 2512.02012, and its official JAX program.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

CLASS_TOKENS, OMEGA_TOKENS, INTERVAL_TOKENS, TIME_TOKENS = 8, 4, 2, 4
FREQUENCIES = 128  # of the sinusoidal embedding, which has a cosine and a sine of each
ROPE_THETA = 10000.0
RMS_EPS = 1e-6
BLOCK_INIT_GAIN = 0.32


class FlaxLinear(nn.Module):
    """A linear layer, named as in the official checkpoints; weights N(0, (gain / sqrt(fan_in))^2)."""

    def __init__(self, in_features: int, out_features: int, gain: float, bias: bool = False):
        super().__init__()
        self._flax_linear = nn.Linear(in_features, out_features, bias=bias)
        nn.init.normal_(self._flax_linear.weight, std=gain / math.sqrt(in_features))
        if bias:
            nn.init.zeros_(self._flax_linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._flax_linear(x)


class FlaxEmbedding(nn.Module):
    """An embedding table, named as in the official checkpoints; weights N(0, 1 / features)."""

    def __init__(self, rows: int, features: int):
        super().__init__()
        self._flax_embedding = nn.Embedding(rows, features)
        nn.init.normal_(self._flax_embedding.weight, std=1 / math.sqrt(features))

    def forward(self, index: Tensor) -> Tensor:
        return self._flax_embedding(index)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * self.weight


class PatchEmbedder(nn.Module):
    """[B, C, H, W] to [B, patches, hidden] by a strided convolution; patches in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        bound = math.sqrt(6 / (in_channels * patch_size**2 + hidden_size))
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.zeros_(self.proj.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class ScalarEmbedder(nn.Module):
    """A scalar a row, [B], to [B, hidden]: 128 cosines, 128 sines, then Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            FlaxLinear(2 * FREQUENCIES, hidden_size, gain=1.0, bias=True),
            nn.SiLU(),
            FlaxLinear(hidden_size, hidden_size, gain=1.0, bias=True),
        )

    def forward(self, s: Tensor) -> Tensor:
        i = torch.arange(FREQUENCIES, dtype=s.dtype, device=s.device)
        angle = s[:, None] * torch.exp(-math.log(10000.0) * i / FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """A label a row, [B], to [B, hidden]; the last row of the table is the null label."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = FlaxEmbedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def rope(x: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of [B, heads, L, D] at position l by the angle l * theta^(-2i / D)."""
    length, dim = x.shape[-2:]
    position = torch.arange(length, dtype=x.dtype, device=x.device)
    frequency = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=x.dtype, device=x.device) / dim)
    angle = position[:, None] * frequency
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


class Attention(nn.Module):
    """Softmax attention with RMS-normalised, rotated queries and keys; positions 0 .. L-1, all tokens."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = FlaxLinear(hidden_size, hidden_size, BLOCK_INIT_GAIN)
        self.k_proj = FlaxLinear(hidden_size, hidden_size, BLOCK_INIT_GAIN)
        self.v_proj = FlaxLinear(hidden_size, hidden_size, BLOCK_INIT_GAIN)
        self.out_proj = FlaxLinear(hidden_size, hidden_size, BLOCK_INIT_GAIN)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, L, D]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        return self.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w1 = FlaxLinear(hidden_size, inner_size, BLOCK_INIT_GAIN)
        self.w3 = FlaxLinear(hidden_size, inner_size, BLOCK_INIT_GAIN)
        self.w2 = FlaxLinear(inner_size, hidden_size, BLOCK_INIT_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A pre-norm transformer block whose two branches enter through per-channel scales that start at zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio))
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.attn_scale
        return x + self.mlp(self.norm2(x)) * self.mlp_scale


class FinalLayer(nn.Module):
    """RMSNorm and a linear layer that starts at zero, to patch_size^2 * channels values a token."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.linear = FlaxLinear(hidden_size, out_features, gain=0.0, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def plain(config: Any) -> "PlainIMF":
    """The network of the sizes in an `imf.model.imf.IMFConfig`."""
    names = inspect.signature(PlainIMF.__init__).parameters
    return PlainIMF(**{name: getattr(config, name) for name in names if name != "self"})


class PlainIMF(nn.Module):
    """The iMF network: depth - aux_head_depth shared blocks, then aux_head_depth blocks for u and for v each.

    forward(z, t, h, omega, t_min, t_max, y, heads) takes images [B, C, H, W], five scalars [B], of which t
    has no effect, and labels [B] (the null label is num_classes), and returns images: (u, v) for heads="uv",
    one of them for "u" or "v".
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        aux_head_depth: int,
        mlp_ratio: float,
        num_classes: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.grid_size = input_size // patch_size

        def tokens(count: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(count, hidden_size) / math.sqrt(hidden_size))

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(count))

        self.class_tokens = tokens(CLASS_TOKENS)
        self.omega_tokens = tokens(OMEGA_TOKENS)
        self.t_min_tokens = tokens(INTERVAL_TOKENS)
        self.t_max_tokens = tokens(INTERVAL_TOKENS)
        self.time_tokens = tokens(TIME_TOKENS)
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.h_embedder = ScalarEmbedder(hidden_size)
        self.omega_embedder = ScalarEmbedder(hidden_size)
        self.cfg_t_start_embedder = ScalarEmbedder(hidden_size)
        self.cfg_t_end_embedder = ScalarEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.shared_blocks = blocks(depth - aux_head_depth)
        self.u_heads = blocks(aux_head_depth)
        self.v_heads = blocks(aux_head_depth)
        self.u_final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.v_final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        h: Tensor,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        heads: Literal["uv", "u", "v"] = "uv",
    ) -> Tensor | tuple[Tensor, Tensor]:
        conditions = (
            (self.class_tokens, self.y_embedder(y)),
            (self.omega_tokens, self.omega_embedder(1 - 1 / omega)),
            (self.t_min_tokens, self.cfg_t_start_embedder(t_min)),
            (self.t_max_tokens, self.cfg_t_end_embedder(t_max)),
            (self.time_tokens, self.h_embedder(h)),
        )
        groups = [tokens + embedding[:, None] for tokens, embedding in conditions]
        x = torch.cat([*groups, self.x_embedder(z)], dim=1)
        for block in self.shared_blocks:
            x = block(x)
        if heads == "u":
            return self._head(x, self.u_heads, self.u_final_layer)
        if heads == "v":
            return self._head(x, self.v_heads, self.v_final_layer)
        if heads == "uv":
            u = self._head(x, self.u_heads, self.u_final_layer)
            return u, self._head(x, self.v_heads, self.v_final_layer)
        raise ValueError(f'PlainIMF: heads must be "uv", "u" or "v", got {heads!r}')

    def _head(self, x: Tensor, blocks: nn.ModuleList, final_layer: FinalLayer) -> Tensor:
        for block in blocks:
            x = block(x)
        patches = final_layer(x[:, -(self.grid_size**2) :])
        shape = (self.grid_size, self.grid_size, self.patch_size, self.patch_size, self.in_channels)
        image = patches.unflatten(1, shape[:2]).unflatten(-1, shape[2:])  # [B, row, column, p, q, C]
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Draws(Protocol):
    """The random numbers of one training step."""

    t: Tensor  # [B]
    r: Tensor  # [B], at most t, and equal to it on the FM rows
    noise: Tensor  # as the images
    omega: Tensor  # [B]
    t_min: Tensor  # [B]
    t_max: Tensor  # [B]
    drop: Tensor  # [B], bool: rows whose label is dropped
    n_fm: int  # the first n_fm rows are the FM rows


@dataclass
class StepResult:
    """What one training step computes: `loss` to differentiate; loss_u, loss_v are mean squared errors."""

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor
    u: Tensor
    v: Tensor
    du_dt: Tensor
    v_g: Tensor


def rows(s: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1]."""
    return s[:, None, None, None]


def official_step(
    model: PlainIMF, x: Tensor, y: Tensor, draws: Draws, jvp: Callable[..., Any] = torch.func.jvp
) -> StepResult:
    """One iMF training step on images [B, C, H, W] and labels [B], as the official program takes it.

    The v-head is evaluated with and without the label on all rows, and the JVP is taken on all rows. The
    gradient of the loss flows through the primal u and v alone. `jvp`: for other derivatives.
    """
    t, r, omega = draws.t, draws.r, draws.omega
    null = torch.full_like(y, model.num_classes)
    z = rows(1 - t) * x + rows(t) * draws.noise
    v_t = draws.noise - x

    inside = (draws.t_min <= t) & (t <= draws.t_max)
    is_fm = torch.arange(len(t), device=t.device) < draws.n_fm
    omega_masked = torch.where(inside | is_fm, omega, 1.0)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    with torch.no_grad():
        v_c = model(z, t, zero, omega_masked, zero, one, y, heads="v")
        v_u = model(z, t, zero, one, zero, one, null, heads="v")
        guided = v_t + rows(1 - 1 / omega_masked) * (v_c - v_u)
        v_g = torch.where(rows(draws.drop), v_t, guided)

    y_dropped = torch.where(draws.drop, null, y)

    def f(z: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, t, t - r, omega, draws.t_min, draws.t_max, y_dropped, heads="uv")

    u, du_dt, v = jvp(f, (z, t, r), (v_c, one, zero), has_aux=True)
    du_dt = du_dt.detach()
    error_u = (u + rows(t - r) * du_dt - v_g).square()
    error_v = (v - v_g).square()
    loss = (adaptive(error_u) + adaptive(error_v)).mean()
    return StepResult(loss, error_u.mean().detach(), error_v.mean().detach(), u, v, du_dt, v_g)


def adaptive(squared_error: Tensor, power: float = 1.0, eps: float = 0.01) -> Tensor:
    """L / stopgrad(L + eps)^power a row, where L is the sum of the row's squared errors; [B]."""
    total = squared_error.flatten(1).sum(1)
    return total / (total + eps).detach() ** power


def to_torch(flax_path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The torch name and layout of a Flax weight such as `u_heads_0/attn/q_proj/_flax_linear/kernel`."""
    *modules, leaf = flax_path.split("/")
    stacked = ("shared_blocks_", "u_heads_", "v_heads_")
    names = [
        ".".join(module.rsplit("_", 1)) if module.startswith(stacked) else module.removeprefix("layers_")
        for module in modules
    ]
    names.append("weight" if leaf in ("kernel", "embedding") else leaf)
    if leaf == "kernel" and array.ndim == 2:
        array = array.T
    elif leaf == "kernel" and array.ndim == 4:  # (kh, kw, in, out)
        array = array.transpose(3, 2, 0, 1)
    return ".".join(names), array


def load_flax(model: PlainIMF, arrays: Mapping[str, np.ndarray], prefix: str = "param:net/") -> None:
    """Copy the arrays under `prefix`, in Flax names and layouts, into the model; raises if one is missing."""
    state = {}
    for key in arrays:
        if key.startswith(prefix):
            name, array = to_torch(key.removeprefix(prefix), arrays[key])
            state[name] = torch.tensor(array)
    model.load_state_dict(state)
