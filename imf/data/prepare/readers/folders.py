"""Image files in folders: one folder per class, a folder with a list of labels, or images without classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imf.data.files import short
from imf.data.prepare import labels
from imf.data.prepare.labels import Labels
from imf.data.prepare.source import Options, Source
from imf.images import entries, is_image, walk
from imf.io import check_regular
from imf.program import UserError, progress

SPLITS = {"train", "val", "validation", "test"}  # folders of an ImageNet tree


def read_folder(root: Path, options: Options) -> Source:
    """Lists the images below `root`.

    Without a label file a class is a folder in `root`, or in `root/train` of an ImageNet tree (nothing but
    splits in `root`, folders in `train`); classes, and the files of each at any depth, are in the order of
    their names. With one, its lines `file label` (tab, comma or space before the label) give every image
    below `root` a label: numbers 0, 1, ..., or names, numbered in sorted order. A folder that holds images
    and no folder has one class. Hidden files, and files whose name does not end as that of an image, are
    left out.

    Raises: UserError if there is no image, a class is empty, or labels and files disagree.
    """
    if options.label_file is not None:
        return _with_label_file(root, options.label_file, options)
    found = entries(root)
    folders = sorted(entry.name for entry in found if entry.is_dir())
    stray = [entry.name for entry in found if is_image(entry.name) and not entry.is_dir()]
    others: list[str] = []
    if options.unconditional or (stray and not folders):
        files = _all_images(root, others)
        return _source(root, files, labels.unconditional(len(files), options.class_names), others)
    if "train" in folders and SPLITS.issuperset(folders):
        inside = entries(root / "train")  # a class named train, which holds images, is not taken for a split
        if any(x.is_dir() for x in inside) and not any(is_image(x.name) for x in inside):
            return read_folder(root / "train", options)
    if stray:
        raise UserError(
            f"{root}: must hold a folder per class, got {len(stray):,} images beside them, such as "
            f"{stray[0]}; images without class folders need --labels FILE, or --unconditional"
        )
    files, numbers = [], list[int]()
    bar = progress(folders, "listing", "class", brief=True)
    for number, folder in enumerate(bar):
        images = sorted(walk(root, folder, others))
        if not images:
            raise UserError(f"{root / folder}: must hold images, one class per folder, got none; remove it?")
        files += images
        numbers += [number] * len(images)
    if not files:
        raise UserError(
            f"{root}: must hold a folder of images per class, got none; files that hold many images "
            "each, such as .npz, are named themselves"
        )
    names = labels.renamed(folders, options.class_names)
    return _source(root, files, (np.array(numbers, np.int64), names), others)


def _source(root: Path, files: list[tuple[str, int]], found: Labels, others: list[str]) -> Source:
    return Source(root, files, *found, lambda place: root / files[place][0], others)


def _all_images(root: Path, others: list[str]) -> list[tuple[str, int]]:
    files = sorted(walk(root, "", others))
    if not files:
        raise UserError(f"{root}: must hold images, got none")
    return files


def _with_label_file(root: Path, label_file: Path, options: Options) -> Source:
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
    files = _all_images(root, others)
    without = [name for name, _ in files if name not in label_of]
    unknown = sorted(label_of.keys() - {name for name, _ in files})
    for names, what in ((without, "images have no label"), (unknown, "labels have no image")):
        if names:
            raise UserError(f"{prefix} {len(names):,} {what} in {root}, such as {', '.join(names[:3])}")
    texts = [label_of[name] for name, _ in files]
    return _source(root, files, labels.of_texts(texts, prefix, options.class_names), others)
