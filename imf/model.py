"""The iMF network: a transformer with in-context conditioning and two heads, u and v.

z, and the scalars that condition it, go in; the average velocity u over [r, t] and the instantaneous velocity
v come out. z and h, the length of the interval, may each be a `Dual`: then so is u, and its tangent is the
derivative along theirs. One network serves training, the evaluations without gradient and sampling, always
through its forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf_kernels import Dual

# Condition tokens: how many carry the class, ω, the guidance interval's ends, and h.
CLASS_TOKENS, OMEGA_TOKENS, T_MIN_TOKENS, T_MAX_TOKENS, TIME_TOKENS = 8, 4, 2, 2, 4
SINUSOIDS = 256


@dataclass(frozen=True)
class IMFConfig:
    """The shape of a network.

    Attributes:
        input_size: height and width of the images or latents.
        patch_size: pixels along a patch.
        in_channels: channels of the input.
        hidden_size: width of the residual stream.
        depth: blocks from the input to one head's output.
        num_heads: attention heads; hidden_size / num_heads is the head dimension.
        aux_head_depth: how many of the `depth` blocks belong to the heads: as many for u as for v.
        mlp_ratio: width of the MLP over hidden_size, rounded down.
        num_classes: without the null label, which is index num_classes.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    aux_head_depth: int = 8
    mlp_ratio: float = 8 / 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"IMFConfig: {name} must be a positive integer, got {value!r}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"IMFConfig: input_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.input_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"IMFConfig: hidden_size must be a multiple of twice num_heads {self.num_heads} (rotary "
                f"positions turn pairs of channels), got {self.hidden_size}"
            )
        if type(self.aux_head_depth) is not int or not 0 <= self.aux_head_depth <= self.depth:
            raise ValueError(
                f"IMFConfig: aux_head_depth must be an integer within 0 and depth {self.depth}, "
                f"got {self.aux_head_depth!r}"
            )
        if (
            not isinstance(self.mlp_ratio, (int, float))
            or not 0 < self.mlp_ratio < math.inf
            or self.mlp_width < 1
        ):
            raise ValueError(
                f"IMFConfig: mlp_ratio must be a number of at least 1 / hidden_size, got {self.mlp_ratio!r}"
            )

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + CLASS_TOKENS + OMEGA_TOKENS + T_MIN_TOKENS + T_MAX_TOKENS + TIME_TOKENS


PRESETS = {
    "iMF-B/2": IMFConfig(hidden_size=768, depth=12, num_heads=12),
    "iMF-M/2": IMFConfig(hidden_size=768, depth=24, num_heads=12),
    "iMF-L/2": IMFConfig(hidden_size=1024, depth=32, num_heads=16),
    "iMF-XL/2": IMFConfig(hidden_size=1024, depth=48, num_heads=16),
}


def build(x: str | IMFConfig) -> IMF:
    """A network with fresh weights, of a preset (a key of `PRESETS`: "iMF-B/2" …) or of an `IMFConfig`."""
    if isinstance(x, str):
        if x not in PRESETS:
            raise ValueError(f"build: no preset {x!r}; there are {', '.join(PRESETS)}")
        x = PRESETS[x]
    if not isinstance(x, IMFConfig):
        raise TypeError(f"build: wanted the name of a preset or an IMFConfig, got {type(x).__name__}")
    return IMF(x)


class ScalarEmbedder(nn.Module):
    """A scalar a sample → sinusoids → Linear → SiLU → Linear, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(SINUSOIDS, width)
        self.last = nn.Linear(width, width)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor | Dual, backend: str | None) -> Any:
        first, last = self.first, self.last
        x = ik.sinusoidal_embedding(t, SINUSOIDS, backend=backend)
        x = ik.silu(ik.linear(x, first.weight, first.bias, backend=backend), backend=backend)
        return ik.linear(x, last.weight, last.bias, backend=backend)


class Block(nn.Module):
    """x ← x + attention(norm(x)) · attn_scale;  x ← x + mlp(norm(x)) · mlp_scale."""

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        width, hidden, head_width = (
            config.hidden_size,
            config.mlp_width,
            config.hidden_size // config.num_heads,
        )
        self.heads = config.num_heads
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(head_width)) for _ in range(2))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        # One product for queries, keys and values, one for gate (w1) and up (w3) of the MLP.
        self.qkv = _block_weight(3 * width, width)
        self.out = _block_weight(width, width)
        self.gate_up = _block_weight(2 * hidden, width)
        self.down = _block_weight(width, hidden)

    def forward(
        self, x: Tensor | Dual, cos: Tensor, sin: Tensor, dtype: torch.dtype | None, backend: str | None
    ) -> Any:
        y = ik.rms_norm(x, self.norm1, dtype=dtype, backend=backend)
        y = ik.linear(y, self.qkv, backend=backend)
        q, k, v = ik.linear_map(self._heads_of_qkv, y)
        q, k = ik.qk_norm_rope(q, k, self.q_norm, self.k_norm, cos, sin, backend=backend)
        y = ik.scaled_dot_product_attention(q, k, v, backend=backend)
        y = ik.linear_map(lambda a: a.transpose(1, 2).flatten(2), y)
        x = ik.gated_residual(x, ik.linear(y, self.out, backend=backend), self.attn_scale, backend=backend)

        y = ik.rms_norm(x, self.norm2, dtype=dtype, backend=backend)
        y = ik.swiglu(ik.linear(y, self.gate_up, backend=backend), backend=backend)
        return ik.gated_residual(x, ik.linear(y, self.down, backend=backend), self.mlp_scale, backend=backend)

    def _heads_of_qkv(self, qkv: Tensor) -> list[Tensor]:
        """[B, L, 3 H D] → q, k, v, each [B, H, L, D]; backward, one copy that lays them side by side."""
        return [x.transpose(1, 2) for x in qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)]


def _block_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_features, in_features) * (0.32 / math.sqrt(in_features)))


class FinalLayer(nn.Module):
    """RMSNorm, then a Linear, zero at the start, to the values of a patch; in fp32."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.linear = nn.Linear(width, values)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor | Dual, backend: str | None) -> Any:
        y = ik.rms_norm(x, self.norm, backend=backend)
        return ik.linear(y, self.linear.weight, self.linear.bias, backend=backend)


class IMF(nn.Module):
    """The network of Improved Mean Flows.

    Attributes:
        config: its shape.
        compute_dtype: of the operands of the blocks' products and of attention: torch.bfloat16, or `None`
            for the weights' own. Weights, embedders, norms, the residual stream and the outputs are fp32
            in either case (fp64 after `.double()`, on the `reference` backend).
        backend: of every operation: "cpu", "reference", or `None` for the best one that can run.
    """

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.backend: str | None = None
        width, values = config.hidden_size, config.patch_size**2 * config.in_channels

        self.x_embedder = nn.Linear(values, width)
        bound = math.sqrt(6 / (values + width))
        nn.init.uniform_(self.x_embedder.weight, -bound, bound)
        nn.init.zeros_(self.x_embedder.bias)
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        nn.init.normal_(self.y_embedder.weight, std=width**-0.5)
        self.omega_embedder = ScalarEmbedder(width)
        self.t_min_embedder = ScalarEmbedder(width)
        self.t_max_embedder = ScalarEmbedder(width)
        self.h_embedder = ScalarEmbedder(width)
        self.class_tokens = _tokens(CLASS_TOKENS, width)
        self.omega_tokens = _tokens(OMEGA_TOKENS, width)
        self.t_min_tokens = _tokens(T_MIN_TOKENS, width)
        self.t_max_tokens = _tokens(T_MAX_TOKENS, width)
        self.time_tokens = _tokens(TIME_TOKENS, width)

        shared = config.depth - config.aux_head_depth
        self.shared_blocks = nn.ModuleList(Block(config) for _ in range(shared))
        self.u_blocks = nn.ModuleList(Block(config) for _ in range(config.aux_head_depth))
        self.v_blocks = nn.ModuleList(Block(config) for _ in range(config.aux_head_depth))
        self.u_final = FinalLayer(width, values)
        self.v_final = FinalLayer(width, values)

        # No buffers: those would have no values after `to_empty`, and no checkpoint to get them from.
        self._rope = _rope_tables(config, torch.device("cpu"))

    def forward(
        self,
        z: Tensor | Dual,
        h: Tensor | Dual,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        heads: str = "uv",
    ) -> Any:
        """Velocities at z.

        Args:
            z: [B, C, H, W] in float32, the noisy image; a `Dual` for its tangent.
            h: [B] in float32, t − r; a `Dual` for its tangent.
            omega: [B] in float32, the guidance scale ω > 0, 1 for none.
            t_min, t_max: [B] in float32, the guidance interval.
            y: [B] in int64 or int32, labels; num_classes is the null label.
            heads: "u", "v" or "uv": which heads to evaluate.

        Returns:
            u, v, or the pair (u, v), each [B, C, H, W] in float32. u is a `Dual` if z or h is one; v is
            always a plain tensor, evaluated on the primal alone: nothing needs its tangent.

        Raises:
            ValueError, TypeError: for inputs that do not fit; on a CPU, unless compiled, also for labels and
                guidance scales out of range.
        """
        if heads not in ("u", "v", "uv"):
            raise ValueError(f"IMF: heads must be 'u', 'v' or 'uv', got {heads!r}")
        self._check(z, h, omega, t_min, t_max, y)
        if heads == "v":
            z, h = ik.primal(z), ik.primal(h)
        backend = self.backend
        x = ik.linear_map(self._patchify, z)
        x = ik.linear(x, self.x_embedder.weight, self.x_embedder.bias, backend=backend)
        groups = [
            (self.class_tokens, self.y_embedder(y)),
            (self.omega_tokens, self.omega_embedder(1 - 1 / omega, backend)),
            (self.t_min_tokens, self.t_min_embedder(t_min, backend)),
            (self.t_max_tokens, self.t_max_embedder(t_max, backend)),
            (self.time_tokens, self.h_embedder(h, backend)),
        ]
        x = ik.prepend_tokens(x, groups, backend=backend)
        x = self._blocks(self.shared_blocks, x)
        outputs = []
        if "u" in heads:
            outputs.append(self._head(self.u_blocks, self.u_final, x))
        if "v" in heads:
            outputs.append(self._head(self.v_blocks, self.v_final, ik.primal(x)))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _blocks(self, blocks: nn.ModuleList, x: Tensor | Dual) -> Any:
        if self._rope[0].device != x.device:
            self._rope = _rope_tables(self.config, x.device)
        for block in blocks:
            x = block(x, *self._rope, self.compute_dtype, self.backend)
        return x

    def _head(self, blocks: nn.ModuleList, final: FinalLayer, x: Tensor | Dual) -> Any:
        x = final(self._blocks(blocks, x), self.backend)
        return ik.linear_map(lambda a: self._unpatchify(a[:, -self.config.patches :]), x)

    def _patchify(self, z: Tensor) -> Tensor:
        """[B, C, H, W] → [B, patches, C p p], a patch's values in the order of a convolution's weights."""
        c, p = self.config, self.config.patch_size
        side = c.input_size // p
        z = z.reshape(-1, c.in_channels, side, p, side, p)
        return z.permute(0, 2, 4, 1, 3, 5).reshape(-1, c.patches, c.in_channels * p * p)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """[B, patches, p p C], values in the order (row, column, channel) → [B, C, H, W]."""
        c, p = self.config, self.config.patch_size
        side = c.input_size // p
        x = x.reshape(-1, side, side, p, p, c.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.in_channels, c.input_size, c.input_size)

    def _check(
        self, z: Tensor | Dual, h: Tensor | Dual, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor
    ) -> None:
        c, weight = self.config, self.x_embedder.weight
        scalars = {"h": h, "omega": omega, "t_min": t_min, "t_max": t_max}
        for name, value in {"z": z, **scalars, "y": y}.items():
            if isinstance(value, Dual) and name not in ("z", "h"):
                raise TypeError(f"IMF: {name} carries no tangent; pass a tensor, got a Dual")
            if not isinstance(value, (Tensor, Dual)):
                raise TypeError(f"IMF: {name} must be a tensor, got {type(value).__name__}")
            if value.device != weight.device:
                raise ValueError(
                    f"IMF: {name} must be on {weight.device} like the weights, got {value.device}"
                )
            if name != "y" and value.dtype != weight.dtype:
                raise TypeError(f"IMF: {name} must be {weight.dtype} like the weights, got {value.dtype}")
        image = (c.in_channels, c.input_size, c.input_size)
        if len(z.shape) != 4 or tuple(z.shape[1:]) != image:
            raise ValueError(f"IMF: z must be [B, {', '.join(map(str, image))}], got {list(z.shape)}")
        batch = z.shape[0]
        for name, value in scalars.items():
            if tuple(value.shape) != (batch,):
                raise ValueError(f"IMF: {name} must be [{batch}], one a sample, got {list(value.shape)}")
        if y.dtype not in (torch.int64, torch.int32) or tuple(y.shape) != (batch,):
            raise ValueError(f"IMF: y must be [{batch}] in int64 or int32, got {list(y.shape)} in {y.dtype}")
        # On other devices looking would wait for the device, and no graph has values to look at; there the
        # embedding's own check speaks.
        if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
            if not (int(y.min()) >= 0 and int(y.max()) <= c.num_classes):
                raise ValueError(
                    f"IMF: labels must be within 0 and {c.num_classes} (the null label), "
                    f"got {int(y.min())} to {int(y.max())}"
                )
            if not bool((omega > 0).all()):
                raise ValueError(f"IMF: omega must be positive, got {float(omega.min())}")


def _rope_tables(config: IMFConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, fp32, fit for training whatever mode they are made in."""
    with torch.inference_mode(False):
        cos, sin = ik.rope_tables(config.tokens, config.hidden_size // config.num_heads)
        return cos.to(device), sin.to(device)


def _tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, width) * width**-0.5)
