"""A source of images, whatever form its files have, and what the command line says about it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imf.data.batches import prefetch
from imf.data.prepare.form import Form
from imf.images import BrokenImage, check_image_file, decode, probe, read_bytes, with_eight_bits
from imf.io import check_regular
from imf.program import UserError, progress

T = TypeVar("T")
Look = tuple[int, tuple[int, int]]  # of an image: channels, 1 or 3, and (width, height)


@dataclass(frozen=True)
class Options:
    """What the command line says about the labels and names of a source.

    label_file: gives the labels.  image_key, label_key: the column, array or extension that holds them.
    unconditional: no labels are read, all images are of one class.  class_names: instead of the source's.
    """

    label_file: Path | None = None
    image_key: str | None = None
    label_key: str | None = None
    unconditional: bool = False
    class_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """Labelled images, by number.

    root: what messages call it, a folder or a file.
    files: a name per image, relative to `root` with / between the parts, and its size in bytes.
    labels: [number of images] int64 in 0 ... len(class_names) - 1.
    content: returns the image of a number as the path or the bytes of its file, or as pixels; several threads
        call it. Raises BrokenImage if there is none that can be used, OSError if it cannot be read.
    others: names of what lies beside the images and is left out.
    containers: names and sizes in bytes of files that hold many images.
    alike: whether all images are of one size and as many channels.
    """

    root: Path
    files: list[tuple[str, int]]
    labels: NDArray[np.int64]
    class_names: list[str]
    content: Callable[[int], Path | bytes | Image.Image]
    others: list[str] = field(default_factory=list)
    containers: list[tuple[str, int]] = field(default_factory=list)
    alike: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def read(self, place: int) -> Image.Image:
        """Decodes the image of this number: mode "L" or "RGB", with "A" where it is transparent.

        Raises: BrokenImage if there is none that can be used; OSError if the bytes cannot be read.
        """
        content = self.content(place)
        if isinstance(content, Image.Image):
            return with_eight_bits(content)
        return decode(read_bytes(content) if isinstance(content, Path) else content)

    def look(self, place: int) -> Look:
        """Returns channels and size of the image of this number without decoding it; raises as `read`."""
        content = self.content(place)
        if isinstance(content, Image.Image):
            return 1 if content.mode == "L" else 3, content.size
        if isinstance(content, bytes):
            return probe(io.BytesIO(content))
        check_image_file(content)
        with content.open("rb") as file:
            return probe(file)

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and labels: another listing has another one; contents are not read."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for name, size in self.containers:
            digest.update(f"\n{size}\t{name}".encode(errors="surrogateescape"))
        for (name, size), label in zip(self.files, self.labels, strict=True):
            digest.update(f"\n{label}\t{size}\t{name}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def survey(self, *, sized: bool, workers: int) -> Look | None:
        """Looks at the images: returns 1 channel if all are grey, or else 3, and the size of all.

        sized: whether the size matters; if not, the first colour image decides. None if no image can be used.
        Raises: UserError if it matters and they are of several sizes or not square.
        """
        first: tuple[str, tuple[int, int]] | None = None
        channels = 1
        places = range(1 if self.alike else len(self.files))
        looks = self._each(self.look, places, workers, 16 * workers)
        bar = progress(looks, "sizes", "image", total=len(places), brief=True)
        with closing(looks), bar:
            for place, look in zip(places, bar, strict=True):
                name = self.files[place][0]
                if isinstance(look, BrokenImage):  # listed when it is to be decoded
                    continue
                channels, size = max(channels, look[0]), look[1]
                first = first or (name, size)
                if sized and (size != first[1] or size[0] != size[1]):
                    other = "" if size == first[1] else f" and {name} of {size[0]} x {size[1]}"
                    raise UserError(
                        f"--size is needed where images are not squares of one size, got {first[0]} of "
                        f"{first[1][0]} x {first[1][1]}{other} pixels; --size 64 --fit crop (or pad) makes "
                        f"them 64 x 64"
                    )
                if channels == 3 and not sized:
                    break
        return (channels, first[1]) if first else None

    def decoded(
        self, places: Sequence[int], form: Form, workers: int, *, ahead: int
    ) -> Generator[NDArray[np.uint8] | BrokenImage, None, None]:
        """Yields the images at `places`, [C, size, size] as `form` makes them, in order; for broken ones why.

        Decoded by `workers` threads, up to `ahead` images before their use. UserError if one cannot be read.
        """
        return self._each(lambda place: form(self.read(place)), places, workers, ahead)

    def _each(
        self, make: Callable[[int], T], places: Sequence[int], workers: int, ahead: int
    ) -> Generator[T | BrokenImage, None, None]:
        """Yields what is made of each image, or why there is none; UserError if one cannot be read."""

        def made(place: int) -> T | BrokenImage:
            path = self.root / self.files[place][0]
            try:
                return make(place)
            except BrokenImage as error:
                return error
            except OSError as error:
                raise UserError(
                    f"{path}: could not be read: {error}; it was there when this began"
                ) from error
            except MemoryError as error:
                reason = "too little memory to decode it; are a smaller --size or fewer --workers enough?"
                raise UserError(f"{path}: {reason}") from error

        return prefetch(made, places, workers=workers, ahead=ahead)


def check_file(path: Path) -> int:
    """Returns the size in bytes of a file of images; UserError unless it is there and a regular file."""
    try:
        return check_regular(path).st_size
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error


def left_out(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Splits files of a folder into those to read and the names of the others.

    Of several splits the training one is read: files with "train" in their name, where there are any.
    """
    training = [path for path in paths if "train" in path.name.lower()]
    kept = training or list(paths)
    return kept, [path.name for path in paths if path not in kept]
