"""Sampling: images from noise in n network calls, one by default, and grids of them.

By the definition of the average velocity u over [r, t], z_r = z_t - (t - r) u(z_t, t, r) exactly: the only
error is the network's. One call serves guided sampling too: omega and the interval are inputs of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from imf import random
from imf.model.config import IMFConfig, check_guidance, config_of
from imf.program import UserError, bar_options


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
    """Samples images [B, C, H, W], fp32, from `noise` [B, C, H, W] ~ N(0, I) and labels `y` [B] int64.

    z <- z - (t - r) u(z, h = t - r, omega, t_min, t_max, y) on linspace(1, 0, steps + 1), a call per step, on
    the model's device.  omega: guidance scale, >= 1.  t_min, t_max: guidance interval in [0, 1].
    Raises: UserError for steps < 1, labels that do not fit the noise, or guidance out of range.
    Source: Improved Mean Flows, arXiv 2512.02012.
    """
    if type(steps) is not int or steps < 1:
        raise UserError(f"generate: steps must be an integer of at least 1, got {steps!r}")
    for name, x in (("noise", noise), ("y", y)):
        if not isinstance(x, Tensor):
            raise UserError(f"generate: {name} must be a tensor, got a {type(x).__name__}")
    if noise.ndim != 4 or y.shape != noise.shape[:1]:
        raise UserError(
            f"generate: noise must be [B, C, H, W] and y [B], got {list(noise.shape)} and {list(y.shape)}"
        )
    check_inputs_of(config_of(model), omega, t_min, t_max)
    device = next(model.parameters()).device
    z, y = noise.to(device, torch.float32), y.to(device)
    rows = z.new_ones(len(z))
    guidance = rows * float(omega), rows * t_min, rows * t_max
    for t, r in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        u = model(z, rows * t, rows * (t - r), *guidance, y)
        z = z - (t - r) * u
    return z


def check_inputs_of(config: IMFConfig, omega: float, t_min: float, t_max: float) -> None:
    """Raises UserError for guidance out of range, or that the network does not take as an input."""
    try:
        check_guidance(omega, t_min, t_max)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not config.omega_input and omega != 1:
        raise UserError(f"generate: omega must be 1, it is no input of this network, got {omega:g}")
    if not config.interval_input and (t_min, t_max) != (0, 1):
        raise UserError(
            "generate: t_min and t_max must be 0 and 1, the guidance interval is no input of this network, "
            f"got {t_min:g} and {t_max:g}"
        )


def sample_labels(
    model: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    bar: bool = False,
    **options: Any,
) -> Tensor:
    """Samples an image per label [N] int64: [N, C, H, W] fp32 on the model's device.

    The noise depends on the seed and N, not on batch_size, default N.  bar: show a progress bar where
    it takes more than 2 s.  options: of `generate`.
    """
    config, size = config_of(model), batch_size or len(labels)
    shape = len(labels), config.in_channels, config.input_size, config.input_size
    noise = torch.randn(shape, generator=random.generator(seed, "samples"))
    parts = zip(noise.split(size), labels.split(size), strict=True)
    shown = tqdm(list(parts), desc="samples", unit="batch", delay=2, disable=not bar, **bar_options())
    return torch.cat([generate(model, z, y, **options) for z, y in shown])


def class_grid(
    model: nn.Module,
    *,
    columns: int = 10,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    decode: Callable[[Tensor], Tensor] | None = None,
    bar: bool = False,
    **options: Any,
) -> Image.Image:
    """Draws a row per class with `columns` samples in each; the noise is that of `sample_labels`.

    classes: labels of the rows, default all.  class_names: a name per label, written beside the rows instead.
    decode: makes images of latents.  bar, options: of `sample_labels`.
    """
    classes = range(config_of(model).num_classes) if classes is None else classes
    labels = torch.tensor(classes).repeat_interleave(columns)
    images = sample_labels(model, labels, seed=seed, bar=bar, **options)
    if decode is not None:
        rows = images.split(columns)
        shown = tqdm(rows, desc="decoding", unit="row", delay=2, disable=not bar, **bar_options())
        images = torch.cat([decode(latents) for latents in shown])
    names = [class_names[label] if class_names else str(label) for label in classes]
    return draw_grid(images, columns, row_labels=names)


def to_uint8(images: Tensor) -> Tensor:
    """Maps [-1, 1] to 0 … 255, rounded; what lies outside is clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw_grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: list[str] | None = None,
    scale: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """Draws images [N, C, H, W] in [-1, 1] (C = 1 or 3; clipped) in rows of `columns`, a divisor of N.

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
    texts = [label.encode("latin-1", "replace").decode("latin-1") for label in row_labels or []]
    font = ImageFont.load_default()  # of which an old version of Pillow has no other characters
    margin = max(20, *(math.ceil(font.getlength(text)) + 8 for text in texts)) if texts else 0
    height, width = height * scale + gap, width * scale + gap
    tiles = to_uint8(images).expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    tiles = pad(tiles, (0, gap, 0, gap), value=255).unflatten(0, (-1, columns))
    pixels = tiles.permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    canvas = Image.fromarray(pad(pixels, (0, 0, margin + gap, 0, gap, 0), value=255).cpu().numpy())
    pen = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        middle = (margin // 2 + gap // 2, gap // 2 + row * height + height // 2)
        pen.text(middle, text, fill="black", font=font, anchor="mm")
    return canvas
