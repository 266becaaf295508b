"""Packed data: a folder of memory-mapped shards that `imf.data.prepare` wrote, read in any order.

A row of latents holds mean and standard deviation of an image's posterior, fp32 [2, C, H, W]; a row of pixels
the image, uint8 [3, H, W]. docs/data.md has the folder to the byte.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imf.data.dataset import row_seeds
from imf.data.files import read_header, sha256
from imf.data.index import INDEX, Shard, read_index
from imf.io import check_regular
from imf.program import UserError

LABELS = "labels.npy"
_ROW_SHAPES = {"latents": (2,), "pixels": ()}  # before (C, H, W)
_DTYPES = {"latents": "float32", "pixels": "uint8"}
# Norm of a row in standard deviations of the channels: no image is that far off, and the square of the loss
# still fits into fp32.
LARGEST = 1e6


class PackedData:
    """The data set in a folder of `imf.data.prepare`; see `imf.data.DataSet`.

    kind: "latents" or "pixels".  class_names: a name a label.  labels: [N] int64.
    mean, std: [C] fp32; the network sees (value - mean) / std, where a value is a sample of the posterior.
    autoencoder: digest of the one that made the latents.  index: all that index.json says.

    Raises: UserError if the folder is missing, half-made, or a file of it is missing, truncated or disagrees
    with the index. `verify` reads the shards and checks their bytes too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.kind: str = self.index["kind"]
        self._shape: tuple[int, int, int] = tuple(self.index["shape"])
        self.class_names: list[str] = self.index["class_names"]
        self.mean, self.std = (
            torch.tensor([float(x) for x in self.index["encoder"][name]]) for name in ("mean", "std")
        )
        self.autoencoder: str = self.index["encoder"].get("vae_sha256", "")
        self.shards = [Shard(**entry) for entry in self.index["shards"]]
        self._rows: int = self.index["rows"]
        row, dtype = (*_ROW_SHAPES[self.kind], *self._shape), _DTYPES[self.kind]
        self._parts = [
            _map(self.folder / shard.file, (shard.rows, *row), dtype, f"as {INDEX} says", shard.bytes)
            for shard in self.shards
        ]
        self._starts = torch.tensor([0, *(shard.rows for shard in self.shards)]).cumsum(0)
        self.labels = self._read_labels(self.index["labels_sha256"])

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

        Raises: ValueError unless rows is [B] int64 with values in 0 ... len(self) - 1; UserError, naming the
        file, for a row that is not finite or larger than `LARGEST`.
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
        norms = torch.linalg.vector_norm(x.flatten(1), dim=1)
        fine = norms <= LARGEST  # False for NaN
        if not fine.all():
            at = int(fine.int().argmin())
            ((shard, place),) = self._places(rows[at : at + 1])
            raise UserError(
                f"{self.folder / self.shards[shard].file}: row {place} must be finite and within {LARGEST:g} "
                f"deviations of its channels' means, got a norm of {norms[at]:g}; "
                f"python -m imf.data.prepare --verify {self.folder} tells whether the file has changed"
            )
        return x, self.labels[rows]

    def images(self, rows: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] uint8 of `rows` [B] int64; ValueError for latents."""
        if self.kind != "pixels":
            raise ValueError(f"images: {self.folder} must hold pixels, got {self.kind}")
        return torch.stack(self._gather(rows))

    def verify(self) -> Iterator[Shard]:
        """Reads every shard; yields each whose checksum agrees, raises UserError at one that does not."""
        for shard in self.shards:
            path = self.folder / shard.file
            if (got := sha256(path)) != shard.sha256:
                raise UserError(
                    f"{path}: its SHA-256 must be {shard.sha256}, as {INDEX} says, got {got}; the file has "
                    f"changed since it was written: prepare the folder again, or copy this file again"
                )
            yield shard

    def _places(self, rows: Tensor) -> list[tuple[int, int]]:
        """Shard and row in it of each of `rows`."""
        shards = torch.searchsorted(self._starts, rows, right=True) - 1
        return list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))

    def _gather(self, rows: Tensor) -> list[Tensor]:
        """The stored rows, views of the mapped files, which are asked for all at once first."""
        places = self._places(rows)
        for shard, row in places:
            self._parts[shard].will_need(row)
        return [self._parts[shard].rows[row] for shard, row in places]

    def _read_labels(self, expected_sha256: str) -> Tensor:
        path = self.folder / LABELS
        got = sha256(path)
        labels = _map(path, (len(self),), "int64", "a label a row").rows.clone()  # which may be written to
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(
                f"{path}: labels must be in [0, {self.num_classes}), got {labels.min()} ... {labels.max()}"
            )
        if got != expected_sha256:
            raise UserError(f"{path}: its SHA-256 must be {expected_sha256}, as {INDEX} says, got {got}")
        return labels


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


def _map(path: Path, shape: tuple[int, ...], dtype: str, says: str, size: int | None = None) -> _Part:
    """The array in a .npy file; UserError unless it has that shape, dtype and, where given, size in bytes."""
    try:
        got_size = check_regular(path).st_size
        if size not in (None, got_size):
            raise UserError(
                f"{path}: must have {size:,} bytes, {says}, got {got_size:,}: truncated, or "
                f"of another data set"
            )
        with path.open("rb") as file:
            got_shape, got_dtype = read_header(file)
            offset = file.tell()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a whole .npy file: {error}") from error
    if got_shape != shape or got_dtype != np.dtype(dtype):
        raise UserError(f"{path}: must be {list(shape)} {dtype}, {says}, got {list(got_shape)} {got_dtype}")
    wanted = offset + math.prod(shape) * got_dtype.itemsize
    if got_size != wanted:
        raise UserError(
            f"{path}: not a whole .npy file: must have {wanted:,} bytes, as its header says, got {got_size:,}"
        )
    with warnings.catch_warnings():
        # PyTorch has no read-only tensors. These rows are only read, and never leave `PackedData`.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        rows = torch.frombuffer(memory, dtype=getattr(torch, dtype), offset=offset)
    return _Part(memory, rows.reshape(shape), offset)
