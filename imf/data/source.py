"""Image folders as a source of data: files, labels, and the crop that a network sees."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from imf.data.dataset import DataError

SPLITS = {"train", "val", "validation", "test"}  # folders of an ImageNet tree
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


class BrokenImage(Exception):
    """A file whose bytes could be read but are no image; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """The images of a folder, class after class.

    files: paths relative to `root` with / between the parts, each with its size in bytes.
    labels: [number of files] int64 in 0 ... len(class_names) - 1.
    """

    root: Path
    files: list[tuple[str, int]]
    labels: NDArray[np.int64]
    class_names: list[str]

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and labels: another listing has another one; contents are not read."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for (name, size), label in zip(self.files, self.labels, strict=True):
            digest.update(f"\n{label}\t{size}\t{name}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def decoded(
        self, places: Sequence[int], size: int, workers: int, *, ahead: int
    ) -> Generator[NDArray[np.uint8] | BrokenImage]:
        """The images at `places` of `files`, in that order, [3, size, size]; why, for those that are none.

        Decoded by `workers` threads, up to `ahead` images before their use. DataError if one cannot be read.
        """

        def decode_place(place: int) -> NDArray[np.uint8] | BrokenImage:
            path = self.root / self.files[place][0]
            try:
                return decode(path, size)
            except BrokenImage as error:
                return error
            except OSError as error:
                raise DataError(
                    f"{path}: could not be read: {error}; it was there when this began"
                ) from error

        pool = ThreadPoolExecutor(workers)
        pending: deque[Future[NDArray[np.uint8] | BrokenImage]] = deque()
        try:
            for place in places:
                pending.append(pool.submit(decode_place, place))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def find(root: Path, label_file: Path | None = None) -> Source:
    """The images below `root`.

    Without a label file a class is a folder in `root`, or in `root/train` of an ImageNet tree (nothing but
    splits in `root`, folders in `train`); classes, and the files of each at any depth, are in the order of
    their names. With one, its lines `file label` (tab, comma or space before the label) give every image
    below `root` a label: numbers 0, 1, ..., or names, numbered in sorted order. Hidden files, and files whose
    name does not end as that of an image, are left out.

    Raises: DataError if there is no image, a class is empty, or labels and files disagree.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; SOURCE must be a folder of images")
    if label_file is not None:
        return _with_label_file(root, label_file)
    folders = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    if "train" in folders and SPLITS.issuperset(folders) and _holds_folders(root / "train"):
        return find(root / "train")
    stray = [entry.name for entry in _entries(root) if entry.is_file() and _is_image(entry.name)]
    if stray:
        raise DataError(
            f"{root}: must hold a folder a class, got {len(stray):,} images beside them, such as {stray[0]}; "
            f"images without class folders need --labels FILE"
        )
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(_walk(root, folder))
        if not found:
            raise DataError(f"{root / folder}: must hold images, one class a folder, got none; remove it?")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{root}: must hold a folder of images a class, got no folder")
    return Source(root, files, np.array(labels, np.int64), folders)


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """The image file as the network sees it, [3, size, size]; see `center_crop`.

    Raises: BrokenImage if its bytes are no whole image; OSError if they cannot be read: that is a disk or a
    network that fails, or a source that has changed, and no reason to go on without the image.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return center_crop(image.convert("RGB"), size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything: SyntaxError, struct.error, EOFError, ...
        if isinstance(error, UnidentifiedImageError):  # its message holds an address, another one every time
            raise BrokenImage("no image format that Pillow knows") from error
        raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre of an RGB image, its shorter side scaled to `size`: [3, size, size] uint8.

    The crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), by which ImageNet figures are published: halved
    by averaging while the shorter side is at least 2 size, then bicubic, then cut, the odd pixel at the end.
    """
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
    try:
        lines = label_file.read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"--labels {label_file}: could not be read: {error}") from error
    label_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        separator = next((mark for mark in "\t," if mark in line), None)  # None: any white space
        name, *rest = line.strip().rsplit(separator, 1)
        name, label = name.strip(), "".join(rest).strip()
        if not label:
            raise DataError(f"--labels {label_file}: line {number} must be `file label`, got {line!r}")
        if label_of.setdefault(name, label) != label:
            raise DataError(
                f"--labels {label_file}: line {number} gives {name} the label {label}, a line before it "
                f"{label_of[name]}"
            )
    files = sorted(_walk(root, ""))
    if not files:
        raise DataError(f"{root}: must hold images, got none")
    without = [name for name, _ in files if name not in label_of]
    unknown = sorted(label_of.keys() - {name for name, _ in files})
    for names, what in ((without, "images have no label"), (unknown, "labels have no image")):
        if names:
            raise DataError(
                f"--labels {label_file}: {len(names):,} {what} in {root}, such as {', '.join(names[:3])}"
            )
    texts = [label_of[name] for name, _ in files]
    if all(text.isdecimal() for text in texts):
        numbers = [int(text) for text in texts]
        class_names = [str(number) for number in range(max(numbers) + 1)]
        if empty := sorted(set(range(len(class_names))) - set(numbers)):
            raise DataError(
                f"--labels {label_file}: labels must be 0 ... {len(class_names) - 1} with none left out, "
                f"got no image of label {empty[0]}"
            )
    else:
        class_names = sorted(set(texts))
        place = {name: label for label, name in enumerate(class_names)}
        numbers = [place[text] for text in texts]
    return Source(root, files, np.array(numbers, np.int64), class_names)


def _walk(root: Path, below: str) -> Iterator[tuple[str, int]]:
    """Names relative to `root`, and sizes, of the images at any depth under root/below."""
    folders = [below]
    seen = Counter[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        for entry in _entries(root / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                status = entry.stat()
                seen[status.st_dev, status.st_ino] += 1
                if seen[status.st_dev, status.st_ino] > 1:
                    raise DataError(f"{root / name}: a link to a folder that is met already")
                folders.append(name)
            elif _is_image(entry.name):
                if "\n" in name:
                    raise DataError(f"{root / folder}: {entry.name!r}: a file name must be one line")
                try:
                    yield name, entry.stat().st_size
                except OSError as error:
                    raise DataError(f"{root / name}: could not be read: {error}") from error


def _holds_folders(folder: Path) -> bool:
    """Whether folders lie in it, and no image: a class named train is not taken for a split."""
    entries = _entries(folder)
    return any(entry.is_dir() for entry in entries) and not any(_is_image(entry.name) for entry in entries)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: could not be read: {error}") from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS
