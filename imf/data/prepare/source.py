"""Image folders as a source of data: files, labels, and the crop that a network sees."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imf.data.batches import prefetch
from imf.data.files import short
from imf.images import BrokenImage, entries, is_image, read_image, walk
from imf.io import check_regular
from imf.program import UserError

SPLITS = {"train", "val", "validation", "test"}  # folders of an ImageNet tree
LONGEST = 32  # of the longer side, in shorter sides, that is scaled; what is beyond is cut off first
_NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The images of a folder, class after class.

    files: paths relative to `root` with / between the parts, each with its size in bytes.
    labels: [number of files] int64 in 0 ... len(class_names) - 1.
    others: files in the same folders whose names do not end as that of an image; they are left out.
    """

    root: Path
    files: list[tuple[str, int]]
    labels: NDArray[np.int64]
    class_names: list[str]
    others: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and labels: another listing has another one; contents are not read."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for (name, size), label in zip(self.files, self.labels, strict=True):
            digest.update(f"\n{label}\t{size}\t{name}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def decoded(
        self, places: Sequence[int], size: int, workers: int, *, ahead: int
    ) -> Generator[NDArray[np.uint8] | BrokenImage, None, None]:
        """Yields the images at `places` of `files`, [3, size, size], in that order; for broken ones why.

        Decoded by `workers` threads, up to `ahead` images before their use. UserError if one cannot be read.
        """
        return prefetch(lambda place: self._decode(place, size), places, workers=workers, ahead=ahead)

    def _decode(self, place: int, size: int) -> NDArray[np.uint8] | BrokenImage:
        path = self.root / self.files[place][0]
        try:
            return decode(path, size)
        except BrokenImage as error:
            return error
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error}; it was there when this began") from error
        except MemoryError as error:
            reason = f"too little memory to decode it at --size {size}; are fewer --workers enough?"
            raise UserError(f"{path}: {reason}") from error


def find(root: Path, label_file: Path | None = None) -> Source:
    """Lists the images below `root`.

    Without a label file a class is a folder in `root`, or in `root/train` of an ImageNet tree (nothing but
    splits in `root`, folders in `train`); classes, and the files of each at any depth, are in the order of
    their names. With one, its lines `file label` (tab, comma or space before the label) give every image
    below `root` a label: numbers 0, 1, ..., or names, numbered in sorted order. Hidden files, and files whose
    name does not end as that of an image, are left out.

    Raises: UserError if there is no image, a class is empty, or labels and files disagree.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; SOURCE must be a folder of images")
    if label_file is not None:
        return _with_label_file(root, label_file)
    found = entries(root)
    folders = sorted(entry.name for entry in found if entry.is_dir())
    if "train" in folders and SPLITS.issuperset(folders):
        inside = entries(root / "train")  # a class named train, which holds images, is not taken for a split
        if any(x.is_dir() for x in inside) and not any(is_image(x.name) for x in inside):
            return find(root / "train")
    if stray := [entry.name for entry in found if is_image(entry.name) and not entry.is_dir()]:
        raise UserError(
            f"{root}: must hold a folder per class, got {len(stray):,} images beside them, "
            f"such as {stray[0]}; images without class folders need --labels FILE"
        )
    files, labels, others = [], [], list[str]()
    for label, folder in enumerate(folders):
        images = sorted(walk(root, folder, others))
        if not images:
            raise UserError(f"{root / folder}: must hold images, one class per folder, got none; remove it?")
        files += images
        labels += [label] * len(images)
    if not files:
        raise UserError(f"{root}: must hold a folder of images per class, got no folder")
    return Source(root, files, np.array(labels, np.int64), folders, others)


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """Reads an image file as the network sees it, [3, size, size]; raises as `read_image`."""
    return center_crop(read_image(path).convert("RGB"), size)


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Crops the centre of an RGB image, its shorter side scaled to `size`: [3, size, size] uint8.

    The crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), by which ImageNet figures are published: halved
    by averaging while the shorter side is at least 2 size, then bicubic, then cut, the odd pixel at the end.
    """
    width, height = image.size
    most = LONGEST * min(width, height)
    x, y = (max(0, length - most + 1) // 2 for length in (width, height))  # as much at both ends
    if x or y:  # scaled in full, a line of 20,000 pixels would become 256 lines of 5 million
        image = image.crop((x, y, width - x, height - y))
        width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image)[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _with_label_file(root: Path, label_file: Path) -> Source:
    prefix = f"--labels {label_file}:"
    try:
        check_regular(label_file)
        lines = label_file.read_text("utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{prefix} could not be read: {error}") from error
    label_of: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        separator = next((mark for mark in "\t," if mark in line), None)  # None: any white space
        name, label = map(str.strip, [*line.rsplit(separator, 1), ""][:2])
        if not label:
            raise UserError(f"{prefix} line {number} must be `file label`, got {short(line)}")
        if (before := label_of.setdefault(name, label)) != label:
            raise UserError(
                f"{prefix} line {number} gives {name} the label {label}, a line before it {before}"
            )
    others: list[str] = []
    files = sorted(walk(root, "", others))
    if not files:
        raise UserError(f"{root}: must hold images, got none")
    without = [name for name, _ in files if name not in label_of]
    unknown = sorted(label_of.keys() - {name for name, _ in files})
    for names, what in ((without, "images have no label"), (unknown, "labels have no image")):
        if names:
            raise UserError(f"{prefix} {len(names):,} {what} in {root}, such as {', '.join(names[:3])}")
    class_names = sorted({label_of[name] for name, _ in files})
    number_of = {text: number for number, text in enumerate(class_names)}
    if all(map(_NUMBER.fullmatch, class_names)):
        if wrong := [text for text in class_names if not (text.isdecimal() and len(text) <= 18)]:
            raise UserError(f"{prefix} labels must be 0, 1, 2 ... or names, got {short(wrong[0])}")
        number_of = {text: int(text) for text in class_names}
        numbers = sorted(set(number_of.values()))
        if missing := [expected for expected, number in enumerate(numbers) if number != expected]:
            raise UserError(
                f"{prefix} labels must be 0 ... {numbers[-1]} with none left out, "
                f"got no image of label {missing[0]}"
            )
        class_names = [str(number) for number in numbers]
    labels = np.array([number_of[label_of[name]] for name, _ in files], np.int64)
    return Source(root, files, labels, class_names, others)
