"""Layers that the networks share: the embedding of scalars, patches, checks of inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf.model.config import IMFConfig
from imf_kernels import Dual

SINUSOIDS = 256


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
