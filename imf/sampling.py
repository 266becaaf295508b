"""Sampling: from noise to images in n network calls, one by default, and grids of them.

By the definition of the average velocity u over [r, t], z_r = z_t - (t - r) u(z_t, t, r) exactly: the only
error is the network's. One call serves guided sampling too: omega and the interval are inputs of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from imf.evaluation import vae as autoencoder
from imf.model.config import IMFConfig, check_guidance, config_of
from imf.model.imf import IMF


@torch.no_grad()
def generate(
    model: nn.Module,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int = 1,
    omega: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """Images [B, C, H, W], fp32, from `noise` [B, C, H, W] ~ N(0, I), fp32, and labels `y` [B] int64.

    z <- z - (t - r) u(z, h = t - r, omega, t_min, t_max, y) on linspace(1, 0, steps + 1), a call a step.

    omega: guidance scale, >= 1.  t_min, t_max: guidance interval in [0, 1].
    Raises: ValueError for steps < 1, labels that do not fit the noise, or guidance out of range.
    Source: Improved Mean Flows, arXiv 2512.02012.
    """
    if steps < 1:
        raise ValueError(f"generate: steps must be at least 1, got {steps}")
    if noise.ndim != 4 or y.shape != noise.shape[:1]:
        raise ValueError(
            f"generate: noise must be [B, C, H, W] and y [B], got {list(noise.shape)} and {list(y.shape)}"
        )
    check_inputs_of(config_of(model), omega, t_min, t_max)
    rows = noise.new_ones(len(noise), dtype=torch.float32)
    times = torch.linspace(1, 0, steps + 1).tolist()
    z = noise.float()
    for t, r in pairwise(times):
        guidance = rows * float(omega), rows * t_min, rows * t_max
        u = model(z, rows * t, rows * (t - r), *guidance, y)
        z = z - (t - r) * u
    return z


def check_inputs_of(config: IMFConfig, omega: float, t_min: float, t_max: float) -> None:
    """ValueError for guidance out of range, or that is no input of the network: it would have no effect."""
    check_guidance(omega, t_min, t_max)
    if not config.omega_input and omega != 1:
        raise ValueError(f"generate: omega must be 1, it is no input of this network, got {omega:g}")
    if not config.interval_input and (t_min, t_max) != (0, 1):
        raise ValueError(
            "generate: t_min and t_max must be 0 and 1, the guidance interval is no input of this network, "
            f"got {t_min:g} and {t_max:g}"
        )


def class_grid(
    model: IMF,
    *,
    columns: int = 10,
    steps: int = 1,
    omega: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    vae: Any = None,
) -> Image.Image:
    """A picture with a row per class and `columns` samples in each; the noise depends on the seed alone.

    classes: labels of the rows, default all.  vae: what decodes latents, see `imf.evaluation.vae`.
    """
    config = model.config
    classes = range(config.num_classes) if classes is None else classes
    device = next(model.parameters()).device
    shape = (len(classes) * columns, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor(classes).repeat_interleave(columns)
    images = generate(
        model, noise.to(device), y.to(device), steps=steps, omega=omega, t_min=t_min, t_max=t_max
    )
    if vae is not None:
        images = torch.cat([autoencoder.decode(vae, part) for part in images.split(columns)])
    return draw_grid(images, columns, row_labels=[str(label) for label in classes])


def draw_grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: list[str] | None = None,
    scale: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """Images [N, C, H, W] in [-1, 1] (C = 1 or 3; clipped), row after row of `columns`, N a multiple of it.

    Each pixel becomes scale x scale pixels (default: an image is about 40 wide), unsmoothed, with `gap` white
    pixels around every image and `row_labels` to the left.
    Raises: ValueError for another number of channels or a last row that is not full.
    """
    n, c, height, width = images.shape
    if c not in (1, 3):
        raise ValueError(f"draw_grid: images must have 1 or 3 channels, got {c}; decode latents first")
    if columns < 1 or n % columns:
        raise ValueError(f"draw_grid: columns must divide the {n} images, got {columns}")
    scale = scale or max(1, 40 // width)
    margin = 20 if row_labels else 0
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    tiles = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    height, width = height * scale + gap, width * scale + gap
    canvas = Image.new("RGB", (margin + columns * width + gap, n // columns * height + gap), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        picture = Image.fromarray(tile[..., 0] if c == 1 else tile)
        canvas.paste(picture, (margin + gap + column * width, gap + row * height))
    pen = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels or []):
        pen.text(
            (margin // 2 + gap // 2, gap // 2 + row * height + height // 2), label, fill="black", anchor="mm"
        )
    return canvas
