"""The form in which a network sees images: size, channels, crop or pad, background of transparent ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imf.images import BrokenImage

LONGEST = 32  # of the longer side, in shorter sides, that is scaled; what is beyond is cut off first
FITS = ("crop", "pad")


@dataclass(frozen=True)
class Form:
    """Square images of one size: called with an image, gives it as [channels, size, size] uint8.

    channels: 1, grey, or 3, RGB; an image of the other kind is converted.
    fit: "crop" cuts the centre out, "pad" adds stripes in the colour of `background`, black by default.
    background: RGB colour over which transparent images are composed; without one they are broken images.
    """

    size: int
    channels: int = 3
    fit: str = "crop"
    background: tuple[int, int, int] | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Converts an image of mode "L", "LA", "RGB" or "RGBA"; BrokenImage if it is transparent."""
        if image.mode.endswith("A"):
            if self.background is None:
                raise BrokenImage("transparent pixels: --background COLOUR composes them over a colour")
            opaque = Image.new("RGBA", image.size, (*self.background, 255))
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque.convert("RGB")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.fit == "crop":
            return center_crop(image, self.size)
        return pad(image, self.size, self.background or (0, 0, 0))


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Crops the centre of a grey or RGB image, its shorter side scaled to `size`: [C, size, size] uint8.

    The crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), by which ImageNet figures are published: halved
    by averaging while the shorter side is at least 2 size, then bicubic, then cut, the odd pixel at the end.
    """
    width, height = image.size
    most = LONGEST * min(width, height)
    x, y = (max(0, length - most + 1) // 2 for length in (width, height))  # as much at both ends
    if x or y:  # scaled in full, a line of 20,000 pixels would become 256 lines of 5 million
        image = image.crop((x, y, width - x, height - y))
    image = _scaled(image, size, min(image.size))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return _channels_first(image.crop((left, top, left + size, top + size)))


def pad(image: Image.Image, size: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Scales the longer side of a grey or RGB image to `size` and centres it: [C, size, size] uint8.

    It is halved by averaging while the longer side is at least 2 size, then bicubic.
    """
    image = _scaled(image, size, max(image.size))
    canvas = Image.new("RGB", (size, size), colour).convert(image.mode)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return _channels_first(canvas)


def _scaled(image: Image.Image, size: int, side: int) -> Image.Image:
    """Scales an image such that `side`, the length of one of its sides, becomes `size`."""
    width, height = image.size
    while side >= 2 * size:
        side, width, height = side // 2, max(1, width // 2), max(1, height // 2)
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / side
    width, height = (max(1, round(length * scale)) for length in (width, height))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
