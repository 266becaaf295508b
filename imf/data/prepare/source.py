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
        """The images at `places` of `files`, in that order, [3, size, size]; why, for those that are none.

        Decoded by `workers` threads, up to `ahead` images before their use. UserError if one cannot be read.
        """

        def decode_place(place: int) -> NDArray[np.uint8] | BrokenImage:
            path = self.root / self.files[place][0]
            try:
                return decode(path, size)
            except BrokenImage as error:
                return error
            except OSError as error:
                raise UserError(
                    f"{path}: could not be read: {error}; it was there when this began"
                ) from error
            except MemoryError as error:
                raise UserError(
                    f"{path}: too little memory to decode it at --size {size}; are fewer --workers enough?"
                ) from error

        return prefetch(decode_place, places, workers=workers, ahead=ahead)


def find(root: Path, label_file: Path | None = None) -> Source:
    """The images below `root`.

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
    folders = sorted(entry.name for entry in entries(root) if entry.is_dir())
    if "train" in folders and SPLITS.issuperset(folders) and _holds_folders(root / "train"):
        return find(root / "train")
    stray = [entry.name for entry in entries(root) if is_image(entry.name) and not entry.is_dir()]
    if stray:
        raise UserError(
            f"{root}: must hold a folder a class, got {len(stray):,} images beside them, such as {stray[0]}; "
            f"images without class folders need --labels FILE"
        )
    files, labels, others = [], [], list[str]()
    for label, folder in enumerate(folders):
        found = sorted(walk(root, folder, others))
        if not found:
            raise UserError(f"{root / folder}: must hold images, one class a folder, got none; remove it?")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{root}: must hold a folder of images a class, got no folder")
    return Source(root, files, np.array(labels, np.int64), folders, others)


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """The image file as the network sees it, [3, size, size]; see `center_crop`. Raises as `read_image`."""
    return center_crop(read_image(path).convert("RGB"), size)


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre of an RGB image, its shorter side scaled to `size`: [3, size, size] uint8.

    The crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), by which ImageNet figures are published: halved
    by averaging while the shorter side is at least 2 size, then bicubic, then cut, the odd pixel at the end.
    """
    image = _shortened(image)
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


def _shortened(image: Image.Image) -> Image.Image:
    """The image without the ends of its longer side that are further away than the crop can reach.

    Scaled in full, a line of 20,000 pixels would become 256 lines of 5 million.
    """
    width, height = image.size
    most = LONGEST * min(width, height)
    x, y = (max(0, length - most + 1) // 2 for length in (width, height))  # as much at both ends
    return image.crop((x, y, width - x, height - y)) if x or y else image


def _with_label_file(root: Path, label_file: Path) -> Source:
    try:
        check_regular(label_file)
        lines = label_file.read_text("utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"--labels {label_file}: could not be read: {error}") from error
    label_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        separator = next((mark for mark in "\t," if mark in line), None)  # None: any white space
        name, *rest = line.strip().rsplit(separator, 1)
        name, label = name.strip(), "".join(rest).strip()
        if not label:
            raise UserError(f"--labels {label_file}: line {number} must be `file label`, got {short(line)}")
        if label_of.setdefault(name, label) != label:
            raise UserError(
                f"--labels {label_file}: line {number} gives {name} the label {label}, a line before it "
                f"{label_of[name]}"
            )
    others: list[str] = []
    files = sorted(walk(root, "", others))
    if not files:
        raise UserError(f"{root}: must hold images, got none")
    without = [name for name, _ in files if name not in label_of]
    unknown = sorted(label_of.keys() - {name for name, _ in files})
    for names, what in ((without, "images have no label"), (unknown, "labels have no image")):
        if names:
            raise UserError(
                f"--labels {label_file}: {len(names):,} {what} in {root}, such as {', '.join(names[:3])}"
            )
    texts = [label_of[name] for name, _ in files]
    if all(_NUMBER.fullmatch(text) for text in texts):
        numbers = _consecutive(texts, label_file)
        class_names = [str(number) for number in range(max(numbers) + 1)]
    else:
        class_names = sorted(set(texts))
        place = {name: label for label, name in enumerate(class_names)}
        numbers = [place[text] for text in texts]
    return Source(root, files, np.array(numbers, np.int64), class_names, others)


def _consecutive(texts: list[str], label_file: Path) -> list[int]:
    """The labels as numbers; UserError unless they are 0 ... n - 1 with none left out."""
    wrong = next((text for text in texts if not (text.isdecimal() and len(text) <= 18)), None)
    if wrong is not None:
        raise UserError(f"--labels {label_file}: labels must be 0, 1, 2 ... or names, got {short(wrong)}")
    numbers = [int(text) for text in texts]
    for expected, number in enumerate(sorted(set(numbers))):
        if number != expected:
            raise UserError(
                f"--labels {label_file}: labels must be 0 ... {max(numbers)} with none left out, "
                f"got no image of label {expected}"
            )
    return numbers


def _holds_folders(folder: Path) -> bool:
    """Whether folders lie in it, and no image: a class named train is not taken for a split."""
    inside = entries(folder)
    return any(entry.is_dir() for entry in inside) and not any(is_image(entry.name) for entry in inside)
