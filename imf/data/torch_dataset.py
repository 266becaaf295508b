"""A data set in memory, read from a `torch.utils.data.Dataset`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imf.data.files import short
from imf.data.memory import UNCONDITIONAL, LabelledImages
from imf.images import BrokenImage, with_eight_bits
from imf.program import UserError, progress


def from_dataset(
    dataset: Any, *, num_classes: int | None = None, class_names: Sequence[str] | None = None
) -> LabelledImages:
    """Reads a map-style `torch.utils.data.Dataset` of (image, label) pairs into memory, each item once.

    Random transforms in the dataset are thus applied once and not again in every epoch. The order is that of
    the dataset; 8-bit images stay 8-bit in memory.

    dataset: has a length, and items (image, label), or images alone: these get one class, `UNCONDITIONAL`.
        image: a PIL image; a uint8 tensor or array, or a float tensor or array in [-1, 1], [C, H, W] or
            [H, W], an array also [H, W, C]; C = 1 or 3. All of one square size, grey or colour.
        label: an integer, also a NumPy one or that of a tensor with one element.
    num_classes: default: the number of names, or else the largest label + 1, where no label may be missing.
    class_names: a name per label; default: the dataset's `classes`, as torchvision has them, or else "0", ...
    Raises: UserError, naming the item, for one that is not as above; for labels that do not fit the classes;
        for more images than the memory of this machine holds.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise _wrong(
            "dataset must be map-style, with a length and an item per number, "
            f"got {type(dataset).__name__}; a stream can be made a list of its items first"
        )
    if not (count := len(dataset)):
        raise _wrong("dataset must have an item, got an empty one")
    names = class_names
    if names is None and _are_names(of_dataset := getattr(dataset, "classes", None)):
        names = of_dataset
    labels: list[int | None] = []
    images = torch.empty(0)
    lowest = 0.0
    for index in progress(range(count), "reading", "image", brief=True):
        item = dataset[index]  # not by iteration, which a class without __iter__ ends by an IndexError
        image, label = _parts(item, index)
        image = _pixels(image, index)
        if not index:
            images = _empty(count, image)
        first = images[0]
        if image.shape != first.shape or image.dtype != images.dtype:
            raise _wrong(
                f"dataset[{index}]: image must be {list(first.shape)} {images.dtype} like the first, got "
                f"{list(image.shape)} {image.dtype}; bring all to one size, channels and type in the dataset"
            )
        images[index] = image
        labels.append(label)
        if image.is_floating_point():
            lowest = min(lowest, float(image.min()))
    if images.is_floating_point() and lowest >= 0 and images.max() > 0:
        raise _wrong(
            "float images must fill [-1, 1], got no value below 0: those of ToTensor, in [0, 1]? "
            "Map them by 2 * x - 1, or keep them uint8"
        )
    y, names = _classes(labels, num_classes, names)
    return LabelledImages(images, y, names)


def _parts(item: Any, index: int) -> tuple[Any, int | None]:
    """Splits an item into image and label, None where there is none."""
    if not isinstance(item, (tuple, list)):
        if isinstance(item, dict):
            raise _wrong(
                f"dataset[{index}] must be (image, label) or an image, got a dict of {list(item)}; "
                "a list of (item['image'], item['label']) does as well"
            )
        return item, None
    if len(item) not in (1, 2):
        raise _wrong(f"dataset[{index}] must be (image, label) or an image, got {len(item)} parts")
    image, label = item if len(item) == 2 else (*item, None)
    if label is None:
        return image, None
    if isinstance(label, (Tensor, np.ndarray)):
        one = (label.numel() if isinstance(label, Tensor) else label.size) == 1
        label = label.item() if one else label
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        hint = "; number the names, and pass them as class_names" if isinstance(label, str) else ""
        raise _wrong(f"dataset[{index}]: label must be an integer, got {short(label)}{hint}")
    if not 0 <= label < 2**31:
        raise _wrong(f"dataset[{index}]: label must be at least 0 and below 2 ** 31, got {label}")
    return image, int(label)


def _pixels(image: Any, index: int) -> Tensor:
    """Returns an image as a tensor [C, S, S], uint8 or fp32 in [-1, 1]."""
    name = f"dataset[{index}]: image"
    if isinstance(image, Image.Image):
        try:
            eight_bits = with_eight_bits(image)
        except BrokenImage as error:
            raise _wrong(f"{name} must have 8 bits per channel, got {error}") from error
        if eight_bits.mode.endswith("A"):
            raise _wrong(
                f"{name} must be opaque, got transparent pixels (mode {image.mode}); compose it over a "
                "colour, or drop the transparency by .convert('RGB')"
            )
        image = np.asarray(eight_bits)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uif":
            raise _wrong(f"{name} must be uint8, or float in [-1, 1], got {image.dtype}")
        last = image.ndim == 3 and (image.shape[2] in (1, 3) or (image.shape[2] == 4 and len(image) > 4))
        x = torch.from_numpy(np.array(np.moveaxis(image, 2, 0) if last else image, order="C"))  # a copy
    elif isinstance(image, Tensor):
        x = image.detach().cpu()
    else:
        hint = "; add a transform that makes a tensor of it" if image is not None else ""
        raise _wrong(f"{name} must be a PIL image, a tensor or an array, got {type(image).__name__}{hint}")
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or len(x) not in (1, 3):
        hint = ""
        if x.ndim == 3 and x.shape[2] in (1, 3):
            hint = "; channels last? image.permute(2, 0, 1)"
        elif x.ndim == 3 and len(x) in (2, 4):
            hint = "; with transparency? Compose it over a colour, or leave its channel out"
        elif x.ndim == 4:
            hint = "; a batch? Items are single images"
        raise _wrong(f"{name} must be [C, H, W] with 1 or 3 channels, got {list(image.shape)}{hint}")
    if x.shape[1] != x.shape[2] or not x.numel():
        raise _wrong(f"{name} must be square, got {x.shape[1]} x {x.shape[2]}; crop or pad it in the dataset")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise _wrong(f"{name} must be uint8, or float in [-1, 1], got {x.dtype}; image.to(torch.uint8)")
    low, high = map(float, x.float().aminmax())
    if not (low >= -1 and high <= 1):  # also NaN
        hint = "; in 0 ... 255? Keep it uint8, or map it by x / 127.5 - 1" if high > 1 and low >= 0 else ""
        raise _wrong(f"{name} must be finite in [-1, 1], got {low:g} ... {high:g}{hint}")
    return x.float()


def _empty(count: int, image: Tensor) -> Tensor:
    """Allocates `count` images like this one; UserError where the machine has less memory."""
    needed, memory = count * image.nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise _wrong(
            f"{count:,} images {list(image.shape)} {image.dtype} need {needed:,} bytes of memory, this "
            f"machine has {memory:,}; store them as files and pack them by python -m imf.data.prepare"
        )
    return torch.empty(count, *image.shape, dtype=image.dtype)


def _classes(
    labels: list[int | None], num_classes: int | None, names: Sequence[str] | None
) -> tuple[Tensor, Sequence[str]]:
    """Returns labels [N] int64 and a name per label, after checking that they agree."""
    without = [index for index, label in enumerate(labels) if label is None]
    if 0 < len(without) < len(labels):
        raise _wrong(
            f"every item or none must have a label, got none for dataset[{without[0]}] and "
            f"{len(without) - 1} others of {len(labels)}"
        )
    if names is not None and (isinstance(names, str) or not _are_names(names)):
        raise _wrong(f"class_names must be a list of different texts, got {short(names)}")
    if without:
        names = names or [UNCONDITIONAL]
        if len(names) != 1 or num_classes not in (None, 1):
            got = num_classes if num_classes not in (None, 1) else len(names)
            raise _wrong(f"num_classes must be 1 for images without labels, got {got}")
        return torch.zeros(len(labels), dtype=torch.int64), names
    y = torch.tensor(labels, dtype=torch.int64)
    most = int(y.max())
    if names is not None and num_classes not in (None, len(names)):
        raise _wrong(f"num_classes must be {len(names)}, as there are names, got {num_classes}")
    if names is not None:
        num_classes = len(names)
    if num_classes is None:
        missing = sorted(set(range(most + 1)) - set(labels))
        if missing:
            raise _wrong(
                f"labels must be 0 ... {most} with none left out, got no image of label {missing[0]}; "
                f"number them without gaps, or pass num_classes if this is meant"
            )
        num_classes = most + 1
    if most >= num_classes:
        raise _wrong(
            f"dataset[{labels.index(most)}]: label must be below the {num_classes} classes, got {most}; "
            "labels begin at 0"
        )
    return y, names or [str(label) for label in range(num_classes)]


def _are_names(names: Any) -> TypeGuard[Sequence[str]]:
    texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return texts and 0 < len(names) == len(set(names))


def _wrong(text: str) -> UserError:
    return UserError(f"from_dataset: {text}")
