"""Image files: which of them lie in a folder, and their pixels, grey or RGB with 8 bits.

The one reader of images that come from outside: `imf.data.prepare` and `imf.evaluate` both use it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from imf.io import IrregularFile, check_regular
from imf.program import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = (1 << 30) // 12  # a quarter of a GiB in RGB, from where on Pillow speaks of decompression bombs
MAX_BYTES = 1 << 30  # of a file: more than MAX_PIXELS take in any of the formats
# By content, whatever the name says. Not EPS, for which Pillow would start Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_GREY = ("1", "L", "LA", "La")
_COLOUR = ("RGB", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_SAMPLE_FORMAT, _SIGNED = 339, 2


class BrokenImage(Exception):
    """A file that is there but holds no image that can be used; the message is the reason."""


def read_image(path: Path) -> Image.Image:
    """Decodes the first image of a file, in mode "L" or "RGB".

    Transparency is dropped, so that the colours below it show, and the orientation in EXIF ignored, as by the
    programs whose figures are published (ADM, torch-fidelity).

    Raises: as `read_bytes` and `decode`.
    """
    image = decode(read_bytes(path))
    return image.convert("L" if image.mode == "LA" else "RGB") if image.mode.endswith("A") else image


def read_bytes(path: Path) -> bytes:
    """Reads a file that is to hold an image; raises as `check_image_file`."""
    check_image_file(path)
    return path.read_bytes()


def check_image_file(path: Path) -> None:
    """Checks that a file may hold an image, before it is opened.

    Raises: BrokenImage if it is not a regular file, or larger than `MAX_BYTES`; OSError if it cannot be
    reached: then a disk or a network fails, or the folder has changed.
    """
    try:
        size = check_regular(path).st_size
    except IrregularFile as error:
        raise BrokenImage(error.reason) from error
    if size > MAX_BYTES:
        raise BrokenImage(f"{size:,} bytes: at most {MAX_BYTES:,} are read")


def decode(content: bytes) -> Image.Image:
    """Decodes the first image in the bytes of a file: in mode "L" or "RGB", with "A" where it is transparent.

    Grey of up to 16 bits is scaled to 8, every other mode of 8 bits converted.

    Raises: BrokenImage if it is not a whole image, larger than `MAX_PIXELS`, or of values without a known
    range.
    """
    if not content:
        raise BrokenImage("an empty file")
    with _decoding():
        image = _open(io.BytesIO(content))
        image.load()
        return with_eight_bits(image)


def probe(file: IO[bytes]) -> tuple[int, tuple[int, int]]:
    """Reads channels, 1 or 3, and (width, height) of an image from its header, without decoding it.

    Raises: BrokenImage as `decode`, as far as a header tells.
    """
    with _decoding():
        image = _open(file)
        return 1 if image.mode in _GREY or image.mode.startswith("I") else 3, image.size


def _open(file: IO[bytes]) -> Image.Image:
    Image.init()
    image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if min(width, height) < 1:
        raise BrokenImage(f"{width} x {height} pixels")
    return image


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns what decoders raise into `BrokenImage`."""
    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImage(f"too many pixels: at most {MAX_PIXELS:,} are decoded") from error
    except UnidentifiedImageError as error:  # its message holds an address, another one every time
        raise BrokenImage("no image format that Pillow knows") from error
    except Exception as error:  # decoders raise nearly anything: SyntaxError, struct.error, EOFError, ...
        raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def walk(root: Path, below: str = "", others: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """Yields names relative to `root`, and sizes in bytes, of the images at any depth under root/below.

    Links are followed; hidden files and folders are left out. Files whose name does not end as that of an
    image are appended to `others`.
    Raises: UserError for what cannot be listed, a link to nothing, or a folder that is met twice.
    """
    folders, seen = [below], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        for entry in entries(root / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                status = entry.stat()
                if (status.st_dev, status.st_ino) in seen:
                    raise UserError(f"{root / name}: a link to a folder that is met already")
                seen.add((status.st_dev, status.st_ino))
                folders.append(name)
            elif is_image(entry.name):
                if "\n" in name:
                    raise UserError(f"{root / folder}: {entry.name!r}: a file name must be one line")
                yield name, entry.stat().st_size
            elif others is not None:
                others.append(name)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Lists a folder's entries that are not hidden, each with its status; UserError if one has none."""
    path = folder
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
        for entry in visible:
            path = folder / entry.name
            if entry.is_symlink() and not path.exists():
                raise UserError(f"{path}: a link to nothing; mend or remove it")
            entry.stat()  # kept by the entry
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    return visible


def is_image(name: str) -> bool:
    """Tells whether a file's name ends as that of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def with_eight_bits(image: Image.Image) -> Image.Image:
    """Converts an image to mode "L" or "RGB", or to "LA" or "RGBA" if a pixel of it is transparent.

    Raises: BrokenImage for values without a known range.
    """
    mode = image.mode
    if _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):  # Pillow reads 8 bits as unsigned
        mode = "I"
    # Old versions of Pillow read a PNG of 16 bits, and all read a PGM of 16 bits, as 32-bit integers.
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _scaled(image)
    if mode not in _GREY and mode not in _COLOUR:
        kind = {"I": "signed or 32-bit integers", "F": "floating-point numbers"}.get(mode, f"mode {mode}")
        raise BrokenImage(f"{kind}, which have no known range: store it with 8 or 16 bits a channel")
    opaque = "L" if mode in _GREY else "RGB"
    if mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("LA" if mode in _GREY else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return image
    return image.convert(opaque)


def _scaled(image: Image.Image) -> Image.Image:
    """Grey with up to 16 bits, rounded to 8; a TIFF says how many bits, and whether 0 is white."""
    tags = getattr(image, "tag_v2", {})
    most = (1 << tags.get(_BITS, (16,))[0]) - 1
    values = np.asarray(image).astype(np.uint32)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = most - values
    return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
