"""What the networks share: their shape, the embedding of scalars, patches, checks of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf_kernels import Dual

# Condition tokens, in their order: how many carry the class, ω, the guidance interval's ends, and h.
CLASS_TOKENS, OMEGA_TOKENS, T_MIN_TOKENS, T_MAX_TOKENS, TIME_TOKENS = 8, 4, 2, 2, 4
SINUSOIDS = 256
# What is larger is a mistake, which would otherwise fill the memory or never end.
MOST = {
    "input_size": 2**16,
    "in_channels": 2**16,
    "hidden_size": 2**20,
    "depth": 2**12,
    "num_classes": 2**28,
}
MOST_MLP_WIDTH = 2**22
MOST_POSITIONS = 2**28  # patches times width: the tables of positions, which are in no file


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
        aux_head_depth: how many of the `depth` blocks belong to the heads: as many for u as for v. With plain
            blocks 0 means that there is no v-head.
        mlp_ratio: width of the MLP over hidden_size, rounded down.
        num_classes: without the null label, which is index num_classes.
        conditioning: "tokens", in front of the sequence, or "adaln", adaLN-zero, which sees t beside h.
        block: "modern" (RMSNorm, SwiGLU, rotary positions, QK-norm) or "plain" (LayerNorm, GELU, fixed
            positions).
        omega_input, interval_input: whether ω and the guidance interval are inputs.

    "tokens" and "modern" are `imf.model.IMF`, all else is `imf.dit.DiT`; `imf.methods` names those that
    the paper's table of ablations walks through.
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
    conditioning: str = "tokens"
    block: str = "modern"
    omega_input: bool = True
    interval_input: bool = True

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
            if value > MOST.get(name, value):
                raise ValueError(f"IMFConfig: {name} must be at most {MOST[name]}, got {value}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"IMFConfig: input_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.input_size}"
            )
        if type(self.aux_head_depth) is not int or not 0 <= self.aux_head_depth <= self.depth:
            raise ValueError(
                f"IMFConfig: aux_head_depth must be an integer within 0 and depth {self.depth}, "
                f"got {self.aux_head_depth!r}"
            )
        if (
            not isinstance(self.mlp_ratio, (int, float))
            or not 0 < self.mlp_ratio < math.inf
            or self.hidden_size * self.mlp_ratio < 1
        ):
            raise ValueError(
                f"IMFConfig: mlp_ratio must be a number of at least 1 / hidden_size, got {self.mlp_ratio!r}"
            )
        if self.hidden_size * self.mlp_ratio > MOST_MLP_WIDTH:
            raise ValueError(
                f"IMFConfig: mlp_ratio must be at most {MOST_MLP_WIDTH} / hidden_size, got {self.mlp_ratio!r}"
            )
        if (positions := self.patches * self.hidden_size) > MOST_POSITIONS:
            raise ValueError(
                f"IMFConfig: hidden_size times patches (input_size / patch_size) ** 2 must be at most "
                f"{MOST_POSITIONS}, got {positions}"
            )
        self._check_form()

    def _check_form(self) -> None:
        for name, known in (("conditioning", ("tokens", "adaln")), ("block", ("modern", "plain"))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"IMFConfig: {name} must be {' or '.join(known)}, got {value!r}")
        for name in ("omega_input", "interval_input"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"IMFConfig: {name} must be True or False, got {getattr(self, name)!r}")
        if self.conditioning == "tokens" and not (self.omega_input and self.interval_input):
            raise ValueError(
                f"IMFConfig: tokens carry ω and the interval: omega_input and interval_input must be True, "
                f"got {self.omega_input} and {self.interval_input}"
            )
        if self.conditioning == "adaln" and self.block == "modern":
            raise ValueError("IMFConfig: block must be 'plain' with conditioning 'adaln', got 'modern'")
        if self.block == "modern" and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"IMFConfig: hidden_size must be a multiple of twice num_heads {self.num_heads} (rotary "
                f"positions turn pairs of channels), got {self.hidden_size}"
            )
        if self.block == "plain" and (self.hidden_size % 4 or self.hidden_size % self.num_heads):
            raise ValueError(
                f"IMFConfig: hidden_size must be a multiple of num_heads {self.num_heads} and of 4 (sines "
                f"and cosines of rows and columns), got {self.hidden_size}"
            )

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        if self.conditioning == "adaln":
            return self.patches
        return self.patches + CLASS_TOKENS + OMEGA_TOKENS + T_MIN_TOKENS + T_MAX_TOKENS + TIME_TOKENS

    @property
    def has_v_head(self) -> bool:
        return self.block == "modern" or self.aux_head_depth > 0


class ScalarEmbedder(nn.Module):
    """A scalar a sample → sinusoids → Linear → SiLU → Linear, in fp32.

    std: of the initial weights; by default (input width)^(−½) of each layer.
    """

    def __init__(self, width: int, std: float | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(SINUSOIDS, width)
        self.last = nn.Linear(width, width)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, std=std or layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor | Dual) -> Any:
        first, last = self.first, self.last
        x = ik.sinusoidal_embedding(t, SINUSOIDS)
        x = ik.silu(ik.linear(x, first.weight, first.bias))
        return ik.linear(x, last.weight, last.bias)


def patch_embedder(config: IMFConfig) -> nn.Linear:
    """The Linear from a patch's values to the stream: the official programs' convolution, Xavier uniform."""
    layer = nn.Linear(config.patch_values, config.hidden_size)
    bound = math.sqrt(6 / (config.patch_values + config.hidden_size))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def condition_tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, width) * width**-0.5)


def patchify(z: Tensor, c: IMFConfig) -> Tensor:
    """[B, C, H, W] → [B, patches, C p p], a patch's values in the order of a convolution's weights."""
    p, side = c.patch_size, c.input_size // c.patch_size
    z = z.reshape(-1, c.in_channels, side, p, side, p)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(-1, c.patches, c.patch_values)


def unpatchify(x: Tensor, c: IMFConfig) -> Tensor:
    """[B, patches, p p C], values in the order (row, column, channel) → [B, C, H, W]."""
    p, side = c.patch_size, c.input_size // c.patch_size
    x = x.reshape(-1, side, side, p, p, c.in_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.in_channels, c.input_size, c.input_size)


def heads_of_qkv(qkv: Tensor, heads: int) -> list[Tensor]:
    """[B, L, 3 H D] → q, k, v, each [B, H, L, D]; backward, one copy that lays them side by side."""
    batch, length, width = qkv.shape
    return [x.transpose(1, 2) for x in qkv.view(batch, length, 3, heads, width // (3 * heads)).unbind(2)]


def check_inputs(
    who: str,
    config: IMFConfig,
    weight: Tensor,
    z: Tensor | Dual,
    y: Tensor,
    duals: dict[str, Any],
    plain: dict[str, Any],
) -> None:
    """ValueError or TypeError, naming the argument, unless the inputs of a network fit it.

    weight: one of its weights, whose dtype and device the inputs must have.
    duals, plain: scalars a sample, [B], that may carry a tangent, and that may not.
    """
    for name, value in {"z": z, **duals, **plain, "y": y}.items():
        if isinstance(value, Dual) and (name in plain or name == "y"):
            raise TypeError(f"{who}: {name} carries no tangent; pass a tensor, got a Dual")
        if not isinstance(value, (Tensor, Dual)):
            raise TypeError(f"{who}: {name} must be a tensor, got {type(value).__name__}")
        if value.device != weight.device:
            raise ValueError(f"{who}: {name} must be on {weight.device} like the weights, got {value.device}")
        if name != "y" and value.dtype != weight.dtype:
            raise TypeError(f"{who}: {name} must be {weight.dtype} like the weights, got {value.dtype}")
    image = (config.in_channels, config.input_size, config.input_size)
    if len(z.shape) != 4 or tuple(z.shape[1:]) != image:
        raise ValueError(f"{who}: z must be [B, {', '.join(map(str, image))}], got {list(z.shape)}")
    batch = z.shape[0]
    for name, value in {**duals, **plain}.items():
        if tuple(value.shape) != (batch,):
            raise ValueError(f"{who}: {name} must be [{batch}], one a sample, got {list(value.shape)}")
    if y.dtype not in (torch.int64, torch.int32) or tuple(y.shape) != (batch,):
        raise ValueError(f"{who}: y must be [{batch}] in int64 or int32, got {list(y.shape)} in {y.dtype}")
    # On other devices looking would wait for the device, and no graph has values to look at; there the
    # embedding's own check speaks.
    if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
        if not (int(y.min()) >= 0 and int(y.max()) <= config.num_classes):
            raise ValueError(
                f"{who}: labels must be within 0 and {config.num_classes} (the null label), "
                f"got {int(y.min())} to {int(y.max())}"
            )
        omega = plain.get("omega")
        if omega is not None and not bool((omega > 0).all()):
            raise ValueError(f"{who}: omega must be positive, got {float(omega.min())}")
