"""Data sets, and the order in which training walks through one."""

from __future__ import annotations

from pathlib import Path

from imf.data import digits
from imf.data.batches import Batches, DataSet, batch_indices, row_seeds
from imf.data.memory import LabelledImages
from imf.data.packed import PackedData
from imf.data.torch_dataset import from_dataset

__all__ = [
    "Batches",
    "DataSet",
    "LabelledImages",
    "PackedData",
    "batch_indices",
    "from_dataset",
    "load",
    "row_seeds",
]


def load(name_or_path: str | Path) -> DataSet:
    """Loads the data set called "digits", or the one in a folder that `imf.data.prepare` wrote.

    Raises: UserError if there is none of that name, or the folder is not complete.
    """
    return digits.load() if name_or_path == "digits" else PackedData(name_or_path)
