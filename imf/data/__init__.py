"""Data sets, and the order in which training walks through one."""

from __future__ import annotations

from pathlib import Path

from imf.data.batches import Batches, batch_indices
from imf.data.dataset import DataSet, LabelledImages, row_seeds
from imf.program import UserError

__all__ = ["Batches", "DataSet", "LabelledImages", "UserError", "batch_indices", "load", "row_seeds"]


def load(name_or_path: str | Path) -> DataSet:
    """The data set called "digits", or the one in a folder that `imf.data.prepare` wrote.

    Raises: UserError if there is none of that name, or the folder is not whole.
    """
    if name_or_path == "digits":
        from imf.data import digits

        return digits.load()
    from imf.data.packed import PackedData

    return PackedData(name_or_path)
