"""Pictures of samples: grids, a row per class, and which classes are asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import pad

from imf.model.config import config_of
from imf.model.sampler import sample_labels
from imf.program import UserError, progress

MOST_NAMED = 20  # classes of a grid, or names in a message, of which none was asked for
BATCH_SIZE = 64  # samples at a time: a program at work shows progress, and the memory is bounded


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
    images = sample_labels(model, labels, seed=seed, batch_size=BATCH_SIZE, bar=bar, **options)
    if decode is not None:
        rows = images.split(columns)
        shown = progress(rows, "decoding", "row", brief=True, quiet=not bar)
        images = torch.cat([decode(latents) for latents in shown])
    names = [class_names[label] if class_names else str(label) for label in classes]
    return draw_grid(images, columns, row_labels=names)


def find_classes(given: Sequence[str], names: Sequence[str], count: int) -> list[int]:
    """Returns the labels that --classes asks for, each by its number or its name, whose case does not matter.

    given: an argument is a name, or several numbers or names between commas.
    names: a name per label, empty if unknown.  count: of classes.
    Raises: UserError, with the names that are closest, for a class that is not there.
    """
    label_of = {name.lower(): label for label, name in reversed(list(enumerate(names)))}
    texts = [[text] if text.lower() in label_of else text.split(",") for text in given]
    labels = []
    for text in (text.strip().lower() for part in texts for text in part):
        if text.isdecimal():  # also where classes have numbers as names
            label = int(text)
        elif text in label_of:
            label = label_of[text]
        else:
            close = difflib.get_close_matches(text, label_of, 3) or list(label_of)[:MOST_NAMED]
            known = f"; names are {', '.join(close)}" if names else "; this checkpoint knows no names"
            raise UserError(f"--classes must be labels from 0 to {count - 1}, or names, got {text!r}{known}")
        if label >= count:
            raise UserError(f"--classes must be within 0 and {count - 1}, got {text}")
        labels.append(label)
    return labels


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
