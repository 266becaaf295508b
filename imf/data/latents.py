"""Packed data: a folder of memory-mapped shards that `imf.data.prepare` wrote, read in any order.

A row of latents holds mean and standard deviation of an image's posterior, fp32 [2, C, H, W]; a row of pixels
the image, uint8 [3, H, W]. docs/data.md has the folder to the byte.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imf.data.dataset import DataError, row_seeds
from imf.data.files import read_json, sha256

FORMAT = 1  # raise it when a folder of the old form can no longer be read
INDEX, PLAN, LABELS = "index.json", "prepare.json", "labels.npy"
_ROW_SHAPES = {"latents": (2,), "pixels": ()}  # before (C, H, W)
_DTYPES = {"latents": "float32", "pixels": "uint8"}


@dataclass(frozen=True)
class Shard:
    """A shard as the index names it; sha256 is of the whole file."""

    file: str
    rows: int
    bytes: int
    sha256: str


class PackedData:
    """The data set in a folder of `imf.data.prepare`; see `imf.data.DataSet`.

    kind: "latents" or "pixels".  class_names: a name a label.  labels: [N] int64.
    mean, std: [C] fp32; the network sees (value - mean) / std, where a value is a sample of the posterior.
    autoencoder: digest of the one that made the latents.  index: all that index.json says.

    Raises: DataError if the folder is missing, half-made, or a file of it is missing, truncated or disagrees
    with the index. `verify` reads the shards and checks their bytes too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        try:
            self.kind: str = self.index["kind"]
            self._shape: tuple[int, int, int] = tuple(self.index["shape"])
            self.class_names: list[str] = self.index["class_names"]
            self.mean, self.std = (
                torch.tensor(self.index["encoder"][name], dtype=torch.float32) for name in ("mean", "std")
            )
            self.autoencoder: str = self.index["encoder"].get("vae_sha256", "")
            self.shards = [Shard(**entry) for entry in self.index["shards"]]
            self._rows, labels_sha256 = self.index["rows"], self.index["labels_sha256"]
            row = (*_ROW_SHAPES[self.kind], *self._shape)
            if sum(shard.rows for shard in self.shards) != self._rows or self._rows < 1:
                raise ValueError(f"{self._rows} rows, but the shards' are {[s.rows for s in self.shards]}")
            if not len(self.mean) == len(self.std) == self._shape[0]:
                raise ValueError(f"mean and std must be a value for each of {self._shape[0]} channels")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / INDEX}: disagrees with itself or is damaged: {type(error).__name__}: {error}"
            ) from error
        self._parts = [_map(self.folder, s, (s.rows, *row), _DTYPES[self.kind]) for s in self.shards]
        self._starts = torch.tensor([0, *(shard.rows for shard in self.shards)]).cumsum(0)
        self.labels = self._read_labels(labels_sha256)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row as the network sees it."""
        return self._shape

    @property
    def num_classes(self) -> int:
        """Labels are 0 ... num_classes - 1."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._rows

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised data and labels of `rows`, see `DataSet.fetch`; latents are sampled from the posterior.

        Raises: ValueError unless rows is [B] int64 with values in 0 ... len(self) - 1.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"fetch: rows must be [B] int64, got {list(rows.shape)} {rows.dtype}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(f"fetch: rows must be in [0, {len(self)}), got {rows.min()} ... {rows.max()}")
        stored = self._gather(rows)
        seeds = row_seeds(generator, len(rows)).tolist()
        x = torch.empty(len(rows), *self._shape)
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        noise_of_row = torch.Generator()
        # Row by row: a latent lies in the cache, and these operations on it are too small to be spread over
        # threads, which the network needs.
        for seed, row, out in zip(seeds, stored, x, strict=True):
            if self.kind == "pixels":
                out.copy_(row)
            else:
                noise_of_row.manual_seed(seed)
                torch.addcmul(row[0], row[1], out.normal_(generator=noise_of_row), out=out)
            out.sub_(mean).div_(std)
        return x, self.labels[rows]

    def images(self, rows: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] uint8 of `rows` [B] int64; ValueError for latents."""
        if self.kind != "pixels":
            raise ValueError(f"images: {self.folder} must hold pixels, got {self.kind}")
        return torch.stack(self._gather(rows))

    def verify(self) -> Iterator[Shard]:
        """Reads every shard; yields each whose checksum agrees, raises DataError at one that does not."""
        for shard in self.shards:
            path = self.folder / shard.file
            if (got := sha256(path)) != shard.sha256:
                raise DataError(
                    f"{path}: its SHA-256 must be {shard.sha256}, as {INDEX} says, got {got}; the file has "
                    f"changed since it was written: prepare the folder again, or copy this file again"
                )
            yield shard

    def _gather(self, rows: Tensor) -> list[Tensor]:
        """The stored rows, views of the mapped files, which are asked for all at once first."""
        shards = torch.searchsorted(self._starts, rows, right=True) - 1
        places = list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))
        for shard, row in places:
            self._parts[shard].will_need(row)
        return [self._parts[shard].rows[row] for shard, row in places]

    def _read_labels(self, expected_sha256: str) -> Tensor:
        path = self.folder / LABELS
        got = sha256(path)
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not a whole .npy file: {error}") from error
        if labels.shape != (len(self),) or labels.dtype != np.int64:
            raise DataError(
                f"{path}: must be [{len(self)}] int64, a label a row, got {list(labels.shape)} {labels.dtype}"
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise DataError(
                f"{path}: labels must be in [0, {self.num_classes}), got {labels.min()} ... {labels.max()}"
            )
        if got != expected_sha256:
            raise DataError(f"{path}: its SHA-256 must be {expected_sha256}, as {INDEX} says, got {got}")
        return torch.from_numpy(labels)


@dataclass
class _Part:
    """A mapped shard: its rows as a tensor on the file's pages, which are read when they are used."""

    memory: mmap.mmap
    rows: Tensor
    offset: int  # bytes before the first row

    def will_need(self, row: int) -> None:
        """Have the pages of a row read in the background: a batch's rows then come together, not in turn."""
        if hasattr(mmap, "MADV_WILLNEED"):
            size = self.rows.stride(0) * self.rows.element_size()
            first = (self.offset + row * size) // mmap.PAGESIZE * mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_WILLNEED, first, self.offset + (row + 1) * size - first)


def _map(folder: Path, shard: Shard, shape: tuple[int, ...], dtype: str) -> _Part:
    path = folder / shard.file
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size != shard.bytes:
                raise DataError(
                    f"{path}: must have {shard.bytes:,} bytes, as {INDEX} says, got {size:,}: truncated, or "
                    f"of another data set"
                )
            got_shape, got_dtype = _read_header(file)
            offset = file.tell()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable shard: {error}") from error
    if got_shape != shape or got_dtype != np.dtype(dtype):
        raise DataError(
            f"{path}: must be {list(shape)} {dtype}, as {INDEX} says, got {list(got_shape)} {got_dtype}"
        )
    with warnings.catch_warnings():
        # PyTorch has no read-only tensors. These rows are only read, and never leave `PackedData`.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        rows = torch.frombuffer(memory, dtype=getattr(torch, dtype), offset=offset)
    return _Part(memory, rows.reshape(shape), offset)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an open .npy file, which is left at its first value; ValueError if it is none."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order:
        raise ValueError("columns come first")
    return shape, dtype


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a data set is 'digits' or a folder of imf.data.prepare")
    if not (folder / INDEX).is_file():
        if (folder / PLAN).is_file():
            raise DataError(
                f"{folder}: half-made: the same python -m imf.data.prepare again goes on where it stopped"
            )
        raise DataError(f"{folder}: no {INDEX} in it, so it is no folder of imf.data.prepare")
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise DataError(
            f"{folder / INDEX}: of format {index.get('format')}, this version reads {FORMAT}: make it again"
        )
    return index
