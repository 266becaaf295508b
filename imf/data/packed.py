"""Packed data: a folder of memory-mapped shards that `imf.data.prepare` wrote, read in any order.

A row of latents holds mean and standard deviation of an image's posterior, fp32 [2, C, H, W]; a row of pixels
the image, uint8 [C, H, W]. docs/data.md describes the folder to the byte.
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imf.data import files
from imf.data.batches import row_seeds
from imf.data.files import SHA256, Check, check_fields
from imf.images import is_image
from imf.io import check_regular, read_json, sha256
from imf.program import UserError

FORMAT = 1  # raise it when a folder of the old form can no longer be read
INDEX, PLAN, LABELS = "index.json", "prepare.json", "labels.npy"
# Of a stored row: the shape before (C, H, W), and the dtype.
ROWS = {"latents": ((2,), "float32"), "pixels": ((), "uint8")}
_FIELDS: dict[str, Check] = {
    "kind": ("latents or pixels", lambda x: x in list(ROWS)),
    "shape": ("[C, H, W]", files.list_of(files.count(1)[1], 3)),
    "class_names": ("a list of names", lambda x: x != [] and files.list_of(lambda y: isinstance(y, str))(x)),
    "rows": files.count(1),
    "skipped": files.count(0),
    "labels_sha256": SHA256,
    "shards": ("a list", lambda x: isinstance(x, list)),
}
SHARD_FIELDS: dict[str, Check] = {
    "file": (  # nothing outside of the folder is opened, whoever wrote the index
        "the name of a .npy file in this folder",
        lambda x: isinstance(x, str) and re.fullmatch(r"[^/\\\0]+\.npy", x) is not None,
    ),
    "rows": files.count(1),
    "bytes": files.count(1),
    "sha256": SHA256,
}
# Norm of a row in standard deviations of the channels: no image is that far off, and the square of the loss
# still fits into fp32.
LARGEST = 1e6
# Names of files of many images, see `imf.data.prepare.formats`. Not .npy: shards end so.
_RAW = re.compile(rf"\.(npz|tar|parquet|arrow)$|{files.IDX_NAME.pattern}", re.IGNORECASE)


class PackedData:
    """The data set in a folder of `imf.data.prepare`; see `imf.data.DataSet`.

    kind: "latents" or "pixels".  class_names: a name per label.  labels: [N] int64.
    mean, std: [C] fp32; the network sees (value - mean) / std, where a value is a sample of the posterior.
    autoencoder: digest of the one that made the latents.  index: the content of index.json.
    shards: `file`, `rows`, `bytes` and `sha256` of each.

    Raises: UserError if the folder is missing or incomplete, or a file of it is missing, truncated or
    disagrees with the index. `verify` reads the shards and checks their bytes too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.kind: str = self.index["kind"]
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self.class_names: list[str] = self.index["class_names"]
        self.num_classes = len(self.class_names)
        encoder: dict[str, Any] = self.index["encoder"]
        self.mean, self.std = (torch.tensor([float(x) for x in encoder[name]]) for name in ("mean", "std"))
        self.autoencoder: str = encoder.get("vae_sha256", "")
        self.shards: list[dict[str, Any]] = self.index["shards"]
        parts, dtype = ROWS[self.kind]
        self._arrays = [
            _MappedArray(self.folder / s["file"], (s["rows"], *parts, *self.shape), dtype, s["bytes"])
            for s in self.shards
        ]
        self._starts = torch.tensor([0, *(shard["rows"] for shard in self.shards)]).cumsum(0)
        path = self.folder / LABELS
        self.labels = _MappedArray(path, (len(self),), "int64").rows.clone()  # which may be written to
        least, most = self.labels.min(), self.labels.max()
        if least < 0 or most >= self.num_classes:
            raise UserError(f"{path}: labels must be in [0, {self.num_classes}), got {least} ... {most}")
        _check_sha256(path, self.index["labels_sha256"])

    def __len__(self) -> int:
        return int(self.index["rows"])

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns normalised data and labels of `rows`, see `DataSet.fetch`; latents are posterior samples.

        Raises: ValueError unless rows is [B] int64 with values in 0 ... len(self) - 1; UserError, naming the
        file, for a row that is not finite or larger than `LARGEST`.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"fetch: rows must be [B] int64, got {list(rows.shape)} {rows.dtype}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(f"fetch: rows must be in [0, {len(self)}), got {rows.min()} ... {rows.max()}")
        seeds = row_seeds(generator, len(rows)).tolist()
        x = torch.empty(len(rows), *self.shape)
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        noise_of_row = torch.Generator()
        # Row by row: a latent lies in the cache, and these operations on it are too small to be spread over
        # threads, which the network needs.
        for seed, row, out in zip(seeds, self._gather(rows), x, strict=True):
            if self.kind == "pixels":
                out.copy_(row)
            else:
                noise_of_row.manual_seed(seed)
                torch.addcmul(row[0], row[1], out.normal_(generator=noise_of_row), out=out)
            out.sub_(mean).div_(std)
        norms = torch.linalg.vector_norm(x.flatten(1), dim=1)
        fine = norms <= LARGEST  # False for NaN
        if not fine.all():
            at = int(fine.int().argmin())
            ((shard, row_in_shard),) = self._places(rows[at : at + 1])
            raise UserError(
                f"{self.folder / self.shards[shard]['file']}: row {row_in_shard} must be finite and within "
                f"{LARGEST:g} deviations of its channels' means, got a norm of {norms[at]:g}; "
                f"python -m imf.data.prepare --verify {self.folder} tells whether the file has changed"
            )
        return x, self.labels[rows]

    def images(self, rows: Tensor) -> Tensor:
        """Returns pixels [B, C, H, W] uint8 of `rows` [B] int64; ValueError for latents."""
        if self.kind != "pixels":
            raise ValueError(f"images: {self.folder} must hold pixels, got {self.kind}")
        return torch.stack(self._gather(rows))

    def verify(self) -> Iterator[dict[str, Any]]:
        """Reads every shard; yields each whose checksum agrees, raises UserError at one that does not."""
        for shard in self.shards:
            _check_sha256(self.folder / shard["file"], shard["sha256"])
            yield shard

    def _places(self, rows: Tensor) -> list[tuple[int, int]]:
        """Shards and row in it of each of `rows`."""
        shards = torch.searchsorted(self._starts, rows, right=True) - 1
        return list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))

    def _gather(self, rows: Tensor) -> list[Tensor]:
        """Returns the stored rows, views of the mapped files, after asking for all of their pages at once."""
        places = self._places(rows)
        for shard, row in places:
            self._arrays[shard].will_need(row)
        return [self._arrays[shard].rows[row] for shard, row in places]


class _MappedArray:
    """The array in a .npy file: `rows` is a tensor on the file's pages, which are read when they are used.

    Raises: UserError unless the file has that shape, dtype and, where given, size in bytes.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, size: int | None = None) -> None:
        try:
            got_size = check_regular(path).st_size
            with path.open("rb") as file:
                got_shape, got_dtype = files.read_header(file)
                self._offset = file.tell()  # bytes before the first row
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: not a whole .npy file: {error}") from error
        if got_shape != shape or got_dtype != np.dtype(dtype):
            raise UserError(
                f"{path}: must be {list(shape)} {dtype}, as {INDEX} says, got {list(got_shape)} {got_dtype}"
            )
        expected = self._offset + math.prod(shape) * got_dtype.itemsize
        for source, wanted in ((INDEX, got_size if size is None else size), ("its header", expected)):
            if got_size != wanted:
                raise UserError(
                    f"{path}: must have {wanted:,} bytes, as {source} says, got {got_size:,}: truncated, or "
                    f"of another data set"
                )
        with warnings.catch_warnings():
            # PyTorch has no read-only tensors. These rows are only read, and never leave `PackedData`.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            values = torch.frombuffer(self._memory, dtype=getattr(torch, dtype), offset=self._offset)
        self.rows = values.reshape(shape)

    def will_need(self, row: int) -> None:
        """Has the pages of a row read in the background: a batch's rows then come together, not in turn."""
        if hasattr(mmap, "MADV_WILLNEED"):
            size = self.rows.stride(0) * self.rows.element_size()
            first = (self._offset + row * size) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, first, self._offset + (row + 1) * size - first)


def _read_index(folder: Path) -> dict[str, Any]:
    """Reads and checks the index of a folder, perhaps a foreign one; UserError if it cannot be used."""
    path = folder / INDEX
    if _is_raw(folder):
        out = f"{folder.name.partition('.')[0]}-packed"
        raise UserError(
            f"{folder}: holds raw images; pack them once by python -m imf.data.prepare {folder} {out} "
            f"--pixels (with --size where they differ in size), then pass {out}"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a data set is 'digits' or a folder of imf.data.prepare")
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise UserError(f"{folder}: half-made: the same python -m imf.data.prepare command resumes it")
        raise UserError(f"{folder}: no {INDEX} in it, so it is not a folder of imf.data.prepare")
    index = read_json(path)
    if type(got := index.get("format")) is not int or got != FORMAT:  # True == 1
        raise UserError(f"{path}: of format {files.short(got)}, this version reads {FORMAT}: make it again")
    try:
        _check_index(index)
    except ValueError as error:
        reason = f"disagrees with itself or is damaged: {error}; prepare the folder again"
        raise UserError(f"{path}: {reason}") from error
    return index


def _is_raw(path: Path) -> bool:
    """Tells whether a path, which is to be a packed folder, is one of raw images, or a file of them."""
    if path.is_file():
        return is_image(path.name) or _RAW.search(path.name) is not None
    if not path.is_dir() or (path / INDEX).exists() or (path / PLAN).exists():
        return False
    near = itertools.chain(
        path.glob("*"), path.glob("*/*"), path.glob("*/*/*")
    )  # a class tree ends the walk soon
    return any(is_image(x.name) or _RAW.search(x.name) for x in itertools.islice(near, 10_000))


def _check_index(index: dict[str, Any]) -> None:
    """ValueError, naming the field, unless every field that is read has its type and they agree."""
    check_fields(index, _FIELDS)
    channels = index["shape"][0]
    finite, positive = files.numbers(channels), files.numbers(channels, 1e-30, 1e30, "positive")
    check_fields(index.get("encoder"), {"mean": finite, "std": positive}, "encoder.")
    if "vae_sha256" in index["encoder"]:
        check_fields(index["encoder"], {"vae_sha256": SHA256}, "encoder.")
    if index.get("samples") is not None:
        check_fields(index["samples"], {"mean": finite, "std": finite}, "samples.")
    for number, shard in enumerate(index["shards"]):
        check_fields(shard, SHARD_FIELDS, f"shards[{number}].")
    names = [shard["file"] for shard in index["shards"]]
    if len(set(names)) != len(names):
        raise ValueError(f"shards must be of different files, got {files.short(names)}")
    total = sum(shard["rows"] for shard in index["shards"])
    if total != index["rows"]:
        raise ValueError(f"{index['rows']} rows, but the {len(names)} shards have {total}")


def _check_sha256(path: Path, wanted: str) -> None:
    try:
        got = sha256(path)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    if got != wanted:
        raise UserError(
            f"{path}: its SHA-256 must be {wanted}, as {INDEX} says, got {got}; the file has changed since "
            f"it was written: prepare the folder again, or copy this file again"
        )
