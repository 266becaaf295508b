"""Images in arrays: NumPy's .npy and .npz files, and IDX files, the form of MNIST."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imf.data.files import IDX_NAME
from imf.data.prepare import labels
from imf.data.prepare.labels import Labels
from imf.data.prepare.source import Options, Source, check_file
from imf.program import UserError

# Names of images and of their labels in .npz files; the first pair of which the images are there is read.
PAIRS = (
    ("x", "y"), ("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"),
    ("arr_0", "arr_1"),
)  # fmt: skip
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_npy(paths: list[Path], options: Options) -> Source:
    """Reads images in a .npy file, which is mapped into memory, and labels in the one of --labels."""
    (path,) = _one(paths, ".npy")
    images = _open(path)
    if options.label_file is None:
        found = labels.unconditional(len(images), options.class_names)
    elif options.label_file.suffix != ".npy":
        raise UserError(f"--labels must be a .npy file for images in {path.name}, got {options.label_file}")
    else:
        values = _open(options.label_file)
        found = labels.of_array(values, f"--labels {options.label_file}:", options.class_names)
    return _source(path.parent, [path], [(path.name, images)], found)


def read_npz(paths: list[Path], options: Options) -> Source:
    """Reads images and labels in a .npz file into memory: arrays of the names `PAIRS`, or those given."""
    (path,) = _one(paths, ".npz")
    with _open(path) as arrays:
        there = list(arrays)
        pairs: Sequence[tuple[str, str]] = PAIRS
        if options.image_key is not None:
            partner = dict(PAIRS).get(options.image_key, "")
            pairs = ((options.image_key, partner),)
        image_key, label_key = next((pair for pair in pairs if pair[0] in there), ("", ""))
        if not image_key:
            wanted = options.image_key or " or ".join(name for name, _ in PAIRS)
            raise UserError(
                f"{path}: must hold images in an array {wanted}, got {', '.join(there)}; --image-key NAME "
                "says which holds them"
            )
        label_key = options.label_key or label_key
        if not options.unconditional and label_key not in there:
            raise UserError(
                f"{path}: must hold labels in an array {label_key or 'of a name'}, got {', '.join(there)}; "
                "--label-key NAME says which holds them, --unconditional trains without"
            )
        images = _member(path, arrays, image_key)
        if options.unconditional:
            label_key, found = "", labels.unconditional(len(images), options.class_names)
        else:
            values = _member(path, arrays, label_key)
            found = labels.of_array(values, f"{path}: {label_key}:", options.class_names)
    others = [f"{path.name}/{name}" for name in there if name not in (image_key, label_key)]
    return replace(_source(path.parent, [path], [(path.name, images)], found), others=others)


def read_idx(paths: list[Path], options: Options) -> Source:
    """Reads IDX files (MNIST), also gzipped: of images, and of labels under the same name but for that.

    Raises: UserError if images have no labels, or labels no images.
    """
    arrays = {path: _read_idx(path) for path in paths}
    images = [path for path, array in arrays.items() if array.ndim > 1]
    rest = {_pair(path): path for path, array in arrays.items() if array.ndim == 1}
    if not images:
        raise UserError(f"{paths[0]}: must be images, got labels alone; name the file of the images too")
    used: list[Path] = []
    for path in [] if options.unconditional else images:
        partner = rest.get(_pair(path))
        if partner is None and len(images) == len(rest) == 1:
            (partner,) = rest.values()
        if partner is None:
            name = path.name.replace("images", "labels").replace("idx3", "idx1")
            raise UserError(
                f"{path}: must have its labels in {name} beside it, got no such file among SOURCE; name it "
                "too, or --unconditional trains without"
            )
        used.append(partner)
    parts = [(path.name, arrays[path]) for path in images]
    if options.unconditional:
        found = labels.unconditional(sum(len(array) for _, array in parts), options.class_names)
    else:
        for path, partner in zip(images, used, strict=True):
            if len(arrays[path]) != len(arrays[partner]):
                raise UserError(
                    f"{partner}: must have labels of the {len(arrays[path]):,} images in {path.name}, "
                    f"got {len(arrays[partner]):,}"
                )
        where = f"{', '.join(map(str, used))}:"
        found = labels.of_array(np.concatenate([arrays[x] for x in used]), where, options.class_names)
    source = _source(paths[0].parent, images + used, parts, found)
    return replace(source, others=[path.name for path in rest.values() if path not in used])


def is_idx(path: Path) -> bool:
    """Tells whether a file's name is that of an IDX file, as MNIST's are."""
    return IDX_NAME.search(path.name) is not None


def idx_files(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Splits the IDX files of a folder into those to read and the names of the others.

    MNIST's training files end where its name begins with "train", its test files begin with "t10k". Of a
    file that is there both with and without .gz the second is read.
    """
    names = {path.name for path in paths}
    single = [path for path in paths if not (path.suffix == ".gz" and path.name[:-3] in names)]
    training = [path for path in single if "train" in path.name.lower()] or single
    return training, [path.name for path in paths if path not in training]


def _source(
    root: Path, containers: Sequence[Path], parts: Sequence[tuple[str, NDArray[Any]]], found: Labels
) -> Source:
    """Makes a source of named arrays of images; UserError, naming the file, for one that holds none."""
    first = parts[0][1]
    for name, array in parts:
        where = f"{root / name}: images"
        shape = list(array.shape)
        if array.ndim == 4 and array.shape[3] not in (1, 3, 4):
            hint = "; channels first? Store np.moveaxis(x, 1, 3)" if array.shape[1] in (1, 3, 4) else ""
            raise UserError(
                f"{where} must be [N, H, W] or [N, H, W, C] with C = 1, 3 or 4, got {shape}{hint}"
            )
        if array.ndim not in (3, 4):
            hint = "; flat rows? Reshape them to [N, H, W]" if array.ndim == 2 else ""
            raise UserError(f"{where} must be [N, H, W] or [N, H, W, C], got {shape}{hint}")
        if not array.size:
            raise UserError(f"{where} must have pixels, got {shape}")
        if array.dtype != np.uint8:
            hint = ""
            if array.dtype.kind == "f":
                hint = "; store (255 * x).round().astype(np.uint8) where x is in [0, 1]"
            elif array.dtype.kind in "iu":
                hint = "; store x.astype(np.uint8) where x is in 0 ... 255"
            raise UserError(f"{where} must be uint8, got {array.dtype}{hint}")
        if array.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{where} must be [N, {', '.join(map(str, first.shape[1:]))}] like those in {parts[0][0]}, "
                f"got {shape}"
            )
    count = sum(len(array) for _, array in parts)
    if len(found[0]) != count:
        raise UserError(
            f"{root / parts[0][0]}: must have a label for each of {count:,} images, got {len(found[0]):,}"
        )
    files = [(f"{name}:{i}", math.prod(a.shape[1:])) for name, a in parts for i in range(len(a))]
    sizes = [(path.name, check_file(path)) for path in containers]
    return Source(root, files, *found, _Pixels([array for _, array in parts]), containers=sizes, alike=True)


class _Pixels:
    """Images in arrays [n, H, W] or [n, H, W, C] uint8, C = 1, 3 or 4, one after another."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]]) -> None:
        self._arrays, self._starts = arrays, np.cumsum([0, *map(len, arrays)])

    def __call__(self, place: int) -> Image.Image:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        pixels = np.asarray(self._arrays[number][place - int(self._starts[number])])
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _one(paths: list[Path], kind: str) -> list[Path]:
    if len(paths) != 1:
        raise UserError(f"SOURCE must be one {kind} file, got {len(paths)}: {paths[0]}, {paths[1]} ...")
    return paths


def _open(path: Path) -> Any:
    """Opens a .npy file, mapped into memory, or a .npz file, whose arrays are read when asked for."""
    check_file(path)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise _unreadable(path, error) from error
    if isinstance(found, np.ndarray) != (path.suffix == ".npy"):
        raise UserError(f"{path}: must be a {path.suffix} file by its content too")
    return found


def _member(path: Path, arrays: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(arrays[name])
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, MemoryError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason, hint = " ".join(str(error).split()), ""
    if "pickle" in reason or "object" in reason:
        reason, hint = "a pickle", "; objects are not unpickled: store arrays of numbers"
    return UserError(f"{path}: no whole NumPy file of plain arrays: {reason}{hint}")


def _pair(path: Path) -> str:
    """The part of a name that a file of images and that of its labels have in common."""
    name = path.name.removesuffix(".gz").lower()
    return re.sub(r"images?|labels?", "", re.sub(r"idx\d", "", name))


def _read_idx(path: Path) -> NDArray[Any]:
    """Reads an IDX file: 0, 0, type, number of sizes; the sizes, big-endian; the values."""
    check_file(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: could not be read: {error}; is it whole?") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES or not content[3]:
        raise UserError(
            f"{path}: must be an IDX file, which begins with 0, 0, a type and a count, got another"
        )
    dtype, sizes = np.dtype(_IDX_TYPES[content[2]]), content[3]
    begin = 4 + 4 * sizes
    if len(content) < begin:
        raise UserError(f"{path}: must have {sizes} sizes, got an end of the file: is it whole?")
    shape = struct.unpack(f">{sizes}I", content[4:begin])
    needed = begin + math.prod(shape) * dtype.itemsize
    if len(content) != needed:
        raise UserError(
            f"{path}: must have {needed:,} bytes for {list(shape)}, got {len(content):,}: is it whole?"
        )
    return np.frombuffer(content, dtype, offset=begin).reshape(shape)
